"""Compare strategies: `python launch/compare.py model=qwen_7b cluster=4xa10 tuning=lora [basis=layout] [out=plans]`.

`key=a,b` crosses choices; without zero or fsdp every strategy is planned. Those that nearly fill the
card are rehearsed, within `within=105` seconds; `basis=layout` answers at once, `basis=rehearsal`
rehearses all that could fit. Writes a picture and a page into `out`.
`runs=runs/a,runs/b` instead sets what finished runs held on every card beside what was predicted."""

from __future__ import annotations

import json
import sys
from pathlib import Path

# This clone, also where another one is installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from orchestrator.config import run_app


def compare_runs(paths: list[str], out: Path) -> int:
    """Print and draw what each card of finished runs held; 0 if there is one."""
    from orchestrator.report import plans, runs
    from orchestrator.report.record import load_all

    records, missing = load_all([Path(path).expanduser() for path in paths])
    plans.show(runs.table(records, plans.width()))
    for fault in missing:
        print(f"left out: {fault.problem}")
    print(f"\npicture {runs.draw(records, out / 'runs.png')}")
    return 0


def compare(overrides: list[str]) -> int:
    """Plan all, print one table, write the picture and the page; exit code 0 if something fits, 3 if nothing does."""
    from orchestrator.errors import MisfitError
    from orchestrator.planner.planning import AUTO, BASES, WITHIN, compare
    from orchestrator.report import plan_page, plan_picture, plans
    from orchestrator.report.arguments import choices, positive
    from orchestrator.report.progress import progress

    options = {"format": ("text", "json"), "basis": BASES, "within": (), "out": (), "runs": ()}
    usual = {"format": "text", "basis": AUTO, "within": f"{WITHIN:.0f}", "out": "plans", "runs": ""}
    values, rest = choices(overrides, options, usual)
    if values["runs"]:
        return compare_runs(values["runs"].split(","), Path(values["out"]).expanduser())
    with progress("plan") as advance:
        made = compare(rest, basis=values["basis"], within=positive(values, "within"), progress=advance)
    title = f"{' '.join(rest)}"
    if values["format"] == "json":
        print(json.dumps([plan.to_json() for plan in made], indent=2))
    else:
        plans.show(plans.many(made, plans.width()))
        folder = Path(values["out"]).expanduser()
        picture = plan_picture.draw(made, title, folder / "compare.png")
        page = plan_page.write(made, title, folder / "compare.html")
        print(f"\npicture {picture}\npage    {page}")
    return 0 if any(plan.fits for plan in made) else MisfitError.exit_code


if __name__ == "__main__":
    sys.exit(run_app(compare, program="launch/compare.py"))
