"""Runs composed and planned for the cluster of their job, each with its folder: what may be submitted."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from orchestrator.config import compose_job
from orchestrator.errors import ConfigError, Fault, OrchestratorError
from orchestrator.planner.plan import Plan
from orchestrator.planner.predict import table_for
from orchestrator.planner.prelude import settle
from orchestrator.spec import Job, Kubernetes, RunSpec
from orchestrator.train import preflight, submission
from orchestrator.train.folder import ROOT, RunFolder

Refused = Callable[[str, OrchestratorError], None]
"""Told of a run of a sweep that is left out: its words, and why."""


@dataclass(frozen=True, slots=True)
class Planned:
    """A run that may be submitted: what was typed, its spec with the folder chosen, its job, its plan, and lines about that."""

    words: str
    spec: RunSpec
    job: Job
    plan: Plan
    lines: tuple[str, ...]

    @property
    def folder(self) -> RunFolder:
        assert self.spec.run.dir is not None, "a submitted run has its folder"
        return RunFolder(Path(self.spec.run.dir))

    @property
    def name(self) -> str:
        """The name of the job: as asked, else the folder's with nothing in it that a scheduler could read otherwise."""
        return self.job.name or re.sub(r"[^A-Za-z0-9_.-]+", "-", self.folder.path.name).strip("-.")[:64] or "run"

    def about(self) -> dict[str, object]:
        """What is saved beside the spec."""
        return {"words": self.words, "plan": self.plan.to_json()}


def plan(overrides: Sequence[str], taken: Sequence[Path] = ()) -> Planned:
    """The run that `overrides` ask for, planned for the cluster of its job, in a folder that is none of `taken`.

    Raises:
        ConfigError: with all faults of run and job.
        MisfitError: it does not fit.
    """
    words = [re.sub(r"^nodes=", "cluster.nodes=", word) for word in overrides]
    spec, job = compose_job(words)
    prelude = settle(spec)
    root = Path(job.mount) / ROOT if isinstance(job, Kubernetes) else ROOT
    spec = submission.placed(prelude.spec, root, taken)
    found = () if isinstance(job, Kubernetes) else preflight.shared(spec, table_for(spec))  # pods share an image instead
    planned = Planned(" ".join(words), spec, job, prelude.plan, (*prelude.lines, *found))
    if planned.folder.path in taken:
        problem = f"several runs of the sweep would write into {planned.folder.path}"
        raise ConfigError(Fault("run.dir", problem, "leave run.dir out: each run gets a folder of its own"))
    return planned


def plan_all(runs: Sequence[Sequence[str]], refused: Refused) -> list[Planned]:
    """The runs that may be submitted; of several, `refused` hears of those that are left out.

    Raises:
        OrchestratorError: the only one, or the first where none is left.
    """
    found: list[Planned] = []
    errors: list[OrchestratorError] = []
    for run in runs:
        try:
            found.append(plan(run, [other.folder.path for other in found]))
        except OrchestratorError as error:
            errors.append(error)
            if len(runs) > 1:
                refused(" ".join(run), error)
    if not found:
        raise errors[0]
    return found
