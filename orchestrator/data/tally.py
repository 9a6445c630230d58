"""What became of the rows of each file, and the faults that follow from it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from orchestrator.data.encode import Shard
from orchestrator.data.report import Report
from orchestrator.errors import DataError, Fault
from orchestrator.spec import Data

LISTED_CAUSES, LISTED_PLACES, LISTED_FAULTS = 5, 5, 8
"""Causes, places of each, and faults of all files together that an error lists; the rest are counted."""

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
    """Running counts of one file; their meaning is that of `Report`. `causes` says why and where rows were not understood."""

    name: str
    kind: str
    place_word: str
    report: Report = field(default_factory=lambda: Report(""))
    unlabelled: Places = field(default_factory=Places)
    causes: dict[str, Places] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.report = Report(self.kind)

    def add(self, shard: Shard) -> None:
        """Count what became of one chunk of the file."""
        for cause, place in shard.refused:
            if cause in self.causes or len(self.causes) < KNOWN_CAUSES:
                self.causes.setdefault(cause, Places()).add(place)
        for place in shard.unlabelled:
            self.unlabelled.add(place)
        self.report += Report(
            format=self.kind, rows=shard.rows, kept=shard.kept, malformed=len(shard.refused),
            unlabelled=len(shard.unlabelled), truncated=shard.truncated, split=shard.split, dropped=shard.dropped,
            disguised=shard.disguised, samples=len(shard.lengths), tokens=len(shard.ids), labelled=int(shard.labelled.sum()),
            longest=int(shard.whole.max(initial=0)), highest_id=int(shard.ids.max(initial=-1)),
        )  # fmt: skip

    def faults(self, data: Data) -> Iterator[Fault]:
        """Why this file cannot be used as it is; none where rows were kept and no other must be said no to."""
        report = self.report
        if not report.rows:
            yield Fault("data.path", f"{self.name} holds no row", "write it again, or name another file")
        if data.on_malformed == "refuse" or not report.kept:
            yield from self._malformed_faults()
        if not report.kept and self.unlabelled.count:
            where = self.unlabelled.told(report.rows, self.place_word)
            problem = f"{self.name}: {where}: every label is masked, because the answer begins after seq_len {data.seq_len}"
            yield Fault("data.seq_len", problem, f"raise data.seq_len (the longest row has {report.longest} tokens)")
        if not report.kept and report.dropped:
            lost = f"{report.dropped} are longer than seq_len {data.seq_len} and dropped"
            remedy = f"raise data.seq_len (the longest row has {report.longest} tokens), or set data.on_long=truncate"
            yield Fault("data.seq_len", f"{self.name}: none of {report.rows} rows is left; {lost}", remedy)

    def _malformed_faults(self) -> list[Fault]:
        """A fault for each cause, the commonest first; the last one carries the remedy."""
        rows = self.report.rows
        causes = sorted(self.causes.items(), key=lambda item: -item[1].count)
        faults = [
            Fault("data.path", f"{self.name}: {places.told(rows, self.place_word)}: {cause}")
            for cause, places in causes[:LISTED_CAUSES]
        ]
        if rest := self.report.malformed - sum(places.count for _, places in causes[:LISTED_CAUSES]):
            faults.append(Fault("data.path", f"{self.name}: {rest} more rows for other causes"))
        if faults:
            remedy = "mend these rows" + (", or set data.on_malformed=skip to leave them out" if self.report.kept else "")
            faults[-1] = replace(faults[-1], remedy=remedy)
        return faults


def check(tallies: Sequence[Tally], data: Data, faults: Sequence[Fault] = ()) -> None:
    """Pass if every file can be used as `data` says, and none of `faults` was met before.

    Raises:
        DataError: all that is wrong, at once, the first few of many.
    """
    lenient = data.on_malformed == "skip" and any(tally.report.kept for tally in tallies)
    found = [*faults, *(fault for tally in tallies if not lenient for fault in tally.faults(data))]
    if len(found) > LISTED_FAULTS:
        rest = len(found) - LISTED_FAULTS
        found = [*found[:LISTED_FAULTS], Fault("data.path", f"and {rest} more of the {len(tallies)} files", "mend the first")]
    if found:
        raise DataError(found)
