"""Measure one rank of a strategy on one real device, beside its prediction:
`python launch/dryrun.py zero=stage3 tuning=lora cluster=4xa10 rank=0 [device=cuda|cpu] [format=text|json]`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

# This clone, also where another one is installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from orchestrator.config import compose, run_app


def dryrun(overrides: list[str]) -> int:
    """Rehearse, run, and print both; the exit code: 0, or 3 where the device ran out of memory, or certainly would."""
    from rich.console import Console

    from orchestrator.cluster.local import local_cluster
    from orchestrator.errors import ConfigError, Fault, MisfitError
    from orchestrator.planner.dryrun import check_host, dry_run, on_host
    from orchestrator.planner.rehearsal import rehearse
    from orchestrator.report import plans
    from orchestrator.report.arguments import choices
    from orchestrator.report.dryruns import beside, show

    given = [word for word in overrides if word.startswith("rank=")]
    rest = [word for word in overrides if word not in given]
    options = {"format": ("text", "json"), "device": ("auto", "cuda", "cpu")}
    values, rest = choices(rest, options, {"format": "text", "device": "auto"})
    spec = compose(rest, local=local_cluster)
    number = given[-1].removeprefix("rank=") if given else "0"
    if not number.isdigit() or int(number) >= spec.strategy.ranks:
        problem = f"{number} is not one of the {spec.strategy.ranks} ranks of this strategy"
        raise ConfigError(Fault("rank", problem, f"use 0 to {spec.strategy.ranks - 1}"))
    device = values["device"]
    if device == "auto":
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
    card = spec.cluster.card.name
    elsewhere = card if device == "cpu" and card != "cpu" else ""
    if elsewhere:
        check_host(spec)
        spec = on_host(spec)
    with Console(stderr=True).status("rehearsing") as status:
        predicted = rehearse(spec, int(number))
        status.update(f"two steps on {device}")
        result = beside(dry_run(spec, int(number), device), predicted)
    if values["format"] == "json":
        print(json.dumps(result, indent=2))
    else:
        title = f"{spec.strategy.label}, rank {number} of {spec.strategy.ranks}, on {result['device']}"
        plans.show(show(result, title, stand_in=elsewhere))
    return MisfitError.exit_code if result["error"] else 0


if __name__ == "__main__":
    sys.exit(run_app(dryrun, program="launch/dryrun.py"))
