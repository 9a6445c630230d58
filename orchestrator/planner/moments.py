"""The instants of a step at which a rank can hold most, from the Layout and the activation estimate: basis "layout".

Six instants bound a run: the load, the loss, the start and the end of the backward, the update and the save. Between the
start and the end of the backward activations go as gradients come, each by block, so the peak is at one of its ends.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from orchestrator.layout import Layout, lay_out
from orchestrator.ledger import Entry, Ledger
from orchestrator.planner.activations import FP32, OURS, Activations, LossCode, activations
from orchestrator.planner.device import overhead
from orchestrator.spec import ROOT, Engine, Home, ModelShape, Parameter, RunSpec, Shard
from orchestrator.units import dtype_bytes

GPU = str(Home.GPU)


@dataclass(frozen=True, slots=True)
class Moment:
    """What one rank's card holds at an instant of `phase`: bytes by line."""

    phase: str
    what: str
    lines: Mapping[str, int]

    @property
    def bytes(self) -> int:
        return sum(self.lines.values())


def _sum(*parts: Mapping[str, int]) -> dict[str, int]:
    """Bytes by line over all parts; what is zero is left out."""
    total: dict[str, int] = {}
    for part in parts:
        for line, count in part.items():
            if count:
                total[line] = total.get(line, 0) + count
    return total


def _resting(layout: Layout, point: str, home: Home) -> dict[str, int]:
    return _sum(*({row.line: row.bytes} for row in layout.at(point) if row.home is home))


def _moving(layout: Layout, phase: str, home: Home) -> dict[str, int]:
    return _sum(*({b.line: b.bytes} for b in layout.buffers if b.home is home and phase in b.phases))


@dataclass(frozen=True, slots=True)
class _Gradients:
    """Gradient bytes at the loss, once the head's exist, and when all do; `shared` is alive only while they are reduced."""

    at_loss: int
    at_head: int
    at_end: int
    shared: Mapping[str, int]


def _gradients(spec: RunSpec, table: Sequence[Parameter], backward: Mapping[str, int]) -> _Gradients:
    """How gradients grow over one backward. After the first of several micro-batches all of them exist from the start."""
    held = backward.get("gradients", 0)
    trainable = [p for p in table if p.trainable]
    c = dtype_bytes(spec.precision.compute)
    head = max((p.numel for p in trainable if p.block == ROOT), default=0)
    begin = held if spec.batch.accumulation > 1 else 0
    if spec.strategy.engine is Engine.FSDP:
        # The root group's gradients stay whole until its reduce-scatter at the very end (_fsdp_param_group.py post_backward).
        root = sum(p.numel for p in trainable if p.block == ROOT)
        scatter = {"reduce_scatter": backward.get("reduce_scatter", 0)}
        return _Gradients(begin, begin + head * c, held + root * c, scatter)
    if spec.strategy.shard in (Shard.GRADIENTS, Shard.PARAMETERS) or spec.batch.accumulation > 1:
        return _Gradients(begin, max(begin, head * c), held, {})
    return _Gradients(0, min(held, head * (FP32 if spec.strategy.engine is Engine.PLAIN else c)), held, {})


def _step_lines(spec: RunSpec, layout: Layout) -> dict[str, int]:
    """What the update needs for itself beyond the Layout's buffers."""
    strategy = spec.strategy
    if strategy.shard is Shard.PARAMETERS and strategy.buckets is not None and strategy.optimizer_home is Home.GPU:
        own = sum(row.elements for row in layout.rows if row.line == "master")
        # stage3.py _prepare_sub_group: the gradients of one sub-group at a time in fp32.
        return {"gradients": min(own, strategy.buckets.sub_group) * FP32}
    return {}


def _load_lines(spec: RunSpec, table: Sequence[Parameter]) -> dict[str, int]:
    """What is alive only while the engine takes the model over."""
    strategy = spec.strategy
    if strategy.engine is Engine.DEEPSPEED and strategy.shard in (Shard.OPTIMIZER, Shard.GRADIENTS):
        # stage_1_and_2.py __init__: the parameters and their flat copy.
        return {"weights": sum(p.numel for p in table if p.trainable) * dtype_bytes(spec.precision.compute)}
    return {}


def _save_lines(spec: RunSpec, table: Sequence[Parameter]) -> dict[str, int]:
    """One whole tensor at a time is gathered for the export (engine.full_tensors)."""
    if spec.strategy.shard is not Shard.PARAMETERS or spec.strategy.ranks == 1:
        return {}
    size = FP32 if spec.strategy.engine is Engine.FSDP else dtype_bytes(spec.precision.compute)
    return {"gathered": max((p.numel for p in table if p.trainable), default=0) * size}


def card_moments(
    spec: RunSpec, table: Sequence[Parameter], shape: ModelShape, rank: int = 0, loss: LossCode = OURS
) -> tuple[Moment, ...]:
    """What the card of rank `rank` holds at each instant, in the order of a run, optimizer states present (second step on)."""
    layout = lay_out(spec, table, rank)
    held: Activations = activations(spec, shape, loss)
    rest = _resting(layout, "step", Home.GPU)
    backward = _moving(layout, "backward", Home.GPU)
    gradients = _gradients(spec, table, backward)
    lasting = {line: count for line, count in backward.items() if line not in ("gradients", "reduce_scatter")}
    workspace = {"workspace": overhead(spec.cluster, spec.strategy.ranks).workspace}
    forward = _moving(layout, "forward", Home.GPU)
    block = held.one_block if spec.recompute != "none" else 0
    inside = {"activations": block + held.transient, "workspace": held.attention}

    def now(phase: str, what: str, *parts: Mapping[str, int]) -> Moment:
        return Moment(phase, what, _sum(rest, workspace, *parts))

    # FSDP2 has freed the root group before the loss and gathers it again for the head's backward, unless all stays gathered.
    freed = spec.strategy.engine is Engine.FSDP and spec.strategy.reshard_after_forward
    outside = {} if freed else forward
    waiting = {line: count for line, count in lasting.items() if not (freed and line == "gathered")}
    at_loss = {"gradients": gradients.at_loss, "activations": held.saved}
    at_start = {"gradients": gradients.at_head, "activations": held.blocks}
    at_end = {"gradients": gradients.at_end}
    one = {"activations": held.one_block} if spec.recompute == "none" else {}
    return (
        Moment("load", "taking the model over", _sum(_resting(layout, "load", Home.GPU), _load_lines(spec, table))),
        now("forward", "the head", forward, at_loss, {"logits": held.logits}),
        now("forward", "the loss", outside, at_loss, {"logits": held.loss_forward}),
        now("backward", "the gradient of the loss", waiting, at_loss, {"logits": held.loss_backward}),
        now("backward", "the gradient of the head", lasting, at_start, {"activations": held.head, "logits": held.logits}),
        now("backward", "the last block", lasting, at_start, inside),
        now("backward", "the first block", lasting, at_end, inside, one),
        now("backward", "the reduction of the last gradients", lasting, at_end, gradients.shared),
        now("step", "the update", _moving(layout, "step", Home.GPU), _step_lines(spec, layout)),
        now("save", "the export", _save_lines(spec, table)),
    )


def host_lines(spec: RunSpec, table: Sequence[Parameter], home: Home, rank: int = 0) -> dict[str, int]:
    """Bytes by line that rank `rank` keeps in host memory or on NVMe, at the fullest phase."""
    layout = lay_out(spec, table, rank)
    rest = _resting(layout, "step", home)
    moving = [_moving(layout, phase, home) for phase in ("load", "forward", "backward", "step", "save")]
    return _sum(rest, max(moving, key=lambda lines: sum(lines.values())))


def largest(moments: Sequence[Moment]) -> Moment:
    """The moment that holds most."""
    return max(moments, key=lambda moment: moment.bytes)


def ledger_of(moments: Sequence[Moment], elsewhere: Mapping[Home, Mapping[str, int]], rank: int = 0) -> Ledger:
    """For each phase the lines of its fullest moment; what rests outside the card stands under the phase "step"."""
    entries: list[Entry] = []
    for phase in dict.fromkeys(moment.phase for moment in moments):
        fullest = largest([moment for moment in moments if moment.phase == phase])
        entries += [Entry(phase, line, GPU, count) for line, count in fullest.lines.items()]
    for home, lines in elsewhere.items():
        entries += [Entry("step", line, str(home), count) for line, count in lines.items()]
    return Ledger(rank, tuple(entries))
