"""The same steps in other orders: what torch's allocator keeps depends on which length came when, and a run draws its order.

Which of two samples comes first can move the reserved peak by a tenth of the card, while nothing about the run tells the order
that it will draw; so the middle of several orders is taken.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterable, Iterator

from orchestrator.planner.trace import Trace

ORDERS = 5
"""Orders that are looked at."""


def _steps(trace: Trace) -> list[tuple[int, int]]:
    """The events of each optimizer step as [first, last)."""
    segment_of = [note.segment for note in trace.notes]
    first: dict[int, int] = {}
    for index, note in enumerate(trace.note):
        first.setdefault(segment_of[note], index)
    names = trace.segments
    begins = [at for at, name in enumerate(names) if name == "forward" and names[at - 1] != "backward"]
    ends = [*begins[1:], names.index("save") if "save" in names else len(names)]

    def start(segment: int) -> int:
        return min((index for at, index in first.items() if at >= segment), default=len(trace))

    return [(start(begin), start(end)) for begin, end in zip(begins, ends, strict=True)]


def _closed(trace: Trace, first: int, last: int) -> bool:
    """Whether what is allocated in events [first, last) is freed there, and nothing else."""
    born = {block for block in trace.block[first:last] if block > 0}
    return born == {-block for block in trace.block[first:last] if block < 0}


def orders(trace: Trace, count: int = ORDERS) -> Iterator[Trace]:
    """`trace`, and then the same with its optimizer steps in other orders, `count` traces in all: the first step, which makes
    the optimizer's states, stays the first, and the last stays the last. Alone where a step in between leaves something to
    the next. They are for `allocator.replay`: their segments do not ascend."""
    yield trace
    between = _steps(trace)[1:-1]
    if len(between) < 2 or not all(_closed(trace, *step) for step in between):
        return
    begin, end = between[0][0], between[-1][1]
    for seed in range(1, count):
        parts = [(0, begin), *random.Random(seed).sample(between, len(between)), (end, len(trace))]
        block, size, note = (_joined(column, parts) for column in (trace.block, trace.size, trace.note))
        yield Trace(trace.segments, trace.notes, block, size, note, trace.lines)


def _joined(column: array[int], parts: Iterable[tuple[int, int]]) -> array[int]:
    joined = array("q")
    for first, last in parts:
        joined.extend(column[first:last])
    return joined
