"""Splicing: from the traces of a model with n and n + 1 equal layers to the trace of the same model with any number of them.

Where the deeper trace has events that the shallower one lacks, they are one more copy of what stands right before them: one
more layer in a sweep through the layers. Repeating that copy gives any depth. A freed block is found again by its class (the
place in the layer where it was made): sweeps free either the newest of its class (backward) or the oldest (the next step).
Everything is checked on the two traces at hand, and where a check fails there is no answer, so that the caller traces the
whole depth: a strategy whose events depend on sums over the layers (flat buckets, ZeRO-3's thresholds) is not spliced.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from orchestrator.planner.trace import Trace

WINDOW = 12
"""Events after a difference that are compared to tell the length of one more layer."""


class Token(NamedTuple):
    """What an event must share with its counterpart in another layer or at another depth; `born` is the segment in which a
    freed block was made."""

    frees: bool
    op: str
    bytes: int
    stream: int
    home: str
    born: int


class _Step(NamedTuple):
    """Event number `at` of the deeper trace, `growth` bytes larger for each further layer; or `length` > 1 events from `at`
    on, which are one layer's share."""

    at: int
    growth: int = 0
    length: int = 0


@dataclass
class _Reading:
    """A trace with its events as tokens and its segments as ranges."""

    trace: Trace
    tokens: list[Token]
    origin: dict[int, int]
    """Block number to the index of the event that allocated it."""
    ranges: list[tuple[int, int]]

    @classmethod
    def of(cls, trace: Trace) -> _Reading:
        origin: dict[int, int] = {}
        tokens: list[Token] = []
        starts = [len(trace)] * (len(trace.segments) + 1)
        for index, (block, size, note) in enumerate(trace):
            for segment in range(note.segment, -1, -1):
                if starts[segment] <= index:
                    break
                starts[segment] = index
            if block > 0:
                origin[block] = index
                tokens.append(Token(False, note.op, size, note.stream, note.home, note.segment))
            else:
                made = tokens[origin[-block]]
                tokens.append(Token(True, made.op, size, made.stream, made.home, made.born))
        return cls(trace, tokens, origin, list(pairwise(starts)))


def _align(shallow: Sequence[Token], deeper: Sequence[Token], offset: int) -> list[_Step] | None:
    """How the deeper segment (whose first event is number `offset`) follows from the shallower; None if it does not."""
    steps: list[_Step] = []
    i = j = 0
    while i < len(shallow) or j < len(deeper):
        if i < len(shallow) and j < len(deeper) and shallow[i] == deeper[j]:
            steps.append(_Step(offset + j))
            i, j = i + 1, j + 1
            continue
        extra = _one_layer(shallow, deeper, i, j)
        if extra:
            steps.append(_Step(offset + j, 0, extra))
            j += extra
        elif i < len(shallow) and j < len(deeper) and shallow[i]._replace(bytes=deeper[j].bytes) == deeper[j]:
            steps.append(_Step(offset + j, deeper[j].bytes - shallow[i].bytes))
            i, j = i + 1, j + 1
        else:
            return None
    return steps


def _one_layer(shallow: Sequence[Token], deeper: Sequence[Token], i: int, j: int) -> int:
    """Length of the copy of a layer that stands at `j` of the deeper segment and is missing at `i` of the other; 0: none.

    It repeats what stands right before it. Of several lengths, the one after which most events agree is taken, then the
    shortest; sizes may differ there, for they may grow with the depth.
    """
    best, length_of_best = 0, 0
    for length in range(1, min(j, len(deeper) - j) + 1):
        if deeper[j : j + length] != deeper[j - length : j]:
            continue
        left, right = deeper[j + length : j + length + WINDOW], shallow[i : i + WINDOW]
        if not left and not right:
            return length
        agree = 0
        for one, other in zip(left, right, strict=False):
            if one._replace(bytes=other.bytes) != other:
                break
            agree += 2 if one == other else 1
        if agree > best:
            best, length_of_best = agree, length
    return length_of_best


def _settle(reading: _Reading, plan: Sequence[_Step]) -> tuple[list[_Step], list[int]]:
    """The plan with each layer's share taken from the middle of its sweep, and for each event its place in the layer.

    The copy that the alignment finds is the last of the sweep, and the ends of a sweep touch what lies outside the layers. The
    place is equal for the copies of one event and different for all others.
    """
    place = list(range(len(reading.tokens)))
    start_of = {index: first for first, last in reading.ranges for index in range(first, last)}
    settled: list[_Step] = []
    done = 0
    for step in plan:
        if not step.length:
            settled.append(step)
            continue
        end, length, first = step.at + step.length, step.length, step.at
        floor = max(done, start_of[step.at])
        while first > floor and reading.tokens[first - 1] == reading.tokens[first - 1 + length]:
            first -= 1
        for index in range(end - length - 1, first - 1, -1):
            place[index] = place[index + length]
        back = (end - first) // length // 2 * length
        if back:
            del settled[-back:]
        settled.append(_Step(step.at - back, 0, length))
        settled += [_Step(index) for index in range(step.at - back + length, end)]
        done = end
    return settled, place


def _choices(reading: _Reading, place: Sequence[int]) -> dict[int, bool] | None:
    """For each event that frees: whether it takes the newest of its class (True) or the oldest; None if it is neither."""
    alive: dict[int, list[int]] = {}
    possible: dict[tuple[int, int], set[bool]] = {}
    frees: list[tuple[int, tuple[int, int]]] = []
    for index, block in enumerate(reading.trace.block):
        if block > 0:
            alive.setdefault(place[index], []).append(block)
            continue
        kind = place[reading.origin[-block]]
        mates = alive[kind]
        found = {True} if mates[-1] == -block else set()
        if mates[0] == -block:
            found.add(False)
        mates.remove(-block)
        key = (place[index], kind)
        possible[key] = possible.get(key, {True, False}) & found
        frees.append((index, key))
    if any(not choice for choice in possible.values()):
        return None
    return {index: True in possible[key] for index, key in frees}


def _repeated(plan: Sequence[_Step], copies: int) -> Iterator[_Step]:
    for step in plan:
        if not step.length:
            yield step
            continue
        for _ in range(copies):
            for index in range(step.at, step.at + step.length):
                yield _Step(index)


def splice(shallow: Trace, deeper: Trace, extra: int) -> Trace | None:
    """The trace with `extra` more layers than `shallow`; `deeper` has one more. None where it cannot be told from the two."""
    if shallow.segments != deeper.segments:
        return None
    before, after = _Reading.of(shallow), _Reading.of(deeper)
    plan: list[_Step] = []
    for (a, b), (c, d) in zip(before.ranges, after.ranges, strict=True):
        steps = _align(before.tokens[a:b], after.tokens[c:d], c)
        if steps is None:
            return None
        plan += steps
    plan, place = _settle(after, plan)
    newest = _choices(after, place)
    if newest is None:
        return None
    block, size, note = array("q"), array("q"), array("q")
    lines: dict[int, str] = {}
    alive: dict[int, deque[tuple[int, int]]] = {}
    made = 0
    for step in _repeated(plan, extra):
        original = deeper.block[step.at]
        note.append(deeper.note[step.at])
        if original > 0:
            made += 1
            bytes_ = deeper.size[step.at] + step.growth * (extra - 1)
            alive.setdefault(place[step.at], deque()).append((made, bytes_))
            block.append(made)
            size.append(bytes_)
            if original in deeper.lines:
                lines[made] = deeper.lines[original]
            continue
        mates = alive.get(place[after.origin[-original]])
        if not mates:
            return None
        freed, bytes_ = mates.pop() if newest[step.at] else mates.popleft()
        block.append(-freed)
        size.append(bytes_)
    return Trace(deeper.segments, deeper.notes, block, size, note, lines)
