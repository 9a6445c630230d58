"""What became of the rows of the data, in numbers and in a sentence."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True, slots=True)
class Report:
    """What became of the rows.

    `rows` were read = `malformed` + `unlabelled` + `dropped` + `kept`. `malformed` could not be understood, `unlabelled`
    had no learned token left, `dropped` were longer than seq_len; `truncated` and `split` are among the kept, and so are
    the `disguised`, whose words hold names of special tokens that stay plain text. The kept rows are `samples`, of `tokens`
    tokens and `labelled` learned ones; `longest` is the longest row before anything was cut, in tokens, and `highest_id`
    the largest token id.
    """

    format: str
    rows: int = 0
    kept: int = 0
    malformed: int = 0
    unlabelled: int = 0
    truncated: int = 0
    split: int = 0
    dropped: int = 0
    disguised: int = 0
    samples: int = 0
    tokens: int = 0
    labelled: int = 0
    longest: int = 0
    highest_id: int = -1

    def __add__(self, other: Report) -> Report:
        """The report of both together."""
        kinds = dict.fromkeys(kind for each in (self, other) for kind in each.format.split(", ") if kind)
        greatest = ("longest", "highest_id")
        values = {
            each.name: (max if each.name in greatest else lambda a, b: a + b)(
                getattr(self, each.name), getattr(other, each.name)
            )
            for each in fields(Report)
            if each.name != "format"
        }
        return Report(", ".join(kinds), **values)

    def sentence(self) -> str:
        """One line for the log."""
        parts = [f"{self.rows} rows ({self.format}), {self.kept} kept"]
        for count, word in (
            (self.truncated, "truncated"),
            (self.split, f"split into pieces ({self.samples} samples in all)"),
            (self.dropped, "dropped as too long"),
            (self.malformed, "skipped as malformed"),
            (self.unlabelled, "left out as their answer begins after seq_len"),
            (self.disguised, "with names of special tokens, kept as plain text"),
        ):
            if count:
                parts.append(f"{count} {word}")
        return ", ".join(parts) + f"; {self.tokens} tokens, {self.labelled} learned"
