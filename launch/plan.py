"""Plan one run: `python launch/plan.py model=llama3_8b cluster=4xa10 zero=stage3 tuning=lora [format=json] [basis=layout]`.

Exit code 0: it fits, 3: it does not, 2: the configuration cannot be used."""

from __future__ import annotations

import json
import sys
from pathlib import Path

# This clone, also where another one is installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from orchestrator.config import compose, run_app


def plan(overrides: list[str]) -> int:
    """Predict, print, and return the exit code."""
    from rich.console import Console

    from orchestrator.cluster.local import local_cluster
    from orchestrator.errors import MisfitError
    from orchestrator.planner.planning import AUTO, BASES, plan
    from orchestrator.report import plans
    from orchestrator.report.arguments import choices
    from orchestrator.report.lengths import brief

    values, rest = choices(overrides, {"format": ("text", "json"), "basis": BASES}, {"format": "text", "basis": AUTO})
    with Console(stderr=True).status("planning"):
        made = plan(rest, basis=values["basis"])
    if values["format"] == "json":
        print(json.dumps(made.to_json(), indent=2))
    else:
        plans.show(plans.one(made))
        for line in brief(compose(rest, local=local_cluster, strict=False)):
            print(line)
    return 0 if made.fits else MisfitError.exit_code


if __name__ == "__main__":
    sys.exit(run_app(plan, program="launch/plan.py"))
