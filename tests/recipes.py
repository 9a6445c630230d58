"""What the heads of the recipe files promise, for the tests that hold them to it."""

from __future__ import annotations

import re
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "conf" / "recipe"


def second_runs() -> dict[str, tuple[list[str], str]]:
    """By recipe, of those that go on with a second run: (what to type, with RUN/export for the first run's; predicted GiB)."""
    found = {}
    for file in sorted(FOLDER.glob("*.yaml")):
        head = " ".join(line[1:].strip() for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("#"))
        then = re.search(r"Then more, [^(]*\(([\d.]+) GiB\): (.*?)\. ", head)
        if then:
            found[file.stem] = (then[2].split(), then[1])
    return found
