"""When and by whom a checkpoint is written: at once, or by a thread while the next steps are taken."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, repeat
from pathlib import Path

import torch

from orchestrator.engine.protocol import Piece
from orchestrator.errors import CheckpointError
from orchestrator.train.world import World

Write = Callable[[Iterator[Piece], World], tuple[Path, int]]
"""Writes the pieces of this rank together with its peers: (the checkpoint, bytes of its tensors over all ranks)."""


SETTLE_SECONDS = 60.0
"""For a save that is being written when the run ends otherwise; launchers end a run some 30 s after its first rank."""


@dataclass(frozen=True, slots=True)
class Saved:
    """A finished checkpoint: `stall_seconds` training stood still for it, `seconds` passed until it was on the disk."""

    path: Path
    bytes: int
    stall_seconds: float
    seconds: float


class Saver:
    """Saves one checkpoint after another; in the background the next one waits until the last is on the disk.

    In the background the pieces are copied to host memory first, so a rank holds its share of the training state twice there.
    That memory is kept for the next save: fresh pages would cost more than the copy. `report` is called, by the thread that
    trains, for each that is finished.
    """

    def __init__(self, world: World, report: Callable[[Saved], None], *, background: bool) -> None:
        self._world = world.beside() if background else world
        self._report, self._background = report, background
        self._thread: threading.Thread | None = None
        self._finished: Saved | None = None
        self._failure: BaseException | None = None
        self.failed = False
        """Whether a save in the background has failed, and that was raised."""
        self._memory: list[torch.Tensor] = []

    def save(self, pieces: Iterator[Piece], write: Write) -> None:
        """Write `pieces`, or copy them and have them written.

        Raises:
            CheckpointError: this or, in the background, the last save failed; every rank raises.
        """
        begun = time.perf_counter()
        self.wait()
        if not self._background:
            path, size = write(pieces, self._world)
            seconds = time.perf_counter() - begun
            self._report(Saved(path, size, seconds, seconds))
            return
        owned = (piece for piece in pieces if piece.owned)
        copies = [piece.copied(into) for piece, into in zip(owned, chain(self._memory, repeat(None)), strict=False)]
        self._memory = [piece.data for piece in copies]
        stall = time.perf_counter() - begun

        def work() -> None:
            try:
                path, size = write(iter(copies), self._world)
                self._finished = Saved(path, size, stall, time.perf_counter() - begun)
            except BaseException as error:  # carried to the thread that trains
                self._failure = error

        self._thread = threading.Thread(target=work, name="checkpoint", daemon=True)
        self._thread.start()

    def poll(self) -> None:
        """Report the save that has been finished meanwhile, if there is one. A failure that all ranks share waits for `wait`,
        which they reach together.

        Raises:
            BaseException: what has ended the save on this rank alone; the others wait for it there.
        """
        if self._thread is not None and not self._thread.is_alive() and not isinstance(self._failure, CheckpointError):
            self.wait()

    def settle(self) -> None:
        """Let the save that is being written come to its end, whatever ends the run: the threads of all ranks are at it, also
        where their steps wait for a rank that has failed. What it comes to is not told."""
        if self._thread is not None:
            self._thread.join(SETTLE_SECONDS)

    def wait(self) -> None:
        """Return when nothing is being written.

        Raises:
            CheckpointError: the last save failed.
        """
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        if self._failure is not None:
            failure, self._failure, self.failed = self._failure, None, True
            raise failure
        if self._finished is not None:
            finished, self._finished = self._finished, None
            self._report(finished)
