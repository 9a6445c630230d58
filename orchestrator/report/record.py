"""A finished or running run, read back from its folder."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.errors import CheckpointError, Fault
from orchestrator.planner.plan import Plan
from orchestrator.spec import RunSpec, from_json
from orchestrator.train.folder import RunFolder
from orchestrator.train.metrics import read_metrics

MEMORY_LINES = (
    ("card used", "device_used"),
    ("torch reserved, peak", "reserved"),
    ("torch allocated, peak", "allocated"),
    ("process resident", "resident"),
    ("process resident, peak", "resident_peak"),
)
"""What a rank's memory is shown as, and the field that holds it."""


@dataclass(frozen=True, slots=True)
class Record:
    """`ranks` are the accounts of ledger.json in rank order, `lines` those of metrics.jsonl in step order.

    `plan` is what was predicted before the run; None where the run was not planned.
    """

    path: Path
    spec: RunSpec
    ranks: Sequence[Mapping[str, Any]]
    lines: Sequence[Mapping[str, Any]]
    plan: Plan | None = None

    @property
    def losses(self) -> tuple[float, float] | None:
        """Loss of the first and of the last step that have a finite one."""
        losses = [line["loss"] for line in self.lines if line.get("loss") is not None]
        return (losses[0], losses[-1]) if losses else None

    @property
    def tokens_per_second(self) -> float | None:
        """Median over the steps after the first, which warms up; of the first where there is no other."""
        rates = [line["tokens_per_second"] for line in self.lines]
        return statistics.median(rates[1:] or rates) if rates else None

    @property
    def waiting(self) -> float | None:
        """The share of the time of the steps after the first in which rank 0 waited for its data."""
        later = self.lines[1:]
        seconds = sum(line["step_seconds"] for line in later)
        return sum(line.get("data_wait_seconds", 0.0) for line in later) / seconds if seconds else None

    @property
    def labelled_per_second(self) -> float | None:
        """Learned tokens a second over the steps after the first, or over the first where there is no other."""
        lines = self.lines[1:] or self.lines
        seconds = sum(line["step_seconds"] for line in lines)
        return sum(line.get("labelled_tokens", 0) for line in lines) / seconds if seconds else None

    @property
    def padding(self) -> float | None:
        """The share of all computed positions that were padding."""
        positions = sum(line.get("padded_tokens", 0) for line in self.lines)
        return 1 - sum(line["tokens"] for line in self.lines) / positions if positions else None

    @property
    def seconds(self) -> float:
        """Time spent in optimizer steps."""
        return float(sum(line["step_seconds"] for line in self.lines))

    @property
    def skipped(self) -> int:
        """Steps that were not finite and updated nothing."""
        return sum(not line.get("finite", True) for line in self.lines)

    @property
    def eval_losses(self) -> list[tuple[int, float]]:
        return [(line["step"], line["eval_loss"]) for line in self.lines if line.get("eval_loss") is not None]

    @property
    def memory_over_time(self) -> list[tuple[int, list[Mapping[str, Any]]]]:
        """(step, memory of every rank) at each logging interval."""
        return [(line["step"], line["memory"]) for line in self.lines if "memory" in line]


def load(path: Path) -> Record:
    """The record of the run in `path`.

    Raises:
        CheckpointError: `path` is not a run folder, or its first step has not finished.
    """
    folder = RunFolder(path)
    if not folder.spec.is_file():
        problem = f"{path} is not a run folder" if path.is_dir() else f"there is no folder {path}"
        raise CheckpointError(
            Fault("run", problem, "give a folder that launch/train.py made: it holds spec.json and metrics.jsonl")
        )
    lines = read_metrics(folder.metrics)
    if not lines or not folder.ledger.is_file():
        raise CheckpointError(
            Fault("run", f"{path} has not finished its first step", f"look into {folder.log} for what it does")
        )
    try:
        spec = from_json(RunSpec, json.loads(folder.spec.read_text(encoding="utf-8")))
        ranks = json.loads(folder.ledger.read_text(encoding="utf-8"))["ranks"]
        plan = Plan.from_json(json.loads(folder.plan.read_text(encoding="utf-8"))) if folder.plan.is_file() else None
    except (TypeError, KeyError, json.JSONDecodeError) as error:
        problem = f"{path} was not written by this version: {error}"
        raise CheckpointError(Fault("run", problem, "use the version that made it")) from None
    return Record(path, spec, ranks, lines, plan)


def load_all(paths: Sequence[Path]) -> tuple[list[Record], list[Fault]]:
    """The records of the runs in `paths` that have one, and what is wrong with the others: of a sweep some may have failed.

    Raises:
        CheckpointError: with every fault, where none has.
    """
    records: list[Record] = []
    faults: list[Fault] = []
    for path in paths:
        try:
            records.append(load(path))
        except CheckpointError as error:
            faults += error.faults
    if not records:
        raise CheckpointError(faults)
    return records, faults
