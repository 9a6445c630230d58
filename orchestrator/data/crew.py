"""Processes that tokenise side by side, in order, holding a few chunks at a time.

A batch system sends its signals to every process of a job. The crew hears none of them: its parent notes the signal, finishes
what it needs and ends the crew itself.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.resource_tracker import ensure_running

from orchestrator.data.encode import Chunk, Encoder, Shard
from orchestrator.errors import DataError, Fault

WORTH_PROCESSES = 16_000_000
"""Bytes of data from which processes of their own, that take seconds to start, are worth it."""

WAITING = 2
"""Chunks in hand for each process: one at work and one that waits."""

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""What a batch system, a person and a job script send."""

LOOK_SECONDS = 5.0
"""Between two looks of a process whether its parent still lives."""

_encoder: Encoder | None = None
"""What this process encodes with, if it is one of a crew."""


def crew_size(wanted: int | None, size: int) -> int:
    """How many processes tokenise `size` bytes: as wanted, else one for each core, or none for little data."""
    if wanted is not None:
        return wanted
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cores if size >= WORTH_PROCESSES and cores > 1 else 0


def encode_all(encoder: Encoder, chunks: Iterable[Chunk], processes: int) -> Iterator[Shard]:
    """The shard of each chunk, in order; with 0 `processes` they are made in this one.

    Raises:
        DataError: a process was killed.
    """
    if not processes:
        yield from map(encoder.encode, chunks)
        return
    # A fresh interpreter: this one may hold threads and a card, which do not survive a fork.
    context = multiprocessing.get_context("spawn")
    with _sheltered():
        ensure_running()  # multiprocessing's own helper, which would else unblock signals as it starts with the first process
    with ProcessPoolExecutor(processes, context, initializer=_begin, initargs=(encoder,)) as pool:
        waiting: deque[Future[Shard]] = deque()
        try:
            for chunk in chunks:
                with _sheltered():
                    waiting.append(pool.submit(_encode, chunk))
                if len(waiting) > WAITING * processes:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            problem = f"one of the {processes} processes that tokenise was ended from outside, perhaps for want of memory"
            raise DataError(Fault("data.workers", problem, "set data.workers=0 to tokenise in one process")) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _sheltered() -> Iterator[None]:
    """While it lasts, processes that this thread starts are born deaf to SIGNALS; this one hears them when it ends."""
    former = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)


def _obey_parent(parent: int) -> None:
    """Of all SIGNALS, heed the SIGTERM of `parent` alone, with which a pool ends its processes; end with it, too."""
    while os.getppid() == parent:
        heard = signal.sigtimedwait(SIGNALS, LOOK_SECONDS)
        if heard is not None and heard.si_signo == signal.SIGTERM and heard.si_pid == parent:
            break
    os._exit(1)


def _begin(encoder: Encoder) -> None:
    """Take up the encoder."""
    global _encoder
    threading.Thread(target=_obey_parent, args=(os.getppid(),), name="signals", daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _encoder = encoder


def _encode(chunk: Chunk) -> Shard:
    assert _encoder is not None, "the process has begun"
    return _encoder.encode(chunk)
