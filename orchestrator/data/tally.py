"""What became of the rows of one pass, and the faults that follow from it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from orchestrator.data.prepared import Report
from orchestrator.data.records import place_word
from orchestrator.errors import DataError, Fault
from orchestrator.spec import Data

LISTED_CAUSES, LISTED_PLACES = 5, 5
"""Causes, and places of each, that an error lists; the rest are counted."""

KNOWN_CAUSES = 100
"""Distinct causes that are kept apart, so that a file of oddities cannot fill the memory."""


@dataclass(slots=True)
class Places:
    """How many rows, and the first few different places of them: a list may have all its rows on one line."""

    count: int = 0
    first: list[int] = field(default_factory=list)
    more: bool = False

    def add(self, place: int) -> None:
        self.count += 1
        if self.first and self.first[-1] == place:
            return
        if len(self.first) < LISTED_PLACES:
            self.first.append(place)
        else:
            self.more = True

    def told(self, rows: int, word: str) -> str:
        """ "3 of 20 rows (lines 4, 7, 9)"."""
        listed = ", ".join(map(str, self.first)) + (", ..." if self.more else "")
        return f"{self.count} of {rows} rows ({word}{'s' if len(self.first) > 1 else ''} {listed})"


@dataclass(slots=True)
class Tally:
    """Running counts; their meaning is that of `Report`. `causes` says why and where rows could not be understood."""

    rows: int = 0
    kept: int = 0
    truncated: int = 0
    dropped: int = 0
    tokens: int = 0
    labelled: int = 0
    longest: int = 0
    highest_id: int = -1
    unlabelled: Places = field(default_factory=Places)
    malformed: int = 0
    causes: dict[str, Places] = field(default_factory=dict)

    def refuse(self, cause: str, place: int) -> None:
        """Count a row that cannot be understood."""
        self.malformed += 1
        if cause in self.causes or len(self.causes) < KNOWN_CAUSES:
            self.causes.setdefault(cause, Places()).add(place)

    def keep(self, ids: Sequence[int], labelled: int, *, truncated: bool) -> None:
        """Count a row that is learned from."""
        self.kept += 1
        self.truncated += truncated
        self.tokens += len(ids)
        self.labelled += labelled
        self.highest_id = max(self.highest_id, *ids)

    def report(self, kind: str) -> Report:
        """The counts, for data of the format `kind`."""
        return Report(
            format=kind, rows=self.rows, kept=self.kept, malformed=self.malformed, unlabelled=self.unlabelled.count,
            truncated=self.truncated, dropped=self.dropped, tokens=self.tokens, labelled=self.labelled,
            longest=self.longest, highest_id=self.highest_id,
        )  # fmt: skip

    def check(self, path: Path, data: Data) -> None:
        """Pass if rows were kept, and none was met that must not be skipped.

        Raises:
            DataError: all that is wrong with the file, at once.
        """
        faults: list[Fault] = []
        if not self.rows:
            faults.append(Fault("data.path", f"{path} holds no row", "write it again, or name another file"))
        if data.on_malformed == "refuse" or not self.kept:
            faults += self._malformed_faults(path)
        if not self.kept:
            faults += self._unlabelled_faults(path, data)
        if not self.kept and self.dropped:
            lost = f"{self.dropped} are longer than seq_len {data.seq_len} and dropped"
            remedy = f"raise data.seq_len (the longest row has {self.longest} tokens), or set data.on_long=truncate"
            faults.append(Fault("data.seq_len", f"{path}: none of {self.rows} rows is left; {lost}", remedy))
        if faults:
            raise DataError(faults)

    def _malformed_faults(self, path: Path) -> list[Fault]:
        """A fault for each cause, the commonest first; the last one carries the remedy."""
        word = place_word(path)
        causes = sorted(self.causes.items(), key=lambda item: -item[1].count)
        faults = [
            Fault("data.path", f"{path}: {places.told(self.rows, word)}: {cause}") for cause, places in causes[:LISTED_CAUSES]
        ]
        if rest := self.malformed - sum(places.count for _, places in causes[:LISTED_CAUSES]):
            faults.append(Fault("data.path", f"{path}: {rest} more rows for other causes"))
        if faults:
            remedy = "mend these rows" + (", or set data.on_malformed=skip to leave them out" if self.kept else "")
            faults[-1] = replace(faults[-1], remedy=remedy)
        return faults

    def _unlabelled_faults(self, path: Path, data: Data) -> Iterator[Fault]:
        if self.unlabelled.count:
            where = self.unlabelled.told(self.rows, place_word(path))
            problem = f"{path}: {where}: every label is masked, because the answer begins after seq_len {data.seq_len}"
            yield Fault("data.seq_len", problem, f"raise data.seq_len (the longest row has {self.longest} tokens)")
