"""A job for Slurm: its script, the options of sbatch, and the submission.

What a person chooses reaches sbatch as arguments and the script as quoted constants; nothing is pasted into a line that a
shell or sbatch reads again.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from orchestrator.errors import ConfigError, Fault
from orchestrator.spec import Slurm

INHERITED = ("SLURM_", "SBATCH_", "SRUN_", "SALLOC_")
"""Variables that sbatch takes as options (sbatch(1), INPUT ENVIRONMENT VARIABLES), or that belong to the job around us."""

LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
KEPT = "SLURM_CONF"
"""Where the client programs find their cluster."""

ANSWER_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Batch:
    """One submission: `folders` are the run folders, several of a job array; `ranks_per_node` processes on each of `nodes`,
    with a card for each where `on_cards`."""

    job: Slurm
    name: str
    folders: tuple[Path, ...]
    nodes: int
    ranks_per_node: int
    on_cards: bool
    python: str
    script: Path


def _plain(text: str) -> str:
    """`text` for a comment: one line, and nothing that looks like a directive."""
    return re.sub(r"[^\w .×-]", "_", text)


def render(templates: Path, batch: Batch) -> str:
    """The batch script. Every value is quoted for the shell; one that the template misses is an error of ours."""
    environment = Environment(
        loader=FileSystemLoader(templates), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True, autoescape=False, finalize=lambda value: shlex.quote(str(value)),
    )  # fmt: skip
    environment.filters["plain"] = _plain
    return environment.get_template("train.sbatch.j2").render(
        name=batch.name, nodes=batch.nodes, ranks_per_node=batch.ranks_per_node, requeues=batch.job.requeues,
        grace=batch.job.grace, setup=batch.job.setup, python=batch.python, script=batch.script,
    )  # fmt: skip


def options(batch: Batch) -> list[str]:
    """sbatch's options, each one argument. Percent signs of the folder are doubled: sbatch fills in patterns."""
    job, count = batch.job, len(batch.folders)
    log = "slurm-%A_%a.out" if count > 1 else "slurm-%j.out"
    chosen = {
        "partition": job.partition,
        "account": job.account,
        "qos": job.qos,
        "constraint": job.constraint,
        "gpus-per-node": f"{job.gpu + ':' if job.gpu else ''}{batch.ranks_per_node}" if batch.on_cards else None,
        "array": f"0-{count - 1}" if count > 1 else None,
    }
    return [
        f"--job-name={batch.name}",
        f"--nodes={batch.nodes}",
        "--ntasks-per-node=1",
        f"--cpus-per-task={job.cpus}",
        f"--mem={job.memory_gib}G" if job.memory_gib else "--mem=0",
        f"--time={job.minutes}",
        *(f"--{name}={value}" for name, value in chosen.items() if value is not None),
        f"--signal=B:USR1@{job.grace}",
        "--requeue",
        "--open-mode=append",
        f"--output={str(batch.folders[0] / 'job').replace('%', '%%')}/{log}",
    ]


def command(batch: Batch, script: Path) -> list[str]:
    """What is typed to submit `script`."""
    return ["sbatch", "--parsable", *options(batch), str(script), *(str(folder) for folder in batch.folders)]


def environment(variables: Mapping[str, str]) -> dict[str, str]:
    """`variables` without those that would change the job, or make it believe that it runs under a launcher."""
    dropped = {name for name in variables if name.startswith(INHERITED) or name in LAUNCHERS}
    return {name: value for name, value in variables.items() if name not in dropped - {KEPT}}


def _sbatch(arguments: Sequence[str], script: str = "") -> str:
    """What sbatch prints; it reads `script` where its arguments name none.

    Raises:
        ConfigError: there is no sbatch, or it refuses.
    """
    try:
        ended = subprocess.run(
            arguments,
            env=environment(os.environ),
            input=script,
            text=True,
            capture_output=True,
            timeout=ANSWER_SECONDS,
            check=False,
        )
    except FileNotFoundError:
        remedy = "submit from a login node; dry=true prints the script, which runs wherever sbatch is"
        raise ConfigError(Fault("slurm", "there is no sbatch on this machine", remedy)) from None
    except subprocess.TimeoutExpired:
        problem = f"sbatch has not answered within {ANSWER_SECONDS:.0f} s"
        raise ConfigError(Fault("slurm", problem, "look whether the controller is up: sinfo")) from None
    if ended.returncode:
        said = [line.removeprefix("sbatch: error: ") for line in ended.stderr.splitlines() if line.strip()]
        problem = f"sbatch refuses: {'; '.join(said) or f'code {ended.returncode}'}"
        raise ConfigError(Fault("slurm", problem, "sinfo and scontrol show partition say what the cluster has"))
    return ended.stdout


def check(batch: Batch, script: str) -> None:
    """Ask Slurm whether a job of `script` could ever start; nothing is written or queued.

    Raises:
        ConfigError: it could not: no such partition, account or resources.
    """
    _sbatch(["sbatch", "--test-only", *options(batch)], script)


def submit(batch: Batch, script: Path) -> str:
    """The number of the job, which is queued now.

    Raises:
        ConfigError: Slurm refuses it.
    """
    return _sbatch(command(batch, script)).strip().partition(";")[0]
