"""Beginning anew with half the micro-batch when a rank runs out of memory (`health.on_oom=halve`).

A rank that fails inside a forward or backward has left its peers in a collective that it will not join: ZeRO-3 and FSDP2 gather
weights there, ZeRO-1 and 2 reduce gradients. No process group gives such a collective back: `ProcessGroupNCCL::abort` leaves a
communicator that can only be made anew (torch/csrc/distributed/c10d/ProcessGroupNCCL.hpp), gloo has no abort, and both engines
hold groups, hooks and half-filled buckets of the step. accelerate's `find_executable_batch_size` starts its function again on
the rank that failed alone, and the others hang. So every rank replaces its process by a new one of the same command (`execv`:
the same process for its launcher), which goes on from the last checkpoint. Nobody leaves before all have said that they will.

Several ranks go back to the last checkpoint and not to the step before: what they hold is whole, but stands behind a stream or
a thread that waits for the lost collective. A rank alone waits for nobody; it saves the step before and loses nothing.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path

from orchestrator.errors import Fault
from orchestrator.spec import Batch, RunSpec
from orchestrator.train.folder import RunFolder
from orchestrator.train.launcher import launcher_keeps_the_store
from orchestrator.train.meeting import ATTEMPT
from orchestrator.train.world import World

LOG = logging.getLogger("orchestrator.train")

POLL_SECONDS = 0.5
PATIENCE_SECONDS = 120.0
"""For all ranks to hear of it; a rank that does not is hung or gone, and the run ends as without this."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """What a process is told by the one that it replaces: `number` counts from 2, `micro` is the new micro-batch, `folder` that
    of the run, `why` the rank that had no memory left."""

    number: int
    micro: int
    folder: str
    why: str


def attempt() -> Attempt | None:
    """The attempt that this process is, None for a first one."""
    text = os.environ.get(ATTEMPT)
    return Attempt(**json.loads(text)) if text else None


def halved(batch: Batch) -> Batch | None:
    """The batch with at most half the samples in a forward and as many more forwards; None where it has one alone."""
    share = batch.micro * batch.accumulation
    micro = next((size for size in range(batch.micro // 2, 0, -1) if share % size == 0), None)
    return None if micro is None else replace(batch, micro=micro, accumulation=share // micro)


def renewed(spec: RunSpec) -> RunSpec:
    """The spec of this process: that of its command, in the folder and with the micro-batch of the attempt, from its newest
    checkpoint. Where the run began from another's checkpoint and had saved none, it begins there again in a fresh folder."""
    told = attempt()
    if told is None:
        return spec
    share = spec.batch.micro * spec.batch.accumulation
    batch = replace(spec.batch, micro=told.micro, accumulation=share // told.micro)
    own = spec.resume in ("none", "auto") or RunFolder(Path(told.folder)).newest_checkpoint() is not None
    where = told.folder if own else f"{told.folder}-attempt-{told.number}"
    return replace(spec, batch=batch, run=replace(spec.run, dir=where), resume="auto" if own else spec.resume)


def words(spec: RunSpec) -> list[str]:
    """What to say of this attempt, nothing of a first one."""
    told = attempt()
    if told is None:
        return []
    batch = spec.batch
    forwards = f"batch.micro={batch.micro} × {batch.accumulation} forwards (the global batch stays {batch.global_size})"
    return [f"attempt  {told.number}: {told.why}; now {forwards}"]


def replace_process() -> None:
    """Run this process's command again in its place; it does not return. Nothing stays open but the three standard files."""
    for entry in list(Path("/proc/self/fd").iterdir()):
        if int(entry.name) > 2:
            try:
                os.set_inheritable(int(entry.name), False)
            except OSError:
                continue  # that of the listing itself
    sys.stdout.flush()
    sys.stderr.flush()
    logging.shutdown()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])  # noqa: S606 - the very command that runs


class Renewal:
    """The next attempt of this run. On several ranks a thread listens for the one that asks for it."""

    def __init__(self, spec: RunSpec, world: World, folder: Path, leave: Callable[[], None]) -> None:
        self._world, self._folder, self._leave = world, folder, leave
        self.batch = halved(spec.batch)
        self._lock, self._closed, self._begun = threading.Lock(), threading.Event(), threading.Event()
        if world.size > 1 and self.batch is not None:
            threading.Thread(target=self._listen, name="renewal", daemon=True).start()

    def ask(self, why: str) -> Fault:
        """Have all ranks begin anew; returns only where they cannot, and says why."""
        if self._world.size == 1:
            self._go(why)
        else:
            self._world.store.compare_set("renewal/asked", "", why)
            self._agree()
        problem = f"not all {self._world.size} ranks have answered within {PATIENCE_SECONDS:.0f} s"
        return Fault("health.on_oom", problem, "look at the log of the others")

    def close(self) -> None:
        """Nobody can ask any more. Where they have begun to leave this waits to be replaced: what broke, broke for that."""
        if self._begun.is_set():
            time.sleep(PATIENCE_SECONDS)
        self._closed.set()

    def _listen(self) -> None:
        try:
            while not self._closed.wait(POLL_SECONDS):
                if self._world.store.check(["renewal/asked"]):
                    self._agree()
                    return
        except RuntimeError as error:
            LOG.warning("the store has gone: %s", str(error).splitlines()[0])

    def _agree(self) -> None:
        """Say that this rank is ready, and leave when all are; return where they are not in time."""
        with self._lock:
            self._begun.set()
            store, rank, size = self._world.store, self._world.rank, self._world.size
            try:
                why = store.get("renewal/asked").decode()  # rank 0 takes the store with it
                store.set(f"renewal/ready/{rank}", "")
                store.wait([f"renewal/ready/{other}" for other in range(size)], timedelta(seconds=PATIENCE_SECONDS))
            except RuntimeError as error:
                LOG.error("the ranks have not come together for a new attempt: %s", str(error).splitlines()[0])
                self._begun.clear()
                return
            if rank and not launcher_keeps_the_store():
                self._await_the_end_of_rank_0()
            self._go(why)

    def _await_the_end_of_rank_0(self) -> None:
        """Rank 0 keeps the store: its successor must be the one that this rank's successor finds."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline:
            try:
                self._world.store.check(["renewal/asked"])
            except RuntimeError:
                return
            time.sleep(0.05)

    def _go(self, why: str) -> None:
        assert self.batch is not None, "a micro-batch of one was told before"
        earlier = attempt()
        number = 2 if earlier is None else earlier.number + 1
        following = Attempt(number, self.batch.micro, str(self._folder.resolve()), why)
        os.environ[ATTEMPT] = json.dumps(asdict(following))
        LOG.info("attempt %d begins, with batch.micro=%d", number, self.batch.micro)
        self._leave()
        self._begun.clear()
