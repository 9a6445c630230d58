"""A rank that cannot allocate in a step: what it held is written down, and all begin anew with less where that is asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from orchestrator.engine.protocol import Engine
from orchestrator.layout import Layout, Row
from orchestrator.spec import RunSpec
from orchestrator.train.folder import RunFolder, write_json
from orchestrator.train.health import MemoryEnded, end_of_memory, memory_ended
from orchestrator.train.memory import measure
from orchestrator.train.renewal import Renewal
from orchestrator.train.world import World

COMPUTING = "forward or backward"
"""The phase that half a micro-batch makes smaller, and in which no weight has changed. An update holds no activations."""


@dataclass(frozen=True, slots=True)
class Before:
    """Where a step began: the last finished `step`, the epoch, and the random states by device."""

    step: int
    epoch: int
    random: dict[str, torch.Tensor]

    @classmethod
    def now(cls, step: int, epoch: int, device: torch.device) -> Before:
        random = {"cpu": torch.get_rng_state()}
        return cls(step, epoch, random | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {}))

    def restore(self, device: torch.device) -> None:
        """Draw again what the step has drawn."""
        torch.set_rng_state(self.random["cpu"])
        if "cuda" in self.random:
            torch.cuda.set_rng_state(self.random["cuda"], device)


@dataclass(frozen=True, slots=True)
class Shortage:
    """`save(step, epoch)` returns when the checkpoint is on the disk; `started` is the step that the run began after."""

    spec: RunSpec
    world: World
    folder: RunFolder
    layout: Layout
    engine: Engine
    renewal: Renewal | None
    save: Callable[[int, int], None]
    started: int

    def meet(self, number: int, phase: str, error: BaseException, before: Before | None) -> MemoryEnded:
        """Write what this rank holds in `phase` of step `number`; the error to end with, where the run does not begin anew."""
        path, world = self.folder.memory_end(self.world.rank), self.world
        rows = {"predicted": self.layout.rows, "found": self.engine.census()}
        write_json(
            path,
            {name: [row_json(row) for row in held if row.elements] for name, held in rows.items()}
            | end_of_memory(number, phase, error, measure(world.rank, world.device), world.device),
        )
        ended = memory_ended(self.spec, world.rank, number, phase, error, path)
        if self.renewal is None or phase != COMPUTING or self.renewal.batch is None:
            return ended
        if world.size == 1 and before is not None and before.step > self.started:
            before.restore(world.device)
            if not self.folder.checkpoint(before.step).exists():
                self.save(before.step, before.epoch)
        refused = self.renewal.ask(f"rank {world.rank} ran out of memory in step {number}, {phase}")
        return MemoryEnded([*ended.faults, refused])


def row_json(row: Row) -> dict[str, Any]:
    """A row as plain data, with its bytes."""
    return asdict(row) | {"home": str(row.home), "bytes": row.bytes}
