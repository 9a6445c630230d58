"""The Ledger: bytes by phase, line and home; the one form in which memory is predicted, measured and compared."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

PHASES = ("load", "forward", "backward", "step", "save")
"""The phases of a run, in order. A row at rest carries the phase from which it exists."""


@dataclass(frozen=True, slots=True)
class Entry:
    """`bytes` held in `home` ("gpu" | "cpu" | "nvme") under the name `line` during `phase`."""

    phase: str
    line: str
    home: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Ledger:
    """The entries of one card (rank). Immutable; sums are computed, never stored."""

    rank: int
    entries: tuple[Entry, ...]

    def total(self, phase: str | None = None, home: str | None = None) -> int:
        """Sum of bytes, of one `phase` and one `home` where given."""
        return sum(e.bytes for e in self.entries if phase in (None, e.phase) and home in (None, e.home))

    def lines(self, phase: str | None = None, home: str | None = None) -> dict[str, int]:
        """Bytes by line, in the order of first appearance."""
        totals: dict[str, int] = {}
        for entry in self.entries:
            if phase in (None, entry.phase) and home in (None, entry.home):
                totals[entry.line] = totals.get(entry.line, 0) + entry.bytes
        return totals

    def to_json(self) -> dict[str, object]:
        return {
            "rank": self.rank,
            "entries": [{"phase": e.phase, "line": e.line, "home": e.home, "bytes": e.bytes} for e in self.entries],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, object]) -> Ledger:
        """Inverse of `to_json`. Raises KeyError or TypeError for anything else."""
        entries = data["entries"]
        if not isinstance(entries, Iterable):
            raise TypeError("entries of a ledger must be a list")
        return cls(int(str(data["rank"])), tuple(Entry(**entry) for entry in entries))
