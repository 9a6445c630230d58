"""Keys that would be ignored: a person who sets one expects it to act, so it is refused with what it needs."""

from __future__ import annotations

from collections.abc import Callable

from orchestrator.config.checks import quant_of
from orchestrator.config.schema import (
    FsdpKind,
    LossKind,
    OnNonfinite,
    OnSpike,
    OptimizerName,
    Quant,
    RecomputeKind,
    RootConf,
    TuningKind,
)
from orchestrator.config.strategy import homes
from orchestrator.errors import Fault
from orchestrator.spec import Home

Need = tuple[tuple[str, ...], Callable[[RootConf], bool], str, str]

NEEDS: tuple[Need, ...] = (
    (
        ("tuning.rank", "tuning.alpha", "tuning.dropout", "tuning.targets", "tuning.modules", "tuning.rslora",
         "tuning.dora"),
        lambda conf: conf.tuning.kind.adapters,
        "only tuning=lora and tuning=qlora have adapters",
        "add tuning=lora",
    ),
    (
        ("tuning.untie",),
        lambda conf: not conf.tuning.untie or conf.tuning.kind is TuningKind.head or bool(conf.tuning.modules),
        "nothing but the head and the embedding can be untied, and neither is trained by itself",
        "add tuning=head, or tuning.modules=[lm_head]",
    ),
    (
        ("tuning.quant",),
        lambda conf: conf.tuning.kind.can_pack,
        "only tuning=qlora and tuning=head quantise the base",
        "add tuning=qlora",
    ),
    (
        ("tuning.double_quant",),
        lambda conf: bool(quant_of(conf.tuning)),
        "only tuning=qlora, and tuning=head with tuning.quant, quantise the base",
        "add tuning=qlora",
    ),
    (
        ("tuning.double_quant",),
        lambda conf: quant_of(conf.tuning) in ("", Quant.nf4.value),
        "int8 has one scale to a row, too few to quantise",
        "use tuning.quant=nf4",
    ),
    (
        ("zero.reduce_bucket", "zero.allgather_bucket", "zero.prefetch_bucket", "zero.persistence_threshold",
         "zero.max_live_parameters", "zero.max_reuse_distance", "zero.sub_group_size", "zero.overlap_comm", "zero.gradients"),
        lambda conf: conf.zero.stage is not None,
        "zero=none runs no DeepSpeed",
        "add zero=stage3, or another stage",
    ),
    (
        ("fsdp.shard_size",),
        lambda conf: conf.fsdp.kind is FsdpKind.hybrid_shard,
        "only hybrid_shard has shard groups",
        "add fsdp=hybrid_shard",
    ),
    (
        ("recompute.every",),
        lambda conf: conf.recompute.kind is RecomputeKind.every_n,
        "only recompute=every_n leaves blocks out",
        "add recompute=every_n",
    ),
    (
        ("loss.chunk",),
        lambda conf: conf.loss.kind in (LossKind.auto, LossKind.chunked),
        "only the chunked loss has chunks",
        "add loss.kind=chunked",
    ),
    (
        ("offload.pin_memory",),
        lambda conf: conf.offload.optimizer or conf.offload.parameters,
        "offload=none moves nothing to host memory",
        "add offload=cpu or offload=optimizer",
    ),
    (
        ("health.nonfinite_limit",),
        lambda conf: conf.health.on_nonfinite is OnNonfinite.skip,
        "health.on_nonfinite=stop ends the run at the first",
        "use health.on_nonfinite=skip",
    ),
    (
        ("health.spike_window", "health.spike_deviations", "health.spike_limit"),
        lambda conf: conf.health.on_spike is OnSpike.rollback,
        "health.on_spike=ignore looks for no spike",
        "add health.on_spike=rollback",
    ),
    (
        ("optimizer.betas",),
        lambda conf: conf.optimizer.name is not OptimizerName.adafactor,
        "Adafactor has no betas; optimizer.forgetting says how fast its moment forgets",
        "use another optimizer",
    ),
    (
        ("optimizer.eps",),
        lambda conf: conf.optimizer.name not in (OptimizerName.adafactor, OptimizerName.lion),
        "Adafactor and Lion divide by nothing that needs it",
        "use another optimizer",
    ),
    (
        ("optimizer.momentum",),
        lambda conf: conf.optimizer.name is OptimizerName.muon,
        "only Muon has a momentum of its own",
        "add optimizer=muon",
    ),
    (
        ("optimizer.forgetting", "optimizer.update_clip"),
        lambda conf: conf.optimizer.name is OptimizerName.adafactor,
        "only Adafactor reads it",
        "add optimizer=adafactor",
    ),
    (
        ("offload.path", "offload.buffer_count", "offload.buffer_size", "offload.aio.block_size", "offload.aio.queue_depth",
         "offload.aio.threads", "offload.aio.single_submit", "offload.aio.overlap_events"),
        lambda conf: Home.NVME in homes(conf.offload),
        "nothing rests on NVMe",
        "add offload=nvme or offload=nvme_optimizer",
    ),
)  # fmt: skip


def idle_faults(conf: RootConf, stated: frozenset[str]) -> list[Fault]:
    """A fault for each group of keys in `stated` (those the user has set) that nothing in `conf` would read."""
    faults = []
    for names, active, reason, remedy in NEEDS:
        idle = [name for name in names if name in stated]
        if idle and not active(conf):
            faults.append(Fault(", ".join(idle), f"would have no effect: {reason}", f"{remedy}, or leave it out"))
    return faults
