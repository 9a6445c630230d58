"""Every strategy that the project can run on a cluster, as what to type and as the spec that it gives."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from orchestrator.config import divisions
from orchestrator.config.optimizer import suits
from orchestrator.config.schema import FsdpConf, FsdpKind, OffloadConf, OffloadHome, ZeroConf
from orchestrator.config.strategy import buckets, homes, nvme, see_disk, shard_size
from orchestrator.planner.device import CPU
from orchestrator.spec import ZERO_STAGES, Batch, Engine, Home, RunSpec, Shard, Strategy, sizes_that_divide

SWAPS = {
    "nvme_optimizer": OffloadConf(optimizer=True, optimizer_home=OffloadHome.nvme),
    "nvme": OffloadConf(optimizer=True, parameters=True, optimizer_home=OffloadHome.nvme, parameters_home=OffloadHome.nvme),
}
"""What the choices of `offload` that mean NVMe say."""

RECOMPUTE = ("none", "full")
TENSOR_SIZES = (2, 4)
"""The choices of the group `tensor`."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """`words` is what to type beside the rest of the run; `spec` is what that composes to."""

    words: str
    spec: RunSpec


def _with(spec: RunSpec, strategy: Strategy) -> RunSpec | None:
    """`spec` under `strategy`, its micro-batch kept where the global batch allows it; None where it cannot be divided."""
    share, rest = divmod(spec.batch.global_size, strategy.dp)
    if rest:
        return None
    micro = next(size for size in range(min(spec.batch.micro, share), 0, -1) if share % size == 0)
    batch = Batch(spec.batch.global_size, micro, share // micro)
    return replace(spec, strategy=strategy, batch=batch, cluster=see_disk(spec.cluster, strategy.nvme))


def _deepspeed(spec: RunSpec) -> Iterator[tuple[str, Strategy]]:
    ranks, knobs = spec.strategy.ranks, buckets(ZeroConf(), spec.model.shape)
    pinned = spec.cluster.card.name != CPU
    for stage, shard in ZERO_STAGES.items():
        if shard is Shard.NONE and spec.precision.compute == "fp16":
            continue  # its optimizer without sharding does not clip (config/checks.py)
        zero = Strategy(Engine.DEEPSPEED, shard, dp_shard=ranks, buckets=knobs)
        yield f"zero=stage{stage}", zero
        if shard is Shard.NONE:
            continue
        halfway = replace(zero, optimizer_home=Home.CPU, pin_memory=pinned)
        yield f"zero=stage{stage} offload=optimizer", halfway
        if shard is Shard.PARAMETERS:
            yield f"zero=stage{stage} offload=cpu", replace(halfway, parameter_home=Home.CPU)
            yield from _swapping(spec, halfway)


def _swapping(spec: RunSpec, offloaded: Strategy) -> Iterator[tuple[str, Strategy]]:
    """What rests on NVMe under ZeRO-3, unless config/checks.py refuses it."""
    shape, tuning = spec.model.shape, spec.tuning
    if tuning.form or tuning.dora or spec.optimizer.name != "adamw" or spec.checkpoint.background:
        return
    if shape is None or not shape.known:
        return
    for choice, offload in SWAPS.items():
        optimizer_home, parameter_home = homes(offload)
        yield (
            f"zero=stage3 offload={choice}",
            replace(
                offloaded,
                optimizer_home=optimizer_home,
                parameter_home=parameter_home,
                buckets=buckets(ZeroConf(), shape, optimizer_home, parameter_home),
                nvme=nvme(offload, shape, offloaded.dp_shard, spec.run.dir),
            ),
        )


def _fsdp(spec: RunSpec) -> Iterator[tuple[str, Strategy]]:
    ranks = spec.strategy.ranks
    for kind in (FsdpKind.full_shard, FsdpKind.shard_grad_op, FsdpKind.hybrid_shard):
        group = shard_size(FsdpConf(kind=kind), ranks, spec.cluster)
        if kind is FsdpKind.hybrid_shard and not 1 < group < ranks:
            continue
        strategy = Strategy(
            Engine.FSDP, Shard.PARAMETERS, dp_replicate=ranks // group, dp_shard=group,
            reshard_after_forward=kind is not FsdpKind.shard_grad_op,
        )  # fmt: skip
        yield f"fsdp={kind.name}", strategy
        pinned = spec.cluster.card.name != CPU
        offloaded = replace(strategy, optimizer_home=Home.CPU, parameter_home=Home.CPU, pin_memory=pinned)
        yield f"fsdp={kind.name} offload=cpu", offloaded


def _tensor(spec: RunSpec) -> Iterator[tuple[str, Strategy]]:
    """Tensor parallelism inside a machine, alone and with what remains of the ranks sharded."""
    ranks, shape, cards = spec.strategy.ranks, spec.model.shape, spec.cluster.cards_per_node
    able = sizes_that_divide(shape) if shape is not None and shape.known else ()
    if spec.tuning.form or spec.tuning.dora or spec.loss.kind == "liger" or spec.optimizer.name not in divisions.OPTIMIZERS:
        return
    if spec.recompute == "selective":  # config/computing.py recompute_faults
        return
    for size in TENSOR_SIZES:
        if size not in able or ranks % size or cards % size:
            continue
        alone = Strategy(Engine.FSDP, Shard.PARAMETERS, dp_replicate=ranks // size, tp=size)
        yield f"tensor={size}", alone
        sharded = replace(alone, dp_replicate=1, dp_shard=ranks // size)
        if ranks > size:
            yield f"fsdp=full_shard tensor={size}", sharded
        pinned = spec.cluster.card.name != CPU
        offloaded = replace(sharded, optimizer_home=Home.CPU, parameter_home=Home.CPU, pin_memory=pinned)
        yield f"fsdp=full_shard tensor={size} offload=cpu", offloaded
        for stage in (stage for stage in ZERO_STAGES if stage not in divisions.BESIDE):
            zero = replace(
                sharded, engine=Engine.DEEPSPEED, shard=ZERO_STAGES[stage], buckets=buckets(ZeroConf(), spec.model.shape)
            )
            if ranks > size:
                yield f"zero=stage{stage} tensor={size}", zero
            halfway = replace(zero, optimizer_home=Home.CPU, pin_memory=pinned)
            yield f"zero=stage{stage} tensor={size} offload=optimizer", halfway


def _every(spec: RunSpec) -> Iterator[tuple[str, Strategy]]:
    if spec.strategy.ranks == 1:
        yield "zero=none", Strategy(Engine.PLAIN, Shard.NONE)
    yield from _deepspeed(spec)
    yield from _fsdp(spec)
    yield from _tensor(spec)


def strategies(spec: RunSpec) -> Iterator[tuple[str, Strategy]]:
    """(what to type, strategy) for the ranks of `spec`; none that `compose` would refuse."""
    able = ((words, strategy) for words, strategy in _every(spec) if suits(spec.optimizer.name, strategy))
    if spec.compile == "none":
        return able
    # config/computing.py compile_faults: DeepSpeed's stage 3 and tensor parallelism act inside a block.
    return (
        (words, strategy)
        for words, strategy in able
        if strategy.tp == 1 and (strategy.engine is not Engine.DEEPSPEED or strategy.shard is not Shard.PARAMETERS)
    )


def candidates(spec: RunSpec, recompute: tuple[str, ...] = RECOMPUTE) -> tuple[Candidate, ...]:
    """Every strategy on the ranks of `spec`, with each of `recompute`; none of it is said only where `spec` has none either."""
    found = []
    for words, strategy in strategies(spec):
        other = _with(spec, strategy)
        if other is None:
            continue
        for kind in recompute:
            text = words if kind == spec.recompute == RECOMPUTE[0] else f"{words} recompute={kind}"
            found.append(Candidate(text, replace(other, recompute=kind)))
    return tuple(found)


def typed(spec: RunSpec) -> str:
    """What to type for the strategy of `spec` itself; its label where no candidate is like it (hand-set knobs)."""
    for words, strategy in strategies(spec):
        if strategy.label == spec.strategy.label:
            return words if spec.recompute == RECOMPUTE[0] else f"{words} recompute={spec.recompute}"
    return spec.strategy.label
