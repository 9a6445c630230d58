"""A rank that no longer moves: found within a time limit, named with its last step and its stack, and the run ended.

Every rank says where it is (`at`), and a thread of its own tells the others through the store at which ranks have met. When a
rank has not moved for too long, usually all have: they wait for the one that is missing. Each then publishes its stack, and
the first that still answers judges who it was, speaks and ends; the launcher ends the rest. Against a rank that holds
Python's lock, so that no thread of it runs, faulthandler ends it from a C thread (CPython, Modules/faulthandler.c).
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from orchestrator.errors import Fault, OrchestratorError
from orchestrator.train import failure
from orchestrator.train.world import World
from orchestrator.units import format_seconds

LOG = logging.getLogger("orchestrator.train")

SAVE, EVALUATE = "saving", "evaluation"
PATIENCE = {SAVE: 6.0, EVALUATE: 6.0}
"""How many times the time limit a phase may take; all others once."""

BEATS = 8
"""Signs of life within one time limit, at most BEAT_SECONDS apart."""

BEAT_SECONDS = 10.0
ANSWERS = 2.5
"""Beats for which a rank may be silent before it counts as gone."""

SPEAK_SECONDS = 5.0
GRACE_SECONDS = 30.0
"""After the time limit, until a rank whose threads do not run is ended from outside Python."""

WAITING, ENGINE, ELSEWHERE = range(3)
"""Where a stack ends: in a collective, in torch or DeepSpeed, in other code. The rank that others wait for is further on."""


class HungRank(OrchestratorError):
    """A rank has not moved within run.timeout."""

    title = "A rank hangs, and the run is ended"


@dataclass(frozen=True, slots=True)
class State:
    """What a rank has last said of itself. `stack` lists "file:line in name", innermost last; empty: it does not answer."""

    rank: int
    host: str
    pid: int
    step: int
    phase: str
    order: int
    stack: tuple[str, ...] = ()

    @property
    def answers(self) -> bool:
        return bool(self.stack)

    @property
    def place(self) -> int:
        """WAITING, ENGINE or ELSEWHERE."""
        inner = self.stack[-1] if self.stack else ""
        if "/torch/distributed/" in inner or "/deepspeed/comm/" in inner:
            return WAITING
        return ENGINE if "/torch/" in inner or "/deepspeed/" in inner else ELSEWHERE


def culprits(states: Sequence[State]) -> list[State]:
    """The ranks that the others wait for: those that do not answer; else those that are elsewhere than the rest; else those
    that are behind. All of them where none of this tells them apart: then it is the network between them."""
    silent = [state for state in states if not state.answers]
    if silent:
        return silent
    furthest = max(state.place for state in states)
    if any(state.place != furthest for state in states):
        return [state for state in states if state.place == furthest]
    behind = min((state.step, state.order) for state in states)
    return [state for state in states if (state.step, state.order) == behind]


def verdict(states: Sequence[State], seconds: float, log: Path | None) -> HungRank:
    """What to tell a person: who, where, and the innermost of its stack."""
    guilty = culprits(states)
    more = f"; the stacks of all ranks are in {log}" if log is not None else ""
    if len(guilty) == len(states) > 1:
        problem = f"all {len(states)} ranks wait for each other since {format_seconds(seconds)} in step {states[0].step}"
        return HungRank(Fault("ranks", problem, f"the network between them, or NCCL: set NCCL_DEBUG=INFO{more}"))
    faults = []
    for state in guilty:
        where = f"step {state.step}, {state.phase}"
        if not state.answers:
            problem = f"does not answer since {format_seconds(seconds)}; it was last in {where} (process {state.pid})"
            remedy = f"the process is stopped or its machine is gone: look at {state.host}{more}"
        else:
            problem = f"has not moved for {format_seconds(seconds)}: {where} (process {state.pid})"
            remedy = "\n       ".join(["it stands at", *state.stack[-6:]]) + f"\n    -> the others wait for it{more}"
        faults.append(Fault(f"rank {state.rank} on {state.host}", problem, remedy))
    return HungRank(faults)


class Watch:
    """The watch of this rank while it takes steps. `seconds` 0: none."""

    def __init__(self, world: World, seconds: float, log: Path | None) -> None:
        self._world, self._seconds, self._log = world, seconds, log
        self._beat = min(BEAT_SECONDS, seconds / BEATS)
        self._closed = threading.Event()
        self._main = threading.get_ident()
        self._moved, self._step, self._phase, self._order, self._count = time.monotonic(), 0, "start", 0, 0
        self._thread: threading.Thread | None = None
        self._stacks: Any = None
        if seconds > 0 and world.store is not None:
            self._stacks = log.open("a") if log is not None else None
            self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
            self._thread.start()

    def at(self, step: int, phase: str) -> None:
        """Say that this rank moves: it is in `phase` of `step` now."""
        if step != self._step:
            self._order = 0
        self._step, self._phase, self._order, self._moved = step, phase, self._order + 1, time.monotonic()
        if self._thread is not None:
            limit = self._limit() + GRACE_SECONDS
            faulthandler.dump_traceback_later(limit, exit=True, file=self._stacks or sys.stderr)

    def close(self) -> None:
        """End the watch; a rank that is done is not missed."""
        self._closed.set()
        if self._thread is not None:
            faulthandler.cancel_dump_traceback_later()
            self._thread.join()
        if self._stacks is not None:
            self._stacks.close()

    def _limit(self) -> float:
        return self._seconds * PATIENCE.get(self._phase, 1.0)

    def _state(self, stack: Sequence[str] = ()) -> list[Any]:
        return [self._world.rank, self._world.host, os.getpid(), self._step, self._phase, self._order, list(stack)]

    def _run(self) -> None:
        try:
            while not self._closed.wait(self._beat):
                self._count += 1
                self._world.store.set(f"beat/{self._world.rank}", json.dumps([self._count, self._state()]))
                idle = time.monotonic() - self._moved
                if idle > self._limit():
                    self._judge(idle)
                    return
        except RuntimeError as error:
            # The store has gone with the process that keeps it; collectives break too, unless this rank is the one that hangs.
            LOG.warning("the watch lost the store: %s", str(error).splitlines()[0])
            if not self._closed.wait(max(0.0, self._moved + self._limit() + GRACE_SECONDS - time.monotonic())):
                failure.abandon(None, self._log)

    def _stack(self) -> list[str]:
        frame = sys._current_frames().get(self._main)
        found = traceback.extract_stack(frame) if frame is not None else []
        return [f"{entry.filename}:{entry.lineno} in {entry.name}" for entry in found]

    def _beats(self) -> dict[int, tuple[int, State]]:
        """The newest sign of life of each rank that has given one."""
        found = {}
        store = self._world.store
        for rank in range(self._world.size):
            if store.check([f"beat/{rank}"]):
                count, (number, host, pid, step, phase, order, stack) = json.loads(store.get(f"beat/{rank}"))
                found[rank] = (count, State(number, host, pid, step, phase, order, tuple(stack)))
        return found

    def _judge(self, idle: float) -> None:
        """Gather what all ranks say; the first that answers speaks, and this process ends."""
        own = json.dumps([self._count + 1, self._state(self._stack())])
        self._world.store.set(f"beat/{self._world.rank}", own)
        before = self._beats()
        self._closed.wait(ANSWERS * self._beat + 1.0)  # the others notice within a beat
        after = self._beats()
        states = []
        for rank in range(self._world.size):
            count, state = after.get(rank, (0, State(rank, self._world.hosts[rank], 0, 0, "start", 0)))
            moving = rank in before and count != before[rank][0]
            states.append(replace(state, stack=("it goes on",)) if moving and not state.answers else state)
        speaker = min((state.rank for state in states if state.answers), default=self._world.rank)
        for state in states:
            LOG.error("rank %d, step %d, %s:\n%s", state.rank, state.step, state.phase, "\n".join(state.stack))
        self._keep_collectives()
        if speaker != self._world.rank:
            time.sleep(SPEAK_SECONDS)
        failure.abandon(verdict(states, idle, self._log) if speaker == self._world.rank else None, self._log)

    def _keep_collectives(self) -> None:
        """Write NCCL's flight recorder beside the log, where torch has one: `torchfrtrace` reads the files of all ranks."""
        dump = getattr(torch._C._distributed_c10d, "_dump_nccl_trace", None)
        if dump is not None and self._log is not None and self._world.device.type == "cuda":
            (self._log.parent / f"nccl_trace_rank_{self._world.rank}").write_bytes(dump())
