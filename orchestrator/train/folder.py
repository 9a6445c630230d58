"""The run folder: where it is, what lies in it, and that nothing in it is ever written over."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.errors import CheckpointError, ConfigError, Fault
from orchestrator.spec import RunSpec, to_json
from orchestrator.train.commit import DOCUMENT, is_named, named_steps, recover

LOG = logging.getLogger("orchestrator.train")

ROOT = Path("runs")
FRESH = ".new"
"""Ends the name of a file that is not whole yet."""


@dataclass(frozen=True, slots=True)
class RunFolder:
    """The paths of one run. `path` need not exist yet."""

    path: Path

    @property
    def spec(self) -> Path:
        return self.path / "spec.json"

    @property
    def strategy(self) -> Path:
        return self.path / "strategy.json"

    @property
    def plan(self) -> Path:
        return self.path / "plan.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def audit(self) -> Path:
        """A line for each time that the run went back from a spike of its loss."""
        return self.path / "audit.jsonl"

    @property
    def log(self) -> Path:
        return self.path / "train.log"

    @property
    def ledger(self) -> Path:
        return self.path / "ledger.json"

    def memory_end(self, rank: int) -> Path:
        """What `rank` held when it ran out of memory."""
        return self.path / f"memory-end-rank-{rank:05d}.json"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def export(self) -> Path:
        return self.path / "export"

    @property
    def job(self) -> Path:
        """What a job was submitted with, and what its script printed."""
        return self.path / "job"

    @property
    def submitted(self) -> Path:
        return self.job / "submitted.json"

    @property
    def stopped(self) -> Path:
        """There while the run is stopped before its last step, with everything saved: says by what and where."""
        return self.path / "stopped"

    @property
    def done(self) -> Path:
        """There when the last step, the checkpoint and the export are done."""
        return self.path / "done"

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step-{step:06d}"

    def has_run(self) -> bool:
        """Whether a run has left results here. A start that failed before its first step has not."""
        stepped = self.metrics.exists() and self.metrics.stat().st_size > 0
        return stepped or self.export.exists() or bool(named_steps(self.checkpoints))

    def saved(self) -> tuple[Path, ...]:
        """The checkpoints, newest first. Whether they are sound is seen when one is chosen."""
        return tuple(reversed(named_steps(self.checkpoints)))

    def tidy(self) -> None:
        """Take away what earlier lives of a run that has ended have left half removed or half written: nothing follows that
        would."""
        try:
            recover(self.checkpoints)
            for unfinished in self.path.glob(f".*{FRESH}"):
                unfinished.unlink(missing_ok=True)
        except OSError as error:
            LOG.warning("what an interrupted run has left under %s could not be removed: %s", self.path, error.strerror)

    def newest_checkpoint(self) -> Path | None:
        return next(iter(self.saved()), None)


@dataclass(frozen=True, slots=True)
class Choice:
    """The folder of this run, and the checkpoints that it may start from, the first that is sound (none: the beginning)."""

    folder: RunFolder
    candidates: tuple[Path, ...] = ()

    @property
    def checkpoint(self) -> Path | None:
        return self.candidates[0] if self.candidates else None


def checkpoints_at(path: Path, field: str = "resume") -> tuple[Path, ...]:
    """The checkpoints that `path` means: itself alone, or those of the run folder `path`, newest first.

    Raises:
        CheckpointError: `path` is neither a checkpoint nor a run folder with one.
    """
    if path.is_dir() and (is_named(path) or (path / DOCUMENT).is_file()):
        return (path,)
    if not path.is_dir():
        problem = f"{path} is a file, not a run folder" if path.exists() else f"there is no folder {path}"
        raise CheckpointError(
            Fault(field, problem, "give a run folder (runs/demo) or a checkpoint in it (runs/demo/checkpoints/…)")
        )
    saved = RunFolder(path).saved()
    if not saved:
        run = RunFolder(path).spec.exists()
        problem = (
            f"{path} is a run that has not saved a checkpoint" if run else f"{path} is neither a run folder nor a checkpoint"
        )
        remedy = (
            "start it from the beginning with resume=none" if run else "give the folder that holds spec.json and checkpoints/"
        )
        raise CheckpointError(Fault(field, problem, remedy))
    return saved


def _name(spec: RunSpec) -> str:
    return f"{spec.model.name}-{spec.tuning.kind}-{spec.strategy.label}"


def _siblings(root: Path, name: str) -> list[RunFolder]:
    """Runs named `name`, `name`-2, … under `root`, the most recently written last."""
    pattern = re.compile(re.escape(name) + r"(-\d+)?")
    found = [RunFolder(path) for path in root.glob("*") if path.is_dir() and pattern.fullmatch(path.name)]
    return sorted(found, key=lambda folder: max(p.stat().st_mtime for p in (folder.path, *folder.path.glob("*"))))


def _fresh(root: Path, name: str, taken: Collection[Path]) -> RunFolder:
    path, number = root / name, 1
    while path.exists() or path.absolute() in taken:
        number += 1
        path = root / f"{name}-{number}"
    return RunFolder(path)


def choose(spec: RunSpec, root: Path = ROOT, taken: Collection[Path] = ()) -> Choice:
    """Where this run writes and what it resumes from. Called by rank 0 alone; makes no folder.

    A fresh folder is none of `taken`, absolute paths that are promised to others.

    Raises:
        ConfigError: `run.dir` already holds a run and resume is "none".
        CheckpointError: `resume` names a folder without a checkpoint.
    """
    if spec.run.dir is not None:
        folder = RunFolder(Path(spec.run.dir))
        if folder.path.exists() and not folder.path.is_dir():
            raise ConfigError(Fault("run.dir", f"{folder.path} is a file", "name a folder"))
        named = checkpoints_at(Path(spec.resume)) if spec.resume not in ("none", "auto") else ()
        same = any(checkpoint.resolve().is_relative_to(folder.path.resolve()) for checkpoint in named)
        if folder.has_run() and spec.resume != "auto" and not same:
            raise ConfigError(
                Fault("run.dir", f"{folder.path} already holds a run, and nothing is written over",
                      "continue it with resume=auto, or name another run.dir")
            )  # fmt: skip
        return Choice(folder, folder.saved() if spec.resume == "auto" else named)
    if spec.resume == "auto":
        earlier = [folder for folder in _siblings(root, _name(spec)) if folder.saved()]
        if earlier:
            return Choice(earlier[-1], earlier[-1].saved())
    fresh = _fresh(root, _name(spec), taken)
    return Choice(fresh, checkpoints_at(Path(spec.resume)) if spec.resume not in ("none", "auto") else ())


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` so that a reader sees the old file or the whole new one."""
    fresh = path.with_name(f".{path.name}{FRESH}")
    fresh.write_text(text, encoding="utf-8")
    fresh.replace(path)


def write_json(path: Path, data: Any) -> None:
    """Write `data` to `path` so that a reader sees the old file or the whole new one."""
    write_text(path, json.dumps(data, indent=2) + "\n")


def open_folder(folder: RunFolder, spec: RunSpec, strategy: dict[str, Any], resumed_at: int | None) -> None:
    """Make the folder and write the resolved spec and the lowered strategy into it.

    The files of the run that is continued are kept as `spec.before-000050.json`, where 50 is the step it continues after.

    Raises:
        ConfigError: the folder cannot be made or written.
    """
    try:
        folder.checkpoints.mkdir(parents=True, exist_ok=True)
        for mark in (folder.stopped, folder.done):
            mark.unlink(missing_ok=True)
        for path, data in ((folder.spec, to_json(spec)), (folder.strategy, strategy)):
            if path.exists() and resumed_at is not None and json.loads(path.read_text(encoding="utf-8")) != data:
                path.replace(path.with_name(f"{path.stem}.before-{resumed_at:06d}.json"))
            write_json(path, data)
    except OSError as error:
        raise ConfigError(
            Fault("run.dir", f"{folder.path} cannot be written: {error.strerror}", "name another run.dir")
        ) from None
