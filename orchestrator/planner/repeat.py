"""Longer accumulation from a short one: the trace of three micro-batches a step, with the middle one repeated.

The first micro-batch of a step finds no gradients, the last one reduces them; all between are alike. What is alive from one of
them to the next is found by looking at the last: where the middle one frees a block from before, the last frees at the same
place a block of the middle one. ZeRO-3 is settled only from the run's third micro-batch on: its first step takes the copies
from the second, if the forward of the first one's last micro-batch is like theirs. Where nothing of this holds, or something
would pile up, there is no answer.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import dataclass

from orchestrator.planner.trace import Note, Trace

SHORT = 3
"""Micro-batches in a step of the trace that is repeated: the first, a middle one, the last."""

ENOUGH = 8
"""Micro-batches in a step of the longest trace that is made: more of the same change no peak."""

PASS = ("forward", "backward")


@dataclass(frozen=True)
class _Middle:
    """One middle micro-batch: its first segment, its events as [first, last), the blocks made in it, and for each block from
    before that it frees the one of its own that the next micro-batch frees at the same place."""

    segment: int
    first: int
    last: int
    born: frozenset[int]
    heirs: Mapping[int, int]


def _starts(trace: Trace) -> list[int]:
    """Index of the first event of each segment, and of the end."""
    starts = [len(trace)] * (len(trace.segments) + 1)
    for index in range(len(trace) - 1, -1, -1):
        starts[trace.notes[trace.note[index]].segment] = index
    for segment in range(len(trace.segments) - 1, -1, -1):  # an empty segment starts where the next one does
        starts[segment] = min(starts[segment], starts[segment + 1])
    return starts


def _middles(segments: tuple[str, ...]) -> list[int]:
    """The first segment of each step's second micro-batch; empty unless every step has three."""
    found = []
    at = 0
    while at < len(segments):
        if segments[at : at + 2] != PASS:
            at += 1
            continue
        passes = 0
        while segments[at + 2 * passes : at + 2 * passes + 2] == PASS:
            passes += 1
        if passes != SHORT:
            return []
        found.append(at + 2)
        at += 2 * passes
    return found


def _middle(trace: Trace, starts: list[int], segment: int, size_of: Mapping[int, int]) -> _Middle | None:
    first, last = starts[segment], starts[segment + 2]
    born = frozenset(block for block in trace.block[first:last] if block > 0)
    heirs: dict[int, int] = {}
    for here, there in ((segment, segment + 2), (segment + 1, segment + 3)):
        alike = True
        length = min(starts[here + 1] - starts[here], starts[there + 1] - starts[there])
        for offset in range(starts[here + 1] - starts[here]):
            one, other = starts[here] + offset, starts[there] + offset
            block = trace.block[one]
            alike = alike and offset < length and _same(trace, one, other)
            if block > 0 or -block in born:
                continue
            heir = -trace.block[other] if alike else 0
            if heir not in born or size_of[heir] != size_of[-block]:
                return None
            heirs[-block] = heir
    gone = {-block for block in trace.block[first:last] if block < 0}
    return _Middle(segment, first, last, born, heirs) if born - gone == set(heirs.values()) else None


def _like_last(trace: Trace, starts: list[int], segment: int, donor: _Middle | None) -> _Middle | None:
    """`donor`, a middle micro-batch of another step that leaves nothing behind, if the forward of the one after
    `segment`, which starts from what that left, is the same; its backward may reduce at the end."""
    if donor is None or donor.heirs:
        return None
    mine, its = segment + len(PASS), donor.segment
    length = starts[mine + 1] - starts[mine]
    if length != starts[its + 1] - starts[its]:
        return None
    if not all(_same(trace, starts[mine] + offset, starts[its] + offset) for offset in range(length)):
        return None
    return donor


def _same(trace: Trace, one: int, other: int) -> bool:
    """Whether two events of two segments do the same."""
    first, second = trace.notes[trace.note[one]], trace.notes[trace.note[other]]
    kind = (trace.block[one] > 0) == (trace.block[other] > 0)
    return kind and trace.size[one] == trace.size[other] and first._replace(segment=0) == second._replace(segment=0)


def repeat(trace: Trace, extra: int) -> Trace | None:
    """The trace with `extra` more middle micro-batches in every step; None where they cannot be told from the one there is."""
    starts = _starts(trace)
    size_of = {block: size for block, size in zip(trace.block, trace.size, strict=True) if block > 0}
    places = _middles(trace.segments)
    middles: dict[int, _Middle] = {}
    for segment in reversed(places):
        middle = _middle(trace, starts, segment, size_of) or _like_last(trace, starts, segment, middles.get(places[-1]))
        if middle is None:
            return None
        middles[segment] = middle
    if not middles:
        return None
    made = _Copy(trace)
    for segment in range(len(trace.segments)):
        made.take(starts[segment], starts[segment + 1], segment)
        middle = middles.get(segment - 1)  # its backward has just been copied
        for _ in range(extra if middle is not None else 0):
            assert middle is not None
            before = {block: made.now[heir] for block, heir in middle.heirs.items()}
            for part in (middle.segment, middle.segment + 1):
                made.take(starts[part], starts[part + 1], part, before)
    return made.trace()


class _Copy:
    """A trace as it grows. `now` says which of its blocks stands for one of the source's."""

    def __init__(self, source: Trace) -> None:
        self.source = source
        self.segments: list[str] = []
        self.notes: dict[Note, int] = {}
        self.block, self.size, self.note = array("q"), array("q"), array("q")
        self.lines: dict[int, str] = {}
        self.now: dict[int, int] = {}
        self.blocks = 0

    def take(self, first: int, last: int, segment: int, before: Mapping[int, int] | None = None) -> None:
        """Append events [first, last) of `segment` as a new segment; blocks in `before` are freed as what stands there."""
        source, before = self.source, before or {}
        number = len(self.segments)
        self.segments.append(source.segments[segment])
        renumbered: dict[int, int] = {}
        for index in range(first, last):
            original, old = source.block[index], source.note[index]
            if old not in renumbered:
                note = source.notes[old]._replace(segment=number)
                renumbered[old] = self.notes.setdefault(note, len(self.notes))
            if original > 0:
                self.blocks += 1
                block = self.now[original] = self.blocks
                if original in source.lines:
                    self.lines[block] = source.lines[original]
            else:
                block = -before.get(-original, self.now[-original])
            self.block.append(block)
            self.size.append(source.size[index])
            self.note.append(renumbered[old])

    def trace(self) -> Trace:
        """What was taken."""
        return Trace(tuple(self.segments), tuple(self.notes), self.block, self.size, self.note, self.lines)
