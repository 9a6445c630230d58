"""A rank that cannot allocate: what it held is written down, and all begin anew with less where that is asked for."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch

from orchestrator.engine.protocol import Engine
from orchestrator.errors import CheckpointError, Fault
from orchestrator.layout import Layout, Row
from orchestrator.spec import RunSpec
from orchestrator.train.checkpoint import CHUNK_BYTES
from orchestrator.train.folder import RunFolder, write_json
from orchestrator.train.health import MemoryEnded, ran_out
from orchestrator.train.memory import measure
from orchestrator.train.renewal import Renewal
from orchestrator.train.saving import Saver
from orchestrator.train.watch import EVALUATE, SAVE
from orchestrator.train.world import World
from orchestrator.units import format_bytes

LOG = logging.getLogger("orchestrator.train")

COMPUTING, UPDATE = "forward or backward", "update"
LOAD, RESUME, EXPORT = "loading the model", "resuming", "the export"

HALVED = (COMPUTING, EVALUATE)
"""The phases that half a micro-batch makes smaller, and in which no weight has changed. An update holds no activations."""


@dataclass(frozen=True, slots=True)
class Before:
    """A state that is whole: the last finished `step`, its epoch, and the random states by device."""

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
    """What a rank without memory does. `engine` None: it does not hold all of its tensors yet."""

    spec: RunSpec
    world: World
    folder: RunFolder
    layout: Layout
    engine: Engine | None = None

    def told(self, number: int, phase: str, error: BaseException) -> MemoryEnded:
        """Write what this rank holds in `phase` of step `number`; the error to end with."""
        path, device = self.folder.memory_end(self.world.rank), self.world.device
        rows = {"predicted": self.layout.rows, "found": self.engine.census() if self.engine is not None else ()}
        write_json(
            path,
            {name: [row_json(row) for row in held if row.elements] for name, held in rows.items()}
            | {"step": number, "phase": phase, "error": str(error)}
            | {"memory": measure(self.world.rank, device).to_json(), "allocator": _allocator(device)},
        )
        where = f"step {number}, {phase}" if number else phase
        text = " ".join(str(error).split("\n", 1)[0].split()) or type(error).__name__
        problem = f"rank {self.world.rank}, {where}: {text}. What it held stands in {path}"
        return MemoryEnded(Fault("memory", problem, remedy(self.spec, phase) + self._goes_on()))

    def _goes_on(self) -> str:
        newest = self.folder.newest_checkpoint()
        return f"; resume=auto goes on from {newest.name}" if newest is not None else ""

    def caught(self, phase: str) -> AbstractContextManager[None]:
        """A context outside of any step, in which memory that ends is told of.

        Raises:
            MemoryEnded: it has ended.
        """
        return _caught(lambda error: self.told(0, phase, error))


@contextmanager
def _caught(told: Callable[[BaseException], MemoryEnded]) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
        if not ran_out(error):
            raise
        raise told(error) from error


@dataclass(frozen=True, slots=True)
class Rescue:
    """What a run that takes steps does besides. `save(step, epoch)` has a checkpoint written by the `saver`; `started` is the
    step that the run began after."""

    shortage: Shortage
    renewal: Renewal | None
    saver: Saver
    save: Callable[[int, int], None]
    started: int

    def meet(self, number: int, phase: str, error: BaseException, before: Before | None = None) -> MemoryEnded:
        """The error to end with, where the run does not begin anew. A rank alone saves the state `before`: nothing is lost."""
        world = self.shortage.world
        self.saver.settle()
        if before is not None and world.size == 1:
            self._keep(before)
        ended = self.shortage.told(number, phase, error)
        if self.renewal is None or phase not in HALVED or self.renewal.batch is None:
            return ended
        refused = self.renewal.ask(f"rank {world.rank} ran out of memory in step {number}, {phase}")
        return MemoryEnded([*ended.faults, refused])

    def caught(self, place: Callable[[], tuple[int, str]]) -> AbstractContextManager[None]:
        """A context in which memory that ends is met where `place`, (step, phase), then is: a save, for one.

        Raises:
            MemoryEnded: it has ended.
        """
        return _caught(lambda error: self.meet(place()[0], SAVE if self.saver.failed else place()[1], error))

    def _keep(self, before: Before) -> None:
        shortage = self.shortage
        if before.step <= self.started or shortage.folder.checkpoint(before.step).exists():
            return
        before.restore(shortage.world.device)
        try:
            self.save(before.step, before.epoch)
            self.saver.wait()
        except (CheckpointError, RuntimeError, MemoryError) as error:  # what it ran out of is told first
            LOG.warning("step %d could not be saved: %s", before.step, error)


def _smaller_batch(spec: RunSpec) -> str:
    return f"batch.micro={spec.batch.micro // 2} (the global batch and the result stay)" if spec.batch.micro > 1 else ""


def _recompute(spec: RunSpec) -> str:
    return "recompute=full" if spec.recompute == "none" else ""


def _smaller_states(spec: RunSpec) -> str:
    return "optimizer=adamw_8bit" if spec.optimizer.name == "adamw" and spec.tuning.kind == "full" else ""


def _shorter(spec: RunSpec) -> str:
    return f"a shorter data.seq_len (now {spec.data.seq_len})"


def _elsewhere(spec: RunSpec) -> str:
    return "a strategy that leaves less on each card (zero=stage3, offload=cpu)"


def _no_evaluation(spec: RunSpec) -> str:
    return "eval.every=0 (no evaluation)"


def _no_export(spec: RunSpec) -> str:
    return "export.format=none (the checkpoint is saved, and can be exported where there is more memory)"


def _writing(spec: RunSpec) -> str:
    if spec.checkpoint.background:
        return "checkpoint.background=false (it keeps a copy of each rank's share of the training state in host memory)"
    return f"a machine with more host memory (a save takes up to {format_bytes(CHUNK_BYTES)} of it on each rank)"


HELP: dict[str, tuple[Callable[[RunSpec], str], ...]] = {
    COMPUTING: (_smaller_batch, _recompute, _smaller_states, _shorter),
    EVALUATE: (_smaller_batch, _shorter, _no_evaluation),
    UPDATE: (_smaller_states, _elsewhere),
    LOAD: (_smaller_states, _elsewhere),
    RESUME: (_smaller_states, _elsewhere),
    SAVE: (_writing,),
    EXPORT: (_no_export,),
}
"""What a person may change so that a rank has memory enough in a phase, the cheapest first; "" where it is so already."""


def remedy(spec: RunSpec, phase: str) -> str:
    """The sentence for a person whose run has ended for want of memory in `phase`."""
    less = [words for words in (each(spec) for each in HELP.get(phase, HELP[COMPUTING])) if words]
    return f"use {', or '.join(filter(None, (', '.join(less[:-1]), less[-1])))}; launch/plan.py says what would fit"


def _allocator(device: torch.device) -> dict[str, int]:
    """Bytes that torch's allocator of the card holds, given out and in all; nothing on a CPU."""
    held = torch.cuda.memory_stats(device) if device.type == "cuda" else {}
    names = {"allocated": "allocated_bytes.all.current", "reserved": "reserved_bytes.all.current"}
    return {name: int(held[key]) for name, key in names.items() if key in held}


def row_json(row: Row) -> dict[str, Any]:
    """A row as plain data, with its bytes."""
    return asdict(row) | {"home": str(row.home), "bytes": row.bytes}
