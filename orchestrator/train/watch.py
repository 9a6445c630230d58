"""A rank that no longer moves: found within a time limit, named with its last step and its stack, and the run ended.

Every rank says where it is (`at`), and a thread of its own tells the others through the store at which ranks have met. When a
rank has not moved for some time, usually all have: they wait for the one that is missing. Each then publishes its stack, and
when the time is over the first that still answers judges who it was, speaks, ends who no longer answers beside it, and ends;
the launcher ends the rest. Against a rank that holds
Python's lock, so that no thread of it runs, faulthandler ends it from a C thread (CPython, Modules/faulthandler.c).
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Mapping, Sequence
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
"""Beats before the time limit in which each rank publishes its stack; who is silent in all of them counts as gone."""

SPEAK_SECONDS = 5.0
GRACE_SECONDS = 30.0
"""After the time limit, until a rank whose threads do not run is ended from outside Python."""

LIBRARIES = ("/torch/", "/deepspeed/")
WAITING, ENGINE, ELSEWHERE = range(3)
"""Where a stack ends: in a collective, in torch or DeepSpeed, in other code. The rank that others wait for is further on."""


WAITED, OTHER = "the others wait for it", "it waits for another collective than the rest"


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
    def at(self) -> tuple[int, int, str]:
        """How far it has come, and the line that called what it waits in: ranks that differ here wait for different
        collectives."""
        callers = (entry for entry in reversed(self.stack) if not any(folder in entry for folder in LIBRARIES))
        return self.step, self.order, next(callers, "")

    @property
    def place(self) -> int:
        """WAITING, ENGINE or ELSEWHERE."""
        inner = self.stack[-1] if self.stack else ""
        if "/torch/distributed/" in inner or "/deepspeed/comm/" in inner:
            return WAITING
        return ENGINE if any(folder in inner for folder in LIBRARIES) else ELSEWHERE


def culprits(states: Sequence[State]) -> list[State]:
    """The ranks that the others wait for: those that do not answer; else those that are elsewhere than the rest; else the few
    that wait for another collective than most. All of them where none of this tells them apart."""
    silent = [state for state in states if not state.answers]
    if silent:
        return silent
    furthest = max(state.place for state in states)
    if any(state.place != furthest for state in states):
        return [state for state in states if state.place == furthest]
    where = Counter(state.at for state in states)
    few = min(where.values())
    return [state for state in states if where[state.at] == few]


def verdict(states: Sequence[State], seconds: float, log: Path | None) -> HungRank:
    """What to tell a person: who, where, and the innermost of its stack."""
    guilty = culprits(states)
    more = f"; the stacks of all ranks are in {log}" if log is not None else ""
    apart = len({state.at for state in states}) > 1
    if len(guilty) == len(states) > 1 and not apart:
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
            remedy = "\n       ".join(["it stands at", *state.stack[-6:]])
            remedy += f"\n    -> {OTHER if apart and state.place == WAITING else WAITED}{more}"
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
            asked: Mapping[int, tuple[int, State]] | None = None
            while not self._closed.wait(min(self._beat, max(0.01, self._moved + self._limit() - time.monotonic()))):
                self._count += 1
                idle = time.monotonic() - self._moved
                suspects = idle > self._limit() - ANSWERS * self._beat
                own = self._state(self._stack() if suspects else ())
                self._world.store.set(f"beat/{self._world.rank}", json.dumps([self._count, own]))
                asked = (asked or self._beats()) if suspects else None
                if asked is not None and idle > self._limit():
                    self._judge(idle, asked)
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

    def _judge(self, idle: float, before: Mapping[int, tuple[int, State]]) -> None:
        """Gather what all ranks say, and have said `before` this one began to wonder; the first that answers speaks, and this
        process ends."""
        after = self._beats()
        states = []
        for rank in range(self._world.size):
            count, state = after.get(rank, (0, State(rank, self._world.hosts[rank], 0, 0, "start", 0)))
            silent = count == (before[rank][0] if rank in before else 0)
            states.append(replace(state, stack=() if silent else state.stack or ("it goes on",)))
        speaker = min((state.rank for state in states if state.answers), default=self._world.rank)
        for state in states:
            LOG.error("rank %d, step %d, %s:\n%s", state.rank, state.step, state.phase, "\n".join(state.stack))
        self._keep_collectives()
        if speaker != self._world.rank:
            time.sleep(SPEAK_SECONDS)
            failure.abandon(None, self._log)
        self._end([state for state in states if not state.answers])
        failure.abandon(verdict(states, idle, self._log), self._log)

    def _end(self, silent: Sequence[State]) -> None:
        """End the processes on this machine that no longer answer: a stopped one would not hear the launcher's signal."""
        for state in silent:
            if state.host == self._world.host and state.pid not in (0, os.getpid()):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(state.pid, signal.SIGKILL)

    def _keep_collectives(self) -> None:
        """Write NCCL's flight recorder beside the log, where torch has one: `torchfrtrace` reads the files of all ranks."""
        dump = getattr(torch._C._distributed_c10d, "_dump_nccl_trace", None)
        if dump is not None and self._log is not None and self._world.device.type == "cuda":
            (self._log.parent / f"nccl_trace_rank_{self._world.rank}").write_bytes(dump())
