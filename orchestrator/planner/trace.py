"""A trace: the allocations and frees of a run in order, kept in three integer columns."""

from __future__ import annotations

import base64
import zlib
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

NO_LAYER = -1
"""`Note.layer` of what belongs to no transformer block."""


class Note(NamedTuple):
    """What many events share: the operation, the segment (an index into `Trace.segments`), the transformer block at work or
    `NO_LAYER`, the number of the stream, and the home ("gpu" or "cpu"; "gpu" is the memory of the device that computes)."""

    op: str
    segment: int
    layer: int = NO_LAYER
    stream: int = 0
    home: str = "gpu"


class Event(NamedTuple):
    """`block` > 0 is allocated; a negative one frees `-block`. `bytes` as requested, not rounded."""

    block: int
    bytes: int
    note: Note


class Living(NamedTuple):
    """`blocks` blocks of together `bytes` that were alive at a peak: made by `op` in `phase`, under `line` of the Ledger."""

    line: str
    phase: str
    op: str
    bytes: int
    blocks: int


def _pack(column: array[int]) -> str:
    return base64.b85encode(zlib.compress(column.tobytes(), 1)).decode()


def _unpack(text: str) -> array[int]:
    column = array("q")
    column.frombytes(zlib.decompress(base64.b85decode(text)))
    return column


@dataclass(frozen=True)
class Trace:
    """What happened, event by event.

    Attributes:
        segments: the phases in the order in which they ran: "load", "forward", "backward", "step", "forward", …, "save".
        notes: the distinct notes, which `note` indexes.
        block: block numbers from 1 on, each allocated once; negative where that block is freed.
        size: bytes requested.
        note: index into `notes`.
        lines: block number to line of the Ledger, for the blocks that a census named.
    """

    segments: tuple[str, ...]
    notes: tuple[Note, ...]
    block: array[int]
    size: array[int]
    note: array[int]
    lines: Mapping[int, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.block)

    def __iter__(self) -> Iterator[Event]:
        notes = self.notes
        for block, size, note in zip(self.block, self.size, self.note, strict=True):
            yield Event(block, size, notes[note])

    def settled(self) -> Trace:
        """The same with the frees between two allocations in the order in which their blocks were made.

        Libraries free what they keep in sets, whose order differs from run to run. What an allocator holds after several frees
        does not depend on their order: neighbours that are free become one.
        """
        block, note = self.block, self.note
        columns = (block[:], self.size[:], note[:])
        segment = [one.segment for one in self.notes]
        made: dict[int, int] = {}
        first, count = 0, len(block)
        while first < count:
            if block[first] > 0:
                made[block[first]] = first
                first += 1
                continue
            last = first + 1
            while last < count and block[last] < 0 and segment[note[last]] == segment[note[first]]:
                last += 1
            if last - first > 1:
                order = sorted(range(first, last), key=lambda index: made[-block[index]])
                for column in columns:
                    column[first:last] = array("q", [column[index] for index in order])
            first = last
        return Trace(self.segments, self.notes, *columns, self.lines)

    def peaks(self, home: str | None = "gpu") -> dict[str, int]:
        """Largest sum of living bytes while each phase ran, in `home` (None: everywhere); repeats of a phase count together."""
        highest: dict[str, int] = {}
        held, segment = 0, -1
        for event in self:
            if event.note.segment != segment:  # what is held on entering a phase counts in it, even if it allocates nothing
                for index in range(segment + 1, event.note.segment + 1):
                    phase = self.segments[index]
                    highest[phase] = max(highest.get(phase, 0), held)
                segment = event.note.segment
            if home is None or event.note.home == home:
                held += event.bytes if event.block > 0 else -event.bytes
                phase = self.segments[segment]
                if held > highest[phase]:
                    highest[phase] = held
        for phase in self.segments[segment + 1 :]:
            highest[phase] = max(highest.get(phase, 0), held)
        return highest

    def peak(self, home: str | None = "gpu") -> int:
        """Largest sum of living bytes in `home` (None: everywhere)."""
        return max(self.peaks(home).values(), default=0)

    def peak_position(self, home: str | None = "gpu", phase: str | None = None) -> int:
        """Index of the event that reached the peak (of `phase`, where given) first; -1 if nothing was allocated."""
        # Columns and tables by note, not events: a trace has hundreds of thousands of them.
        counts = [home is None or note.home == home for note in self.notes]
        asked = [phase in (None, self.segments[note.segment]) for note in self.notes]
        held, highest, at = 0, 0, -1
        for index, (block, size, note) in enumerate(zip(self.block, self.size, self.note, strict=True)):
            if not counts[note]:
                continue
            if block < 0:
                held -= size
                continue
            held += size
            if held > highest and asked[note]:
                highest, at = held, index
        return at

    def living(self, position: int, home: str | None = "gpu") -> tuple[Living, ...]:
        """What was alive right after event number `position`, largest first."""
        alive: dict[int, tuple[int, int]] = {}
        for block, size, index in zip(
            self.block[: position + 1], self.size[: position + 1], self.note[: position + 1], strict=True
        ):
            if block > 0:
                alive[block] = (size, index)
            else:
                alive.pop(-block, None)
        sizes: Counter[tuple[str, str, str]] = Counter()
        counts: Counter[tuple[str, str, str]] = Counter()
        for block, (size, index) in alive.items():
            note = self.notes[index]
            if home is None or note.home == home:
                phase = self.segments[note.segment]
                key = (self.line_of(block, note), phase, note.op)
                sizes[key] += size
                counts[key] += 1
        return tuple(Living(*key, size, counts[key]) for key, size in sizes.most_common())

    def line_of(self, block: int, note: Note) -> str:
        """The Ledger's line of a block: the one that the census gave it, else by the phase that made it."""
        named = self.lines.get(block)
        return named if named is not None else UNNAMED.get(self.segments[note.segment], "temporary")

    def to_json(self) -> dict[str, Any]:
        """Plain data; the columns compressed. Inverse: `from_json`."""
        return {
            "segments": list(self.segments),
            "notes": [list(note) for note in self.notes],
            "block": _pack(self.block),
            "size": _pack(self.size),
            "note": _pack(self.note),
            "lines": {str(block): line for block, line in self.lines.items()},
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Trace:
        return cls(
            tuple(data["segments"]),
            tuple(Note(*note) for note in data["notes"]),
            _unpack(data["block"]),
            _unpack(data["size"]),
            _unpack(data["note"]),
            {int(block): line for block, line in data["lines"].items()},
        )


UNNAMED = {"load": "load", "forward": "activations", "backward": "backward", "step": "temporary", "save": "save"}
"""Line of a block that no census named, by the phase that made it. "backward" holds gradients on their way and recomputed
activations; "load" what is made while sharding and filling."""
