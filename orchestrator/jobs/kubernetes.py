"""A planned run as a TrainJob: its manifest, and its submission."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from orchestrator.cluster import kubernetes
from orchestrator.cluster.kubernetes import Pods
from orchestrator.errors import ConfigError, Fault
from orchestrator.jobs.planned import Planned
from orchestrator.spec import Kubernetes
from orchestrator.train import submission
from orchestrator.train.folder import ROOT, RunFolder, write_text

MANIFEST = "trainjob.yaml"
NAME_LETTERS = 40


@dataclass(frozen=True, slots=True)
class Created:
    """A TrainJob that the cluster has taken: its name, its manifest, and the command that made it."""

    name: str
    manifest: Path
    command: str


def name_of(run: Planned) -> str:
    """The name of the TrainJob: as asked, else that of the run folder in the letters that Kubernetes takes."""
    if run.job.name is not None:
        return run.job.name
    folder = run.folder.path
    plain = re.sub(r"[^a-z0-9]+", "-", folder.name.lower()).strip("-")
    plain = plain if plain[:1].isalpha() else f"run-{plain}".strip("-")
    if len(plain) <= NAME_LETTERS and plain == folder.name:
        return plain
    mark = hashlib.sha256(str(folder).encode()).hexdigest()[:6]  # two folders have two names
    return f"{plain[: NAME_LETTERS - 7].rstrip('-')}-{mark}"


def pods_of(run: Planned) -> Pods:
    """The pods that carry `run`."""
    assert isinstance(run.job, Kubernetes), "the run was planned for Kubernetes"
    cluster = run.spec.cluster
    return Pods(
        job=run.job, name=name_of(run), folder=run.folder.path, nodes=cluster.nodes, ranks=cluster.cards_per_node,
        on_cards=cluster.card.name != "cpu", document=json.dumps(submission.document(run.spec, {"words": run.words}), indent=2),
    )  # fmt: skip


def manifest_of(run: Planned) -> Path:
    """Where the manifest is kept on this machine, whose folders the pods need not share."""
    return RunFolder(ROOT / name_of(run)).job / MANIFEST


def command(run: Planned) -> str:
    """What submits `run`, as a person would type it."""
    return shlex.join(kubernetes.command(manifest_of(run)))


def create(run: Planned) -> Created:
    """The TrainJob of `run`, after its manifest was kept here.

    Raises:
        ConfigError: the manifest cannot be written, one of that name is kept already, or Kubernetes refuses.
    """
    file = manifest_of(run)
    if file.exists():
        problem = f"{file} is that of an earlier job of the name {name_of(run)}"
        raise ConfigError(Fault("kubernetes.name", problem, "give another name, or remove the file when that job is gone"))
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, kubernetes.manifest(pods_of(run)))
    except OSError as error:
        problem = f"{file} cannot be written: {error.strerror}"
        raise ConfigError(Fault("kubernetes", problem, "submit from a folder that you may write to")) from None
    kubernetes.submit(kubernetes.command(file))
    return Created(name_of(run), file, command(run))
