"""What the heads of the recipe files promise, for the tests that hold them to it."""

from __future__ import annotations

import re
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "conf" / "recipe"


def heads() -> dict[str, str]:
    """What the head of each recipe says, in one line, by its name."""
    found = {}
    for file in sorted(FOLDER.glob("*.yaml")):
        lines = [line[1:].strip() for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
        found[file.stem] = " ".join(lines)
    return found


def ways_out() -> dict[str, tuple[bool, list[list[str]]]]:
    """By recipe (whether it is about host memory, what to change where it needs too much: one change after the other, of each
    its alternatives)."""
    found = {}
    for name, head in heads().items():
        said = re.search(r"Too much( for the host)?[^:]*: (.*)\.$", head)
        if said:
            found[name] = (bool(said[1]), [step.split(", or ") for step in said[2].split(", then ")])
    return found


def second_runs() -> dict[str, tuple[list[str], str]]:
    """By recipe, of those that go on with a second run: (what to type, with RUN/export for the first run's; predicted GiB)."""
    found = {}
    for name, head in heads().items():
        then = re.search(r"Then more, [^(]*\(([\d.]+) GiB\): (.*?)\. ", head)
        if then:
            found[name] = (then[2].split(), then[1])
    return found
