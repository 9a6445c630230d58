"""Hold predictions against published measurements: `python benchmarks/memory/score.py FILE.csv [--json] [--basis layout]`.

Predicts every row of quality A or B that a run of this project can express, says which it cannot and why, and prints the
median, ninth decile and worst error by source."""

from __future__ import annotations

import argparse
import contextlib
import csv
import importlib.util
import json
import statistics
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

if importlib.util.find_spec("orchestrator") is None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from orchestrator.config import compose
from orchestrator.errors import OrchestratorError
from orchestrator.planner.plan import LAYOUT, Plan
from orchestrator.planner.planning import ASKED, AUTO, BASES, WORKERS
from orchestrator.planner.predict import by_layout
from orchestrator.planner.programme import Programme
from orchestrator.planner.published import FITS, QUALITIES
from orchestrator.planner.published_score import Score, score
from orchestrator.planner.rehearsal import RehearsalError
from orchestrator.planner.warm import warm
from orchestrator.report.progress import progress
from orchestrator.spec import RunSpec


def decile(errors: Sequence[float]) -> float:
    """The ninth decile: nine of ten errors are at most as large."""
    ordered = sorted(errors)
    return ordered[max(0, -(-9 * len(ordered) // 10) - 1)]


def read(path: Path) -> list[dict[str, str]]:
    """The rows of quality A or B, each with an id; all of a file that does not grade its rows. What stands between them may be
    commas, semicolons or tabs.

    Raises:
        OSError: it cannot be read.
    """
    text = path.read_text(encoding="utf-8-sig", errors="replace")
    head = text.partition("\n")[0]
    between = max(",;\t", key=head.count)
    reader = csv.DictReader(text.splitlines(keepends=True), delimiter=between)
    columns = [name.strip().lower() for name in reader.fieldnames or ()]
    rows = [dict(zip(columns, (cell or "" for cell in row.values()), strict=False)) for row in reader]
    graded = "quality" in columns
    kept = [row for row in rows if not graded or row["quality"].strip() in QUALITIES]
    return [row | {"id": row.get("id", "").strip() or f"row-{number}"} for number, row in enumerate(kept, start=1)]


def scores(rows: Sequence[Mapping[str, str]], basis: str) -> tuple[list[Score], list[tuple[str, str]]]:
    """(the predictions, (id, reason) of the rows without one)."""
    base = compose(["model=tiny"])
    made: list[Score] = []
    left: list[tuple[str, str]] = []
    with contextlib.ExitStack() as stack:
        advance = stack.enter_context(progress("score"))
        rehearse = stack.enter_context(warm()) if basis != LAYOUT else None
        pool = stack.enter_context(ThreadPoolExecutor(WORKERS if rehearse else 1))

        def perform(spec: RunSpec, programme: Programme) -> Plan:
            return rehearse(spec, ASKED, programme) if rehearse else by_layout(spec)

        def one(row: Mapping[str, str]) -> Score | str:
            try:
                return score(row, base, basis, perform)
            except RehearsalError as error:
                return f"the rehearsal failed: {str(error).splitlines()[-1]}"
            except (OrchestratorError, ArithmeticError, AssertionError, LookupError, ValueError) as error:
                return f"the planner cannot lay it out: {type(error).__name__} {str(error).strip().splitlines()[-1:]}"

        for done, (row, found) in enumerate(zip(rows, pool.map(one, rows), strict=True), start=1):
            if isinstance(found, Score):
                made.append(found)
            else:
                left.append((row["id"], found))
            advance(done, len(rows), row["id"])
    return made, left


def summary(name: str, made: Iterable[Score]) -> dict[str, object]:
    """Median, ninth decile and worst of the absolute errors, the median of the signed ones, and fit/no-fit."""
    measured = [item for item in made if item.meter != FITS]
    bounds = [item for item in made if item.meter == FITS]
    errors = [abs(item.error) for item in measured]
    worst = max(measured, key=lambda item: abs(item.error), default=None)
    return {
        "source": name,
        "rows": len(errors),
        "median": statistics.median(errors) if errors else None,
        "ninth_decile": decile(errors) if errors else None,
        "worst": worst.error if worst else None,
        "worst_row": worst.id if worst else None,
        "bias": statistics.median(item.error for item in measured) if measured else None,
        "bounds": len(bounds),
        "bounds_right": sum(bool(item.right) for item in bounds),
    }


def grouped(made: Sequence[Score]) -> list[dict[str, object]]:
    """A summary for each source and meter, and one for all."""
    keys = list(dict.fromkeys((item.source, item.meter) for item in made))
    parts = [
        summary(f"{source}, {meter}", [i for i in made if (i.source, i.meter) == (source, meter)]) for source, meter in keys
    ]
    return [*parts, summary("all", made)]


def percent(value: object) -> str:
    return "-" if not isinstance(value, float) else f"{100 * value:.1f} %"


def text(made: Sequence[Score], left: Sequence[tuple[str, str]]) -> str:
    """The report for a terminal."""
    lines = [
        f"{'source, meter':<34}{'rows':>6}{'median':>10}{'9th dec.':>10}{'bias':>10}{'worst':>10}  worst row      fit/no-fit"
    ]
    for part in grouped(made):
        bounds = f"{part['bounds_right']} of {part['bounds']}" if part["bounds"] else "-"
        figures = "".join(f"{percent(part[key]):>10}" for key in ("median", "ninth_decile", "bias", "worst"))
        lines.append(f"{part['source']!s:<34}{part['rows']:>6}{figures}  {part['worst_row'] or '-'!s:<14} {bounds}")
    lines.append(f"\n{len(left)} rows cannot be expressed:")
    lines += [f"  {count:3d}  {reason}" for reason, count in Counter(reason for _, reason in left).most_common()]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Score the file that `argv` names; 0, or 2 where it cannot be read."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="a CSV with the columns of published_memory.csv")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.add_argument("--basis", choices=BASES, default=AUTO, help="what predictions rest on; auto: rehearse reserved memory")
    parser.add_argument("--rows", default="", help="only rows whose id begins so")
    arguments = parser.parse_args(argv)
    try:
        rows = [row for row in read(arguments.file) if row["id"].startswith(arguments.rows)]
    except OSError as error:
        print(f"{arguments.file} cannot be read: {error.strerror}", file=sys.stderr)
        return 2
    made, left = scores(rows, arguments.basis)
    if arguments.json:
        items = [asdict(item) | {"error": item.error, "source": item.source} for item in made]
        unexpressed = [{"id": name, "reason": reason} for name, reason in left]
        print(json.dumps({"summary": grouped(made), "rows": items, "unexpressed": unexpressed}, indent=2))
    else:
        print(text(made, left))
    return 0


if __name__ == "__main__":
    sys.exit(main())
