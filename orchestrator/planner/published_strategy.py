"""The strategy that a published row names."""

from __future__ import annotations

import re
from collections.abc import Mapping

from orchestrator.planner.published_words import Untold, count
from orchestrator.spec import ZERO_STAGES, Buckets, Engine, Home, ModelShape, Shard, Strategy


def _buckets(engine: str, stage: int, shape: ModelShape) -> Buckets:
    """What the row's engine has: DeepSpeed's defaults (runtime/zero/config.py), or what transformers puts for "auto"
    (transformers/integrations/deepspeed.py, trainer_config_finalize)."""
    if "auto" in engine:
        square = shape.hidden_size**2
        return Buckets(reduce=square, prefetch=int(0.9 * square), persistence=10 * shape.hidden_size, overlap_comm=stage == 3)
    return Buckets(reduce=500_000_000, allgather=500_000_000, overlap_comm=stage == 3)


def _zero(cells: Mapping[str, str], stage: int, ranks: int, shape: ModelShape) -> Strategy:
    offload = cells["offload"].lower()
    optimizer, weights = "optim" in offload, "param" in offload or offload in ("cpu", "yes", "true")
    if offload not in ("", "none", "no", "false") and not optimizer and not weights:
        raise Untold(f"offload of {offload}")
    if "nvme" in offload:
        raise Untold("offload to NVMe with buffers that the row does not state")
    if weights and stage < 3:
        optimizer, weights = True, False
    return Strategy(
        Engine.DEEPSPEED, ZERO_STAGES[stage], dp_shard=ranks, buckets=_buckets(cells["engine"].lower(), stage, shape),
        optimizer_home=Home.CPU if optimizer or weights else Home.GPU, parameter_home=Home.CPU if weights else Home.GPU,
        pin_memory=optimizer or weights,
    )  # fmt: skip


def strategy_of(cells: Mapping[str, str], shape: ModelShape) -> Strategy:
    engine, offload = cells["engine"].lower(), cells["offload"].lower() or "none"
    ranks = count(cells["n_gpus"], "number of cards")
    fsdp = re.match(r"fsdp\d? (full_shard|shard_grad_op)", engine)
    if fsdp is not None:
        if offload not in ("none", "no", "cpu", "cpu params+grads (fsdp cpuoffload)"):
            raise Untold(f"offload of {offload} is not what FSDP2 does")
        home = Home.GPU if offload in ("none", "no") else Home.CPU
        return Strategy(
            Engine.FSDP, Shard.PARAMETERS, dp_shard=ranks, optimizer_home=home, parameter_home=home,
            pin_memory=home is not Home.GPU, reshard_after_forward=fsdp[1] == "full_shard",
        )  # fmt: skip
    stage = re.search(r"zero\W?(?:stage\W?)?([0-3])", engine)
    if stage is not None:
        return _zero(cells, int(stage[1]), ranks, shape)
    if offload not in ("none", "no"):
        raise Untold(f"offload of {offload} without a sharding engine")
    if engine.startswith("ddp") and ranks > 1:
        return Strategy(Engine.DEEPSPEED, Shard.NONE, dp_shard=ranks, buckets=Buckets())
    if ranks == 1 and (engine in ("", "none", "plain") or engine.startswith("ddp")):
        return Strategy(Engine.PLAIN, Shard.NONE)
    raise Untold(f"engine {engine or 'not stated'} on {ranks} cards")
