"""What a job is given to run: the spec as it was planned, saved with the job and held to its digest."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from orchestrator.errors import ConfigError, Fault
from orchestrator.spec import RunSpec, digest, from_json, to_json
from orchestrator.train.folder import RunFolder, choose, write_json

KEY = "spec"
"""`spec=PATH` on the command line of launch/train.py."""


def placed(spec: RunSpec, root: Path, taken: Collection[Path] = ()) -> RunSpec:
    """`spec` with the absolute folder in which its job will run; makes no folder. A run without one gets a fresh one
    in `root`, none of `taken`.

    Raises:
        ConfigError: the folder holds a run or waits for one, and resume does not say to go on.
        CheckpointError: `resume` names a folder without a checkpoint.
    """
    folder = choose(spec, root, taken).folder
    if folder.submitted.exists() and not folder.done.exists() and spec.resume != "auto":
        problem = f"a job was submitted for {folder.path} already"
        remedy = "when it has ended, continue it with resume=auto; or name another run.dir"
        raise ConfigError(Fault("run.dir", problem, remedy))
    return replace(spec, run=replace(spec.run, dir=str(folder.path.absolute())))


def save(folder: RunFolder, spec: RunSpec, about: Mapping[str, Any]) -> Path:
    """The file that holds `spec` with its digest, and `about`: the plan, what was typed.

    Raises:
        ConfigError: the folder cannot be written.
    """
    try:
        folder.job.mkdir(parents=True, exist_ok=True)
        write_json(folder.submitted, document(spec, about))
    except OSError as error:
        problem = f"{folder.job} cannot be written: {error.strerror}"
        raise ConfigError(Fault("run.dir", problem, "name a run.dir that this machine and the nodes share")) from None
    return folder.submitted


def document(spec: RunSpec, about: Mapping[str, Any]) -> dict[str, Any]:
    """What `load` reads: `spec` with its digest, and `about`."""
    return {"digest": digest(spec), "spec": to_json(spec), **about}


def path_in(overrides: list[str]) -> Path | None:
    """The path behind `spec=`; None where there is none.

    Raises:
        ConfigError: other overrides stand beside it.
    """
    found = [word for word in overrides if word.startswith(f"{KEY}=")]
    if not found:
        return None
    if len(overrides) > 1:
        others = " ".join(word for word in overrides if word is not found[0])
        remedy = "leave them out, or state the whole run without spec="
        raise ConfigError(Fault(found[0], f"a saved spec is run as it is, and {others} would change it", remedy))
    return Path(found[0].partition("=")[2])


def load(path: Path, ranks: int) -> RunSpec:
    """The spec saved in `path`. A job that is started again goes on from its newest checkpoint.

    Raises:
        ConfigError: it cannot be read, was changed since it was planned, or is meant for another number of ranks.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        spec = from_json(RunSpec, document["spec"])
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        remedy = "name a job/submitted.json that launch/submit.py of this version has written"
        raise ConfigError(Fault(f"spec={path}", f"cannot be read: {error}", remedy)) from None
    if document.get("digest") != digest(spec):
        problem = "it was changed since it was planned: its digest is another"
        raise ConfigError(Fault(f"spec={path}", problem, "submit the run again, with the change as an override"))
    if spec.strategy.ranks != ranks:
        problem = f"planned for {spec.strategy.ranks} ranks, but {ranks} run"
        cluster = spec.cluster
        remedy = f"start {cluster.nodes} × {cluster.cards_per_node} processes, as the job's script does"
        raise ConfigError(Fault(f"spec={path}", problem, remedy))
    own = RunFolder(Path(spec.run.dir)) if spec.run.dir is not None else None
    return replace(spec, resume="auto") if own is not None and own.newest_checkpoint() else spec
