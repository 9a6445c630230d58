"""What loops of others do otherwise than the project's engines, written into a rehearsed trace: for published runs.

The engines keep fp32 masters and take fused optimizers. Many published runs had weights, gradients and states in bf16 alone, or
torch's AdamW tensor by tensor ("foreach"), which makes one more copy of the second moments.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator

from orchestrator.planner.trace import Note, Trace
from orchestrator.spec import Engine

FP32_AT_REST = {Engine.PLAIN: ("moments",), Engine.FSDP: ("weights", "adapters", "moments"), Engine.DEEPSPEED: ("moments",)}
"""Lines that an engine keeps in fp32 where a run without masters keeps them in half precision."""


def _gradients(trace: Trace) -> set[int]:
    """The blocks that a backward makes and a step frees."""
    names = [trace.segments[note.segment] for note in trace.notes]
    made = {b for b, n in zip(trace.block, trace.note, strict=True) if b > 0 and names[n] == "backward"}
    return made & {-b for b, n in zip(trace.block, trace.note, strict=True) if b < 0 and names[n] == "step"}


def without_masters(trace: Trace, engine: Engine) -> Trace:
    """The trace of the same run with what is trained in half precision throughout: no masters, and weights at rest, moments and
    gradients of two bytes where the engine's have four. Rows of full fine-tuning and of adapters alike; under DeepSpeed the
    gradients are of two bytes as they are."""
    halved = {block for block, line in trace.lines.items() if line in FP32_AT_REST[engine]}
    if engine is not Engine.DEEPSPEED:
        halved |= _gradients(trace)
    gone = {block for block, line in trace.lines.items() if line == "master"}
    block, size, note = array("q"), array("q"), array("q")
    for number, count, index in zip(trace.block, trace.size, trace.note, strict=True):
        if abs(number) in gone:
            continue
        block.append(number)
        size.append(count // 2 if abs(number) in halved else count)
        note.append(index)
    return Trace(trace.segments, trace.notes, block, size, note, trace.lines)


def with_foreach(trace: Trace) -> Trace:
    """The trace with the square roots of all second moments, which torch's AdamW makes beside them when it goes through lists
    of tensors (torch/optim/adam.py, _multi_tensor_adam, exp_avg_sq_sqrt), in each step before the first gradient is freed."""
    sizes = dict(zip(trace.block, trace.size, strict=True))
    moments = sorted(block for block, line in trace.lines.items() if line == "moments" and block in sizes)
    wanted = [sizes[block] for block in moments[1::2]]  # each weight's first moment is made right before its second
    at = set(_ends(trace))
    made = max(trace.block, default=0)
    block, size, note = array("q"), array("q"), array("q")
    notes = list(trace.notes)
    for index in range(len(trace)):
        if index in at:
            segment = trace.notes[trace.note[index]].segment
            notes.append(Note("aten._foreach_sqrt.default", segment))
            numbers = range(made + 1, made + 1 + len(wanted))
            made += len(wanted)
            block.extend((*numbers, *(-number for number in numbers)))
            size.extend((*wanted, *wanted))
            note.extend([len(notes) - 1] * 2 * len(wanted))
        block.append(trace.block[index])
        size.append(trace.size[index])
        note.append(trace.note[index])
    return Trace(trace.segments, tuple(notes), block, size, note, trace.lines)


def _ends(trace: Trace) -> Iterator[int]:
    """For each step the event that frees its first gradient."""
    gradients = _gradients(trace)
    seen: set[int] = set()
    for index, (block, note) in enumerate(zip(trace.block, trace.note, strict=True)):
        segment = trace.notes[note].segment
        if -block in gradients and segment not in seen and trace.segments[segment] == "step":
            seen.add(segment)
            yield index
