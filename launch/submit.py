"""Submit a run as a job: `python launch/submit.py slurm=a10x4 nodes=2 zero=stage3 tuning=lora [dry=true]`.

Plans it for the cluster of the job, refuses what does not fit, saves the spec with the job and submits it.
`kubernetes=a10x4` makes a TrainJob instead. `dry=true` prints the script or the manifest and submits nothing; `-m key=a,b`
submits one job each."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

LAUNCH = Path(__file__).resolve().parent
# This clone, also where another one is installed.
sys.path.insert(0, str(LAUNCH.parent))

from orchestrator.config import run_app
from orchestrator.errors import OrchestratorError

if TYPE_CHECKING:
    from orchestrator.jobs import Planned

TEMPLATES = LAUNCH / "slurm"


def say(lines: Sequence[str], dry: bool) -> None:
    """Tell a person; a dry run keeps stdout for what it makes."""
    for line in lines:
        print(line, file=sys.stderr if dry else sys.stdout)


def left_out(words: str, error: OrchestratorError) -> None:
    print(f"left out {words}\n{error.report()}\n", file=sys.stderr)


def to_kubernetes(planned: Sequence[Planned], dry: bool) -> list[Path]:
    """Make a TrainJob of each run, or show its manifest; the folders of those that were made."""
    from orchestrator.cluster.kubernetes import manifest
    from orchestrator.jobs import kubernetes

    folders = []
    for number, run in enumerate(planned):
        say(run.lines, dry)
        if dry:
            print(f"command  {kubernetes.command(run)}", file=sys.stderr)
            print("---\n" * bool(number) + manifest(kubernetes.pods_of(run)), end="")
            continue
        made = kubernetes.create(run)
        print(f"job      {made.name}\nrun      {run.folder.path}, on the claim")
        print(f"manifest {made.manifest}\ncommand  {made.command}\n")
        folders.append(run.folder.path)
    return folders


def to_slurm(planned: Sequence[Planned], dry: bool) -> list[Path]:
    """Queue a job of each run, or one of all as an array, or show its script; the folders of those that were queued."""
    from orchestrator import jobs
    from orchestrator.cluster import slurm

    folders: list[Path] = []
    for batch in jobs.batches(planned, LAUNCH / "train.py"):
        mine = [run for run in planned if run.folder.path in batch.folders]
        say([line for run in mine for line in run.lines], dry)
        if dry:
            print(f"command  {jobs.slurm.command(batch)}", file=sys.stderr)
            print(slurm.render(TEMPLATES, batch), end="")
            continue
        queued = jobs.submit(batch, mine, TEMPLATES)
        print(f"job      {queued.number}  {batch.name}")
        for folder in batch.folders:
            print(f"run      {folder}")
        print(f"script   {queued.script}\ncommand  {queued.command}\n")
        folders += batch.folders
    return folders


def submit(runs: Sequence[Sequence[str]]) -> int:
    """Plan all runs, submit those that fit, and show each job; 0."""
    from orchestrator import jobs
    from orchestrator.report.arguments import choices
    from orchestrator.spec import Kubernetes

    read = [choices(run, {"dry": ("true", "false", "True", "False")}, {"dry": "false"}) for run in runs]
    dry = read[0][0]["dry"].lower() == "true"
    planned = jobs.plan_all([rest for _, rest in read], left_out)
    pods = [run for run in planned if isinstance(run.job, Kubernetes)]
    others = [run for run in planned if run not in pods]
    folders = to_kubernetes(pods, dry) + to_slurm(others, dry)
    if len(folders) > 1:
        words = "runs=" + ",".join(map(str, folders))
        print(f"compare  when they have ended: python launch/compare.py {shlex.quote(words)}")
    return 0


if __name__ == "__main__":
    sys.exit(run_app(lambda overrides: submit([overrides]), program="launch/submit.py", all_runs=submit))
