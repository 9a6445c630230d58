"""Submit a run as a job: `python launch/submit.py slurm=a10x4 nodes=2 zero=stage3 tuning=lora [dry=true]`.

Plans it for the cluster of the job, refuses what does not fit, saves the spec with the job and submits it.
`dry=true` prints the script and submits nothing; `-m key=a,b` submits one job each."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

LAUNCH = Path(__file__).resolve().parent
# This clone, also where another one is installed.
sys.path.insert(0, str(LAUNCH.parent))

from orchestrator.config import run_app
from orchestrator.errors import OrchestratorError

TEMPLATES = LAUNCH / "slurm"


def left_out(words: str, error: OrchestratorError) -> None:
    print(f"left out {words}\n{error.report()}\n", file=sys.stderr)


def submit(runs: Sequence[Sequence[str]]) -> int:
    """Plan all runs, submit those that fit, and show each job; 0."""
    from orchestrator import jobs
    from orchestrator.cluster import slurm
    from orchestrator.report.arguments import choices

    read = [choices(run, {"dry": ("true", "false", "True", "False")}, {"dry": "false"}) for run in runs]
    dry = read[0][0]["dry"].lower() == "true"
    planned = jobs.plan_all([rest for _, rest in read], left_out)
    folders: list[str] = []
    for batch in jobs.batches(planned, LAUNCH / "train.py"):
        mine = [run for run in planned if run.folder.path in batch.folders]
        for line in (line for run in mine for line in run.lines):
            print(line, file=sys.stderr if dry else sys.stdout)
        if dry:
            print(f"command  {jobs.slurm.command(batch)}", file=sys.stderr)
            print(slurm.render(TEMPLATES, batch), end="")
            continue
        queued = jobs.submit(batch, mine, TEMPLATES)
        print(f"job      {queued.number}  {batch.name}")
        for folder in batch.folders:
            print(f"run      {folder}")
        print(f"script   {queued.script}\ncommand  {queued.command}\n")
        folders += [str(folder) for folder in batch.folders]
    if len(folders) > 1:
        print(f"compare  when they have ended: python launch/compare.py {shlex.quote('runs=' + ','.join(folders))}")
    return 0


if __name__ == "__main__":
    sys.exit(run_app(lambda overrides: submit([overrides]), program="launch/submit.py", all_runs=submit))
