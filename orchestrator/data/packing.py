"""Best-fit packing: documents put together into rows of one length, each document whole."""

from __future__ import annotations

from bisect import bisect_left, insort

import numpy as np
import numpy.typing as npt

from orchestrator.units import ceil_div

Counts = npt.NDArray[np.int64]


def best_fit(lengths: Counts, capacity: int) -> tuple[Counts, Counts]:
    """(starts, members): row r holds the documents members[starts[r] : starts[r + 1]], and no document is split.

    Best-fit decreasing: the longest document first, each into the row with the least room that still takes it. Documents of
    one length are placed together, so the work grows with the number of different lengths, not with that of documents.
    The result depends on `lengths` (each from 1 to `capacity`) and `capacity` alone.
    """
    if not len(lengths):
        return np.zeros(1, dtype=np.int64), np.zeros(0, dtype=np.int64)
    assert 0 < lengths.min() <= lengths.max() <= capacity, "documents are cut to the length of a row before"
    by_length = np.argsort(-lengths, kind="stable")
    shelf = _Shelf(capacity)
    changes = np.flatnonzero(np.diff(lengths[by_length])) + 1
    rows = np.concatenate([shelf.place(int(lengths[equal[0]]), len(equal)) for equal in np.split(by_length, changes)])
    starts = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=shelf.made))]).astype(np.int64)
    return starts, by_length[np.argsort(rows, kind="stable")]


class _Shelf:
    """The rows so far, by the room that is left in them; a full row leaves the shelf."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.made = capacity, 0
        self._rows: dict[int, list[Counts]] = {}
        self._rooms: list[int] = []

    def place(self, length: int, count: int) -> Counts:
        """The rows that `count` documents of `length` go into, one after the other."""
        placed: list[Counts] = []
        while count:
            at = bisect_left(self._rooms, length)
            room = self._rooms[at] if at < len(self._rooms) else self.capacity
            # The row that has just taken one has the least room of those that still take another.
            each = room // length
            rows = self._take(room, ceil_div(count, each)) if at < len(self._rooms) else self._open(ceil_div(count, each))
            chosen = np.repeat(rows, each)[:count]
            whole, rest = divmod(len(chosen), each)
            self._put(rows[:whole], room - each * length)
            self._put(rows[whole:], room - rest * length)
            placed.append(chosen)
            count -= len(chosen)
        return np.concatenate(placed)

    def _put(self, rows: Counts, room: int) -> None:
        if len(rows) and room:
            if room not in self._rows:
                insort(self._rooms, room)
            self._rows.setdefault(room, []).append(rows)

    def _take(self, room: int, most: int) -> Counts:
        """At most `most` of the rows with `room`, off the shelf."""
        rows = self._rows[room].pop()
        if not self._rows[room]:
            del self._rows[room]
            self._rooms.remove(room)
        self._put(rows[most:], room)
        return rows[:most]

    def _open(self, count: int) -> Counts:
        """`count` new rows."""
        self.made += count
        return np.arange(self.made - count, self.made, dtype=np.int64)
