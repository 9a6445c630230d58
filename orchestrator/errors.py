"""The errors that a person can meet, each with its exit code.

    OrchestratorError                 1
    ├── ConfigError (ValueError)      2   one or more faults of the configuration, reported together
    ├── DataError (ValueError)        2   the data files: what, where, how many, what to do
    ├── ModelError (ValueError)       2   the model folder or hub id
    ├── MisfitError                   3   the plan says that the run does not fit
    ├── CheckpointError               4   saving, resuming or exporting
    └── LayoutDrift                   5   the live tensors are not what the Layout says: our own bug, or a new library version

A message names the field, the numbers and the remedy, and fits on one screen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

COLUMNS, ROWS = 100, 30
"""What is counted as a screen: a report takes so many rows below its title, where one fault does not already."""

LETTERS = 1500
"""Of one fault at most: somebody's value may be a whole file."""


def _rows(text: str) -> int:
    return sum(1 + (len(line) + 1) // COLUMNS for line in text.splitlines())


def _within(text: str, letters: int) -> str:
    """`text`, its middle left out where it has more than so many letters."""
    return text if len(text) <= letters else f"{text[: letters // 2]} … {text[-letters // 2 :]}"


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that is wrong: the `field` (a config key, file or line), what is wrong with its numbers, and the remedy."""

    field: str
    problem: str
    remedy: str = ""

    def __str__(self) -> str:
        text = f"{self.field}: {self.problem}"
        return f"{text}\n    -> {self.remedy}" if self.remedy else text


class OrchestratorError(Exception):
    """Base of every error that is reported without a traceback. Carries all its faults."""

    exit_code = 1
    title = "error"

    def __init__(self, faults: Sequence[Fault] | Fault | str) -> None:
        if isinstance(faults, str):
            faults = Fault("", faults)
        self.faults: tuple[Fault, ...] = (faults,) if isinstance(faults, Fault) else tuple(faults)
        super().__init__(self.report())

    def report(self) -> str:
        """The whole message for a terminal: a title line, then one paragraph for each fault, as many as fit on a screen."""
        count = f" ({len(self.faults)} faults)" if len(self.faults) > 1 else ""
        paragraphs = [_within(str(fault).removeprefix(": "), LETTERS) for fault in self.faults]
        shown = [text for place, text in enumerate(paragraphs) if sum(map(_rows, paragraphs[: place + 1])) <= ROWS or not place]
        rest = len(paragraphs) - len(shown)
        more = [f"… and {rest} more, which are told when these are mended"] if rest else []
        body = "\n".join(f"  {text}" for text in (*shown, *more))
        return f"{self.title}{count}\n{body}"


class ConfigError(OrchestratorError, ValueError):
    exit_code = 2
    title = "The configuration cannot be used"


class DataError(OrchestratorError, ValueError):
    exit_code = 2
    title = "The data cannot be used"


class ModelError(OrchestratorError, ValueError):
    exit_code = 2
    title = "The model cannot be used"


class MisfitError(OrchestratorError):
    exit_code = 3
    title = "The run does not fit"


class CheckpointError(OrchestratorError):
    exit_code = 4
    title = "The checkpoint cannot be used"


class LayoutDrift(OrchestratorError):
    exit_code = 5
    title = "The live tensors are not what the layout says"
