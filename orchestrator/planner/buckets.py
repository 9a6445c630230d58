"""ZeRO-3's reduce bucket over more layers than were traced.

Gradients gather in a bucket that is emptied when the next one would not fit: what the backward allocates then depends on a sum
over the layers. While a few layers are traced none is emptied before the end. A home of its own, `BUCKET`, holds a mark for
each gradient in it (as many "bytes" as it has elements), so that splicing repeats the marks like everything else; from the
marks of the whole depth `emptied_in_time` tells when the bucket would have been full.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass

from orchestrator.planner.trace import Trace
from orchestrator.planner.tracer import Tracer

BUCKET = "bucket"
"""Home and operation of the marks."""


class Marks:
    """What `deepspeed_alone.listen_to_buckets` tells, as marks in the trace of `tracer`."""

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer
        self._held: list[tuple[int, int]] = []

    def filled(self, elements: int) -> None:
        """A gradient of so many elements goes into the bucket."""
        self._held.append((self._tracer.mark(elements, BUCKET), elements))

    def emptied(self) -> None:
        """The bucket is about to be reduced and emptied."""
        for block, elements in self._held:
            self._tracer.unmark(block, elements, BUCKET)
        self._held.clear()


@dataclass(frozen=True)
class _Emptying:
    """One emptying: index of the event that makes the flat copy of the bucket and of the one that frees it, and the elements of
    the gradients in the bucket, in the order in which they came."""

    made: int
    freed: int
    elements: tuple[int, ...]


def _emptyings(trace: Trace, width: int) -> Iterator[_Emptying | None]:
    """Every emptying in order; None where it does more than make and free one flat copy of `width` bytes an element."""
    marks = [note.home == BUCKET for note in trace.notes]
    inside: list[int] = []
    gone = 0
    for index, (block, size, note) in enumerate(zip(trace.block, trace.size, trace.note, strict=True)):
        if marks[note]:
            if block > 0:
                inside.append(size)
            else:
                gone += 1
        elif gone and block > 0:
            whole = gone == len(inside) > 1 and size == sum(inside) * width
            freed = _free_of(trace, index) if whole else None
            yield _Emptying(index, freed, tuple(inside)) if freed is not None else None
            inside, gone = [], 0
    if inside:
        yield None


def _free_of(trace: Trace, made: int) -> int | None:
    """The event that frees what `made` allocates, if nothing is allocated before it."""
    for index in range(made + 1, len(trace)):
        if trace.block[index] > 0:
            return None
        if trace.block[index] == -trace.block[made]:
            return index
    return None


def emptied_in_time(trace: Trace, most: int, width: int) -> Trace | None:
    """The trace without marks, its bucket emptied whenever the next gradient would make it hold more than `most` elements.

    Emptying makes one flat copy of the bucket, `width` bytes an element, and frees it (deepspeed/runtime/zero/stage3.py,
    reduce_independent_p_g_buckets_and_remove_grads; runtime/comm/coalesced_collectives.py, reduce_scatter_coalesced). None
    where the traced emptyings do anything else.
    """
    emptyings = list(_emptyings(trace, width))
    if any(one is None for one in emptyings):
        return None
    rest = iter([one for one in emptyings if one is not None])
    current = next(rest, None)
    marks = [note.home == BUCKET for note in trace.notes]
    block, size, note = array("q"), array("q"), array("q")
    new = max(trace.block, default=0)
    inside: list[int] = []
    for index, (number, bytes_, kind) in enumerate(zip(trace.block, trace.size, trace.note, strict=True)):
        if marks[kind]:
            if number < 0:
                continue
            if current is None:
                return None
            if inside and sum(inside) + bytes_ > most:
                if len(inside) == 1:
                    return None  # one gradient alone is reduced where it lies
                new += 1
                block.extend((new, -new))
                size.extend([sum(inside) * width] * 2)
                note.extend((trace.note[current.made], trace.note[current.freed]))
                inside = []
            inside.append(bytes_)
            continue
        block.append(number)
        note.append(kind)
        if current is not None and index in (current.made, current.freed):
            if len(inside) == 1:
                return None
            size.append(sum(inside) * width)
            if index == current.freed:
                current, inside = next(rest, None), []
        else:
            size.append(bytes_)
    return Trace(trace.segments, trace.notes, block, size, note, trace.lines)
