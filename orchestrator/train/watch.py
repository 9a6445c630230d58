"""A rank that no longer moves: found within a time limit, named with its last step and its stack, and the run ended.

Every rank says where it is (`at`), and a thread of its own tells the others on the board (train/board.py). When a rank has not
moved for some time, usually all have: they wait for the one that is missing. Each publishes where it stands, and when the time
is over the first that still answers judges who it was (train/verdict.py), speaks, ends who no longer answers beside it, and
ends; the launcher ends the rest. Where the store itself is silent, it is the process that keeps it. Against a rank that holds
Python's lock, so that no thread of it runs, faulthandler ends it from a C thread (CPython, Modules/faulthandler.c).
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from orchestrator.train import failure
from orchestrator.train.board import Board, Sign
from orchestrator.train.launcher import launcher_keeps_the_store
from orchestrator.train.verdict import HungRank, State, silent_launcher, verdict
from orchestrator.train.world import World

LOG = logging.getLogger("orchestrator.train")

SAVE, EVALUATE = "saving", "evaluation"
PATIENCE = {SAVE: 6.0, EVALUATE: 6.0}
"""How many times the time limit a phase may take; all others once."""

BEATS = 8
"""Signs of life within one time limit, at most BEAT_SECONDS apart."""

BEAT_SECONDS = 10.0
ANSWERS = 2.5
"""Beats before the time limit in which the signs of the others are counted; who is silent in all of them counts as gone."""

LAST_LOOK_SECONDS = 0.75
"""For the store to answer when the time is over."""

SPEAK_SECONDS = 5.0
"""For the speaker to say why; who else has judged gives signs meanwhile."""

GRACE_SECONDS = 30.0
"""After the time limit, until a rank whose threads do not run is ended from outside Python."""


class Watch:
    """The watch of this rank while it takes steps. `seconds` 0: none."""

    def __init__(self, world: World, seconds: float, log: Path | None) -> None:
        self._world, self._seconds, self._log = world, seconds, log
        self._beat = min(BEAT_SECONDS, seconds / BEATS)
        self._closed = threading.Event()
        self._main = threading.get_ident()
        self._moved, self._step, self._phase, self._order = time.monotonic(), 0, "start", 0
        self._thread: threading.Thread | None = None
        self._stacks: Any = None
        if seconds > 0 and world.store is not None:
            self._stacks = log.open("a") if log is not None else None
            self._board = Board(world.store, world.rank, world.size)
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

    @property
    def place(self) -> tuple[int, str]:
        """(step, phase) in which this rank was last."""
        return self._step, self._phase

    def close(self) -> None:
        """End the watch; a rank that is done is not missed."""
        self._closed.set()
        if self._thread is not None:
            faulthandler.cancel_dump_traceback_later()
            self._board.close()
            self._thread.join()
        if self._stacks is not None:
            self._stacks.close()

    def _limit(self) -> float:
        return self._seconds * PATIENCE.get(self._phase, 1.0)

    def _state(self) -> State:
        """What this rank says of itself. Its stack belongs to every sign: a rank that came late into the collective in which
        another has waited for the whole limit waits as that one does, and only its stack says so."""
        stack = tuple(self._stack())
        return State(self._world.rank, self._world.host, os.getpid(), self._step, self._phase, self._order, stack)

    def _run(self) -> None:
        asked: Mapping[int, Sign] | None = None
        while not self._closed.wait(min(self._beat, max(0.01, self._moved + self._limit() - time.monotonic()))):
            idle, limit = time.monotonic() - self._moved, self._limit()
            if idle <= limit - ANSWERS * self._beat:
                asked = None
                self._board.say(self._state())
            elif idle <= limit:
                # Signs go on after the first answer: who judges a moment sooner would else take this rank for silent.
                seen = self._board.look(self._state(), min(self._beat, limit - idle))
                asked = asked or seen
            else:
                self._judge(idle, asked)
                return

    def _stack(self) -> list[str]:
        frame = sys._current_frames().get(self._main)
        found = [(each.f_code, line) for each, line in traceback.walk_stack(frame)] if frame is not None else []
        return [f"{code.co_filename}:{line} in {code.co_name}" for code, line in reversed(found)]

    def _judge(self, idle: float, before: Mapping[int, Sign] | None) -> None:
        """Gather what all ranks say, and have said `before` when this one began to wonder; the first that answers speaks, and
        this process ends."""
        own = self._state()
        after = self._board.look(own, LAST_LOOK_SECONDS, ANSWERS * self._beat)
        if after is None:
            self._judge_the_store(idle, own)
            return
        before = before or {}
        states = []
        for rank in range(self._world.size):
            signs, state = after.get(rank, (0, self._unheard(rank)))
            silent = signs == (before[rank][0] if rank in before else 0)
            states.append(replace(state, stack=() if silent else state.stack))
        # A rank in a phase that may take longer judges later: it cannot speak for the others.
        awaited = [
            state for state in states if state.answers and PATIENCE.get(state.phase, 1.0) <= PATIENCE.get(own.phase, 1.0)
        ]
        speaker = min((state.rank for state in awaited), default=self._world.rank)
        self._keep(states)
        gone = [state for state in states if not state.answers]
        self._leave(speaker, verdict(states, idle, self._log), gone)

    def _judge_the_store(self, idle: float, own: State) -> None:
        """End where nobody can be asked: the process that keeps the store does not answer. On another machine than its own, if
        there is one, somebody is left to say so. Where it has ended instead, it has said why, and its launcher ends the rest:
        only a rank that this does not reach speaks, of itself."""
        hosts = self._world.hosts
        self._keep([own])
        kept = launcher_keeps_the_store()
        ranks = [rank for rank in range(self._world.size) if rank or kept]
        speaker = min([rank for rank in ranks if hosts[rank] != hosts[0]] or ranks, default=self._world.rank)
        if kept:
            self._leave(speaker, silent_launcher(hosts[0], idle, self._log), ())
        elif self._board.lost:
            time.sleep(SPEAK_SECONDS)
            failure.abandon(verdict([own], idle + SPEAK_SECONDS, self._log), self._log)
        else:
            first = replace(self._board.first or self._unheard(0), stack=())
            self._leave(speaker, verdict([first], idle, self._log), [first])

    def _unheard(self, rank: int) -> State:
        """What is known of a rank that has given no sign of life yet."""
        return State(rank, self._world.hosts[rank], self._world.pids[rank], 0, "start", 0)

    def _leave(self, speaker: int, error: HungRank, gone: Sequence[State]) -> None:
        """End this process; the `speaker` says why before, and ends those `gone` after it, since the launcher ends a run as
        soon as one process has."""
        if speaker != self._world.rank and not self._is_still_there(speaker):
            failure.abandon(None, self._log)
        failure.abandon(error, self._log, lambda: self._end(gone))

    def _is_still_there(self, speaker: int) -> bool:
        """Whether `speaker` goes on giving signs when it should have spoken and left: it came into the step so late that its
        own time is not over. Signs are given meanwhile, since it would else take this rank for silent."""
        self._wait(SPEAK_SECONDS)
        before = self._board.look(self._state(), LAST_LOOK_SECONDS)
        self._wait(ANSWERS * self._beat)
        after = self._board.look(self._state(), LAST_LOOK_SECONDS)
        if before is None or after is None or speaker not in before:
            return False
        return after[speaker][0] > before[speaker][0]

    def _wait(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self._board.say(self._state())
            time.sleep(min(self._beat, 1.0))

    def _end(self, gone: Sequence[State]) -> None:
        """End the processes on this machine that no longer answer: a stopped one would not hear the launcher's signal."""
        for state in gone:
            if state.host == self._world.host and state.pid != os.getpid():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(state.pid, signal.SIGKILL)

    def _keep(self, states: Sequence[State]) -> None:
        """Write into the log what the ranks have said, and NCCL's flight recorder beside it, where torch has one:
        `torchfrtrace` reads the files of all ranks."""
        for state in states:
            LOG.error("rank %d, step %d, %s:\n%s", state.rank, state.step, state.phase, "\n".join(state.stack))
        dump = getattr(torch._C._distributed_c10d, "_dump_nccl_trace", None)
        if dump is not None and self._log is not None and self._world.device.type == "cuda":
            (self._log.parent / f"nccl_trace_rank_{self._world.rank}").write_bytes(dump())
