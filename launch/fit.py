"""What fits: `python launch/fit.py model=llama3_8b cluster=1xa10 [tuning=lora] [zero=stage3 …] [format=json]`.

For each strategy the largest micro-batch and the longest sequence; where nothing fits, the smallest changes that help. Below,
for one run, the ladder of changes that people climb by hand, from the cheapest to the dearest: what each saves and costs."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

# This clone, also where another one is installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from orchestrator.config import run_app


def fit(overrides: list[str]) -> int:
    """Search, print, and return 0 if something fits, 3 if nothing does."""
    from orchestrator.cluster.local import local_cluster
    from orchestrator.config import compose
    from orchestrator.config.entry import sweep
    from orchestrator.errors import MisfitError
    from orchestrator.planner.climb import climb
    from orchestrator.planner.ladder import ladder, remedies
    from orchestrator.planner.planning import crossed
    from orchestrator.report import ladders, plans
    from orchestrator.report.arguments import choices
    from orchestrator.report.progress import progress

    values, rest = choices(overrides, {"format": ("text", "json")}, {"format": "text"})
    found = []
    with progress("fit") as advance:
        every = crossed(rest)
        for done, candidate in enumerate(every, start=1):
            found.append(ladder(candidate))
            advance(done, len(every), candidate.words)
        advance(len(every), len(every), "what would help")
        fitting = [rung for rung in found if rung.micro]
        helps = () if fitting else remedies(every)
        runs = sweep(rest)
        steps = climb(compose(runs[0], local=local_cluster, strict=False)) if len(runs) == 1 else ()
    if values["format"] == "json":
        parts = {
            "ladder": [asdict(rung) for rung in found],
            "fixes": [asdict(fix) for fix in helps],
            "climb": [asdict(step) for step in steps],
        }
        print(json.dumps(parts, indent=2))
    else:
        plans.show(ladders.table(found, helps, plans.width()))
        if steps:
            plans.show(ladders.rungs(steps, plans.width()))
    return 0 if fitting else MisfitError.exit_code


if __name__ == "__main__":
    sys.exit(run_app(fit, program="launch/fit.py"))
