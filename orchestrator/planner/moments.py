"""The instants of a step at which a rank can hold most, from the Layout and the activation estimate: basis "layout".

The instants that bound a run: the load, the loss, the start and the end of the backward, the update and the save. Between the
start and the end of the backward activations go as gradients come, each by block, so the peak is at one of its ends.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from orchestrator.layout import Layout
from orchestrator.ledger import Entry, Ledger
from orchestrator.planner.activations import FP32, Activations, activations
from orchestrator.planner.device import overhead
from orchestrator.planner.losses import LossCode, head_trained, loss_peaks
from orchestrator.spec import (
    INT8,
    NF4_DOUBLE,
    ROOT,
    Division,
    Engine,
    Home,
    ModelShape,
    Parameter,
    RunSpec,
    Shard,
    divided_table,
    division,
    owner,
    stored,
)
from orchestrator.spec.quant import BLOCK, RUN, WEIGHTS_PER_BYTE
from orchestrator.units import ceil_div, dtype_bytes

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
        # Its own shard is made by that, after the whole ones are gone but for the last, to which a loop's variable still points
        # (_fsdp_collectives.py foreach_reduce, unsharded_grad).
        own = min(held, ceil_div(root, spec.strategy.dp_shard) * FP32)
        last = next((p.numel for p in reversed(trainable) if p.block == ROOT), 0) if spec.strategy.dp_shard > 1 else 0
        # Offloaded it is on the card until it has been sent, beside what the loss has made (the head's), and all in fp32.
        away = ceil_div(root, spec.strategy.dp_shard) * FP32 if spec.strategy.parameter_home is not Home.GPU else 0
        more = max(0, own + (last - root) * c, away - (root - head) * c)
        scatter = {"reduce_scatter": backward.get("reduce_scatter", 0) + more}
        # Beside earlier gradients, what each block's all-reduce has summed is kept to the end (_all_reduce_state).
        kept = held - own if begin and spec.strategy.dp_replicate > 1 else 0
        return _Gradients(begin, begin + head * c, held - (0 if begin else own) + root * c + kept, scatter)
    if spec.strategy.engine is Engine.DEEPSPEED and spec.strategy.shard is Shard.NONE:
        return _Gradients(begin, begin + head * c, held, {"bucket": _sent_at_once(trainable) * c})
    if spec.strategy.shard is Shard.OPTIMIZER and spec.strategy.optimizer_home is not Home.GPU:
        # All stay until the last backward of a step, which sends those of this rank's part to the host as they come.
        waiting = sum(p.numel for p in trainable) * c if spec.batch.accumulation > 1 else 0
        largest_one = max((p.numel for p in trainable), default=0) * c if spec.strategy.dp_shard == 1 else 0
        return _Gradients(waiting, waiting or min(held, head * c), held - largest_one, {})  # that is in _whole_gradient
    if spec.strategy.shard in (Shard.GRADIENTS, Shard.PARAMETERS) or spec.batch.accumulation > 1:
        return _Gradients(begin, begin + head * c, held, {})
    return _Gradients(0, min(held, head * (FP32 if spec.strategy.engine is Engine.PLAIN else c)), held, {})


SENT = 500_000_000
"""Elements after which DeepSpeed's stage 0 sends the gradients that it has gone through (runtime/engine.py,
MEMORY_OPT_ALLREDUCE_SIZE)."""


def _sent_at_once(trainable: Sequence[Parameter]) -> int:
    """Elements of the largest message, which is a copy of its gradients (runtime/engine.py, allreduce_no_retain)."""
    largest = together = 0
    for parameter in trainable:
        together += parameter.numel
        largest = max(largest, together)
        if together > SENT:
            together = 0
    return largest


def _step_lines(spec: RunSpec, layout: Layout) -> dict[str, int]:
    """What the update needs for itself beyond the Layout's buffers."""
    strategy = spec.strategy
    if strategy.shard is Shard.PARAMETERS and strategy.buckets is not None and strategy.optimizer_home is Home.GPU:
        own = sum(row.elements for row in layout.rows if row.line == "master")
        # stage3.py _prepare_sub_group: the gradients of one sub-group at a time, joined, and then in fp32.
        c = dtype_bytes(strategy.gradients or spec.precision.compute)
        return {"gradients": min(own, strategy.buckets.sub_group) * (FP32 + (c if c < FP32 else 0))}
    return {}


def _norm_lines(spec: RunSpec, layout: Layout, table: Sequence[Parameter]) -> dict[str, int]:
    """The gradients, and under ZeRO-1 and 2 the largest of the partition's once more: each is cast to double precision for its
    norm, when those of other ranks are gone (stage_1_and_2.py get_grad_norm_direct, get_norm_dtype)."""
    strategy = spec.strategy
    if strategy.optimizer_home is not Home.GPU:
        return {}
    if strategy.shard not in (Shard.OPTIMIZER, Shard.GRADIENTS):
        return {"gradients": _moving(layout, "backward", Home.GPU).get("gradients", 0)}
    part = sum(row.elements for row in layout.rows if row.line == "master")
    c = dtype_bytes(strategy.gradients or spec.precision.compute)
    held = _moving(layout, "step", Home.GPU).get("gradients", 0) - part * (FP32 + (c if c < FP32 else 0))
    return {"gradients": held + min(part, max((p.numel for p in table if p.trainable), default=0)) * 2 * FP32}


def _load_lines(spec: RunSpec, layout: Layout, table: Sequence[Parameter]) -> dict[str, int]:
    """What is alive only while the engine takes the model over."""
    strategy, c = spec.strategy, dtype_bytes(spec.precision.compute)
    if strategy.engine is Engine.DEEPSPEED and strategy.shard is Shard.NONE and c < FP32:
        # fp16/unfused_optimizer.py initialize_optimizer_states: a step on gradients of zero, whose states are let go again.
        states = sum(row.bytes for row in layout.at("step") if row.line == "moments")
        return {"moments": states, "gradients": _moving(layout, "step", Home.GPU).get("gradients", 0)}
    if strategy.engine is Engine.DEEPSPEED and strategy.shard in (Shard.OPTIMIZER, Shard.GRADIENTS):
        # stage_1_and_2.py __init__: the parameters and their flat copy, before the partition's fp32 copy is made.
        copy = sum(p.numel for p in table if p.trainable) * c
        return {
            "weights": max(
                0, copy - sum(row.bytes for row in layout.at("load") if row.home is Home.GPU and row.line == "master")
            )
        }
    if strategy.engine is Engine.DEEPSPEED and strategy.shard is Shard.PARAMETERS:
        # partition_parameters.py zero.Init: a parameter is made whole before it is divided, and its part before it is moved.
        largest_one = max(p.numel for p in table)
        part = ceil_div(largest_one, strategy.dp_shard) if strategy.parameter_home is not Home.GPU else 0
        return {"weights": (largest_one + part) * c}
    return {}


def _whole_gradient(spec: RunSpec, table: Sequence[Parameter]) -> int:
    """Bytes of the largest gradient under ZeRO-2: the one that has just been made is whole, beside the partition that it is
    reduced into. Where the optimizer is offloaded, under ZeRO-1 too, and its norm is taken in double precision before it goes
    (stage_1_and_2.py set_norm_for_param_grad_in_gpu)."""
    strategy, c = spec.strategy, dtype_bytes(spec.precision.compute)
    largest = max((p.numel for p in table if p.trainable), default=0)
    if strategy.shard in (Shard.OPTIMIZER, Shard.GRADIENTS) and strategy.optimizer_home is not Home.GPU:
        return largest * (c + 2 * FP32)
    return largest * c if strategy.shard is Shard.GRADIENTS else 0


def _sent_copy(spec: RunSpec, table: Sequence[Parameter]) -> int:
    """Bytes of the copy as which ZeRO-2 sends a head's gradient that is too large for its bucket (stage_1_and_2.py,
    allreduce_bucket)."""
    buckets = spec.strategy.buckets
    largest = max((p.numel for p in table if p.trainable), default=0)
    if spec.strategy.shard is not Shard.GRADIENTS or not head_trained(table) or buckets is None or largest <= buckets.reduce:
        return 0
    return largest * dtype_bytes(spec.precision.compute)


def _fetched_head(spec: RunSpec, table: Sequence[Parameter]) -> dict[str, int]:
    """ZeRO-3: the buffer in which the head and what is fetched with it arrive, beside the weights that are copied out of it
    (partition_parameters.py, AllGatherCoalescedHandle.wait)."""
    buckets = spec.strategy.buckets
    if spec.strategy.shard is not Shard.PARAMETERS or buckets is None or not buckets.prefetch or spec.strategy.dp_shard == 1:
        return {}
    head = max((p.numel for p in table if p.block == ROOT), default=0)
    return {"gathered": (head + buckets.prefetch) * dtype_bytes(spec.precision.compute)}


def _gathering(spec: RunSpec, table: Sequence[Parameter]) -> tuple[int, int]:
    """Bytes of FSDP2's root group and of its largest block, gathered. While a group is gathered there are two of it: the flat
    result, and the parameters copied out of it (_fsdp_collectives.py foreach_all_gather_copy_out)."""
    groups: dict[int, int] = {}
    for parameter in table:
        groups[parameter.block] = groups.get(parameter.block, 0) + parameter.numel
    c = dtype_bytes(spec.precision.compute)
    return groups.get(ROOT, 0) * c, max((numel for block, numel in groups.items() if block != ROOT), default=0) * c


def _unpacked(spec: RunSpec, table: Sequence[Parameter]) -> int:
    """Bytes of the largest quantised weight, unpacked for its product, and of its scales in fp32 where they are quantised too
    (model/formats.py unpack)."""
    packed = [p for p in table if p.quant]
    if not packed:
        return 0
    largest = max(p.numel for p in packed)
    scales = ceil_div(largest, BLOCK) * FP32 if packed[0].quant == NF4_DOUBLE else 0
    return largest * dtype_bytes(spec.precision.compute) + scales


def _measuring(spec: RunSpec, table: Sequence[Parameter]) -> int:
    """Bytes that DoRA holds while it measures the rows of its largest weight: a unit matrix, the adapters' product made with
    it, that scaled, and its sum with the weight (peft/tuners/lora/dora.py get_lora_weight, get_weight_norm)."""
    if not spec.tuning.dora:
        return 0
    sizes = [p.shape[1] ** 2 + 3 * p.numel for p in table if len(p.shape) == 2 and owner(p.name) == "base_layer"]
    return max(sizes, default=0) * dtype_bytes(spec.precision.compute)


def _quantising(spec: RunSpec, table: Sequence[Parameter]) -> dict[str, int]:
    """What is alive while a weight is packed: a run of its values, its packed part, and its scales in fp32."""
    largest = max((p.numel for p in table if p.quant), default=0)
    if not largest:
        return {}
    form = spec.tuning.form
    # Of int8's values there is a product in fp32 besides (model/formats.py Int8).
    size = dtype_bytes(spec.precision.compute) + (FP32 + 1 if form == INT8 else 0)
    kept = largest // WEIGHTS_PER_BYTE[form] // (spec.strategy.dp_shard if spec.strategy.shard is Shard.PARAMETERS else 1)
    scales = 0 if form == INT8 else ceil_div(largest, BLOCK) * FP32
    return {"unpacked": min(largest, RUN) * size + kept + scales}


def _save_lines(spec: RunSpec, table: Sequence[Parameter]) -> dict[str, int]:
    """One whole tensor at a time is gathered for the export (engine.full_tensors); FSDP2's is fp32, and is cast."""
    strategy, c = spec.strategy, dtype_bytes(spec.precision.compute)
    parts = divided_table(table, strategy.tp)
    joined = max((_joined(p, part) for p, part in zip(table, parts, strict=True) if p.trainable), default=0) * c
    if strategy.shard is not Shard.PARAMETERS or (strategy.ranks == 1 and strategy.engine is Engine.DEEPSPEED):
        return {"gathered": joined}
    largest_one = max((p.numel for p in parts if p.trainable), default=0)
    if strategy.engine is Engine.DEEPSPEED:
        part = ceil_div(largest_one, strategy.dp_shard) if strategy.parameter_home is not Home.GPU else 0
        return {"gathered": (largest_one + part) * c}
    own = largest_one // strategy.dp_shard * FP32 if strategy.parameter_home is not Home.GPU else 0
    whole = largest_one * FP32 if strategy.ranks > 1 else 0  # of one rank its own is the whole
    return {"gathered": max(whole + (largest_one * c if c < FP32 else 0) + own, joined)}


def _joined(parameter: Parameter, part: Parameter) -> int:
    """Elements alive while the `part` of each rank of a tensor-parallel group is made the whole parameter: the part, all parts,
    and where they are columns their rearrangement (engine/tensor_parallel.py gather)."""
    if part.numel == parameter.numel:
        return 0
    return part.numel + parameter.numel * (2 if division(parameter.name) is Division.COLUMNS else 1)


def card_moments(
    spec: RunSpec, table: Sequence[Parameter], shape: ModelShape, layout: Layout, loss: LossCode | None = None
) -> tuple[Moment, ...]:
    """What the card of `layout`'s rank holds at each instant, in the order of a run, optimizer states present (second step
    on)."""
    unpacked, rows = _unpacked(spec, table), _measuring(spec, table)
    loading = _quantising(spec, table)
    table = stored(table, spec.precision.compute)
    parts = divided_table(table, spec.strategy.tp)
    held: Activations = activations(spec, shape)
    peaks = loss_peaks(spec, shape, table, loss)
    rest = _resting(layout, "step", Home.GPU)
    backward = _moving(layout, "backward", Home.GPU)
    gradients = _gradients(spec, parts, backward)
    lasting = {line: count for line, count in backward.items() if line not in ("gradients", "reduce_scatter")}
    workspace = {"workspace": overhead(spec.cluster, spec.strategy.ranks).workspace}
    forward = _moving(layout, "forward", Home.GPU)
    in_backward = 0 if spec.tuning.kind == "head" else max(unpacked, rows if spec.recompute != "none" else 0)
    last = {"activations": held.again + held.transient, "unpacked": in_backward}
    inside = {"activations": held.one_block + held.transient, "unpacked": in_backward}
    in_forward = {"gradients": gradients.at_loss, "activations": held.blocks + held.again, "unpacked": rows}

    def now(phase: str, what: str, *parts: Mapping[str, int]) -> Moment:
        return Moment(phase, what, _sum(rest, workspace, *parts))

    # FSDP2 frees the root group before the loss and gathers it again for the head's backward, unless all stays gathered. The
    # buffer in which the last block arrived is kept until the next arrives (_fsdp_param_group.py, comm_ctx.all_gather_state).
    fsdp = spec.strategy.engine is Engine.FSDP
    freed = fsdp and spec.strategy.reshard_after_forward
    root, blocks = _gathering(spec, parts)
    arrived = blocks if fsdp and spec.strategy.dp_shard > 1 else 0
    in_head = {"gathered": (root if freed else forward["gathered"]) + arrived} if fsdp else forward
    outside = in_head if peaks.inside or not freed else {"gathered": arrived}
    waiting = {line: count for line, count in lasting.items() if not (freed and line == "gathered")}
    at_loss = {"gradients": gradients.at_loss, "activations": held.saved}
    at_start = {"gradients": gradients.at_head, "activations": held.blocks}
    flowing = {line: count for line, count in peaks.between.items() if line != "gradients"}  # the head's is in `at_start`
    at_end = {"gradients": gradients.at_end}
    whole, arriving, sent = _whole_gradient(spec, parts), _fetched_head(spec, parts), _sent_copy(spec, parts)
    # Offloaded, ZeRO's staging buffers are made when the flat copy of the weights has taken their place.
    taken = {line: count for line, count in _resting(layout, "load", Home.GPU).items() if line != "staging"}
    copies = 2 if spec.strategy.dp_shard > 1 else 1  # a group of one gathers straight into its parameters
    fetched = {"gathered": copies * (root + blocks)} if fsdp else {}  # the first block is fetched ahead, and copied out too
    again = {"gathered": copies * root} if freed else {}
    # However much the forward kept, the backward frees it block by block, and the root before its gradients are reduced.
    at_first = lasting | {"gathered": root + copies * blocks} if fsdp else lasting
    ending = {} if fsdp else lasting
    return (
        Moment("load", "taking the model over", _sum(taken, _load_lines(spec, layout, parts), loading)),
        now("forward", "gathering the root", fetched, {"gradients": gradients.at_loss}),
        *([now("forward", "the rows of the last block", forward, in_forward)] if rows else []),
        *([now("forward", "fetching the head", forward, at_loss, arriving)] if arriving else []),
        now("forward", "the head", in_head, at_loss, peaks.product),
        now("forward", "the loss", outside, at_loss, peaks.forward),
        now("backward", "the gradient of the loss", waiting, at_loss, peaks.backward),
        now("backward", "gathering the root again", again, at_loss, peaks.between),
        now("backward", "the gradient of the head", lasting, at_start, {"activations": held.head}, flowing),
        *([now("backward", "the head's gradient on its way", lasting, at_start, {"gradients": sent})] if sent else []),
        now("backward", "the last block", lasting, at_start, last),
        now("backward", "the first block", at_first, at_end, inside),
        now("backward", "the gradient of the embedding", ending, at_end, {"gradients": whole}),
        now("backward", "the reduction of the last gradients", ending, at_end, gradients.shared),
        now("step", "the norm of the gradients", _norm_lines(spec, layout, parts)),
        now("step", "the update", _moving(layout, "step", Home.GPU), _step_lines(spec, layout)),
        now("save", "the export", _save_lines(spec, table)),
    )


def _coming(spec: RunSpec, table: Sequence[Parameter]) -> int:
    """Bytes of the gradients of FSDP2's largest group on their way to those of earlier micro-batches in host memory
    (_fsdp_collectives.py foreach_reduce)."""
    if spec.strategy.engine is not Engine.FSDP or spec.strategy.parameter_home is Home.GPU or spec.batch.accumulation == 1:
        return 0
    groups: dict[int, int] = {}
    for parameter in divided_table(table, spec.strategy.tp):
        groups[parameter.block] = groups.get(parameter.block, 0) + (parameter.numel if parameter.trainable else 0)
    return ceil_div(max(groups.values(), default=0), spec.strategy.dp_shard) * FP32


def host_lines(spec: RunSpec, table: Sequence[Parameter], layout: Layout, home: Home, shape: ModelShape) -> dict[str, int]:
    """Bytes by line that the rank of `layout` keeps in host memory or on NVMe, at the fullest phase, the activations that wait
    there too."""
    rest = _resting(layout, "step", home)
    if home is not Home.CPU:
        return rest
    moving = [_moving(layout, phase, home) for phase in ("load", "forward", "step", "save")]
    moving.append(_sum(_moving(layout, "backward", home), {"gradients": _coming(spec, table)}))
    waiting = activations(spec, shape).host
    return _sum(rest, max(moving, key=lambda lines: sum(lines.values())), {"activations": waiting})


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
