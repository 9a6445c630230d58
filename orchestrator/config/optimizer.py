"""From the group optimizer to the spec's, and what it cannot be joined with."""

from __future__ import annotations

from orchestrator.config import divisions
from orchestrator.config.schema import OptimizerConf, OptimizerName, RootConf, TuningKind, ZeroConf
from orchestrator.errors import Fault
from orchestrator.spec import Cluster, Engine, Home, Optimizer, Strategy

LION_SHARE = 0.2
"""Lion's learning rate as a share of AdamW's: its updates are signs, so larger (arXiv:2302.06675, section 5: 3 to 10 times
smaller)."""

FLAT = {
    OptimizerName.adafactor: (range(1, 4), "its factors are sums over the rows and columns of whole matrices"),
    OptimizerName.muon: (range(4), "it orthogonalises whole matrices"),
}
"""What DeepSpeed's flat buffers make meaningless: the stages, and why."""


def choose_lr(conf: OptimizerConf, tuning: TuningKind, tiny: bool) -> float:
    """The peak learning rate: as given, else by what is trained, and a fifth of that for Lion."""
    if conf.lr is not None:
        return conf.lr
    base = 3e-3 if tiny else 2e-5 if tuning is TuningKind.full else 2e-4
    return base * LION_SHARE if conf.name is OptimizerName.lion else base


def build_optimizer(conf: RootConf, tiny: bool) -> Optimizer:
    """The optimizer of a config without faults."""
    own = conf.optimizer
    first, second = own.betas
    return Optimizer(
        name=own.name.value,
        lr=choose_lr(own, conf.tuning.kind, tiny),
        betas=(first, second),
        eps=own.eps,
        weight_decay=own.weight_decay,
        clip=own.clip,
        momentum=own.momentum,
        forgetting=own.forgetting,
        update_clip=own.update_clip,
    )


def suits(name: str, strategy: Strategy) -> bool:
    """Whether `compose` would take the optimizer `name` under `strategy`."""
    choice = OptimizerName[name]
    if strategy.tp > 1 and name not in divisions.OPTIMIZERS:
        return False
    if strategy.optimizer_home is Home.NVME and choice is not OptimizerName.adamw:
        return False  # config/checks.py, swapped_run_faults
    if strategy.engine is Engine.DEEPSPEED and strategy.stage in FLAT.get(choice, ((), ""))[0]:
        return False
    return choice is not OptimizerName.paged_adamw_8bit or strategy.optimizer_home is Home.GPU


def optimizer_faults(name: OptimizerName, zero: ZeroConf, offloaded: bool, cluster: Cluster) -> list[Fault]:
    """An optimizer where it would be wrong, or where it cannot run."""
    faults = []
    stages, reason = FLAT.get(name, ((), ""))
    if zero.stage in stages:
        problem = f"optimizer={name.name} with zero=stage{zero.stage}: {reason}, and DeepSpeed gives it flat parts"
        faults.append(Fault("optimizer", problem, "use fsdp=full_shard, or optimizer=adamw_8bit for small states"))
    if name is OptimizerName.paged_adamw_8bit and cluster.card.name == "cpu":
        problem = "optimizer=paged_adamw_8bit pages between a card and host memory, and there is no card"
        faults.append(Fault("optimizer", problem, "use optimizer=adamw_8bit"))
    elif name is OptimizerName.paged_adamw_8bit and offloaded:
        problem = "optimizer=paged_adamw_8bit with offload: its states would lie in host memory anyway"
        faults.append(Fault("optimizer", problem, "use optimizer=adamw_8bit, or offload=none"))
    return faults
