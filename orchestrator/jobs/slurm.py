"""Planned runs as Slurm jobs: one for each, or one array of all."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from orchestrator.cluster import slurm
from orchestrator.cluster.slurm import Batch
from orchestrator.errors import ConfigError, Fault
from orchestrator.jobs.planned import Planned
from orchestrator.spec import Slurm
from orchestrator.train import submission
from orchestrator.train.folder import write_text

SCRIPT = "train.sbatch"


@dataclass(frozen=True, slots=True)
class Submitted:
    """A queued job: its number, its script, and the command that submitted it."""

    number: str
    batch: Batch
    script: Path
    command: str


def batches(planned: Sequence[Planned], train: Path) -> list[Batch]:
    """The jobs that carry `planned`: one each, or an array where slurm.array is set. `train` is launch/train.py.

    Raises:
        ConfigError: the runs of an array ask for different resources.
    """
    if len(planned) > 1 and all(isinstance(run.job, Slurm) and run.job.array for run in planned):
        if len({(run.job, run.spec.cluster) for run in planned}) > 1:
            problem = "the runs of one array have the same nodes and limits, and these differ"
            raise ConfigError(Fault("slurm.array", problem, "leave slurm.array out: one job for each run"))
        return [_batch(planned, train)]
    return [_batch([run], train) for run in planned]


def _batch(planned: Sequence[Planned], train: Path) -> Batch:
    first = planned[0]
    cluster = first.spec.cluster
    assert isinstance(first.job, Slurm), "the run was planned for Slurm"
    return Batch(
        job=first.job, name=first.name, folders=tuple(run.folder.path for run in planned), nodes=cluster.nodes,
        ranks_per_node=cluster.cards_per_node, on_cards=cluster.card.name != "cpu", python=sys.executable, script=train,
    )  # fmt: skip


def command(batch: Batch) -> str:
    """What submits `batch`, as a person would type it."""
    return shlex.join(slurm.command(batch, script_of(batch)))


def script_of(batch: Batch) -> Path:
    return batch.folders[0] / "job" / SCRIPT


def submit(batch: Batch, planned: Sequence[Planned], templates: Path) -> Submitted:
    """The queued job of `batch`, after the spec of each of its runs and the script were saved in their folders.

    Raises:
        ConfigError: a folder cannot be written, or Slurm refuses.
    """
    script, text = script_of(batch), slurm.render(templates, batch)
    mine = [run for run in planned if run.folder.path in batch.folders]
    slurm.check(batch, text)
    for run in mine:
        submission.save(run.folder, run.spec, run.about())
    write_text(script, text)
    number = slurm.submit(batch, script)
    for run in mine:
        submission.save(run.folder, run.spec, {**run.about(), "job": number, "command": command(batch)})
    return Submitted(number, batch, script, command(batch))
