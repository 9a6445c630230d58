"""Steps of training and passes of evaluation, as the batches of one rank."""

from __future__ import annotations

import queue
import threading
from collections.abc import Collection, Generator, Iterator
from typing import TypeVar, cast

import numpy as np
import torch

from orchestrator.data.batch import IGNORED, MicroBatch, StepBatch
from orchestrator.data.order import FILLER_LENGTH, check_batch, deal, drawn, epoch_size, global_batches, padded
from orchestrator.data.prepared import Counts, Prepared
from orchestrator.data.rows import Rows, rows_of
from orchestrator.errors import DataError, Fault
from orchestrator.spec import Batch
from orchestrator.units import ceil_div

T = TypeVar("T")

PREFETCHED_STEPS = 2
"""Steps that are made ready ahead of the one being trained."""


def steps(
    prepared: Prepared,
    batch: Batch,
    *,
    seed: int,
    rank: int,
    ranks: int,
    pad_id: int,
    start_step: int = 0,
    total_steps: int,
    skipped: Collection[int] = (),
    split: str = "train",
) -> Generator[StepBatch]:
    """The steps `start_step` … `total_steps` - 1 of `rank` (of `ranks` data-parallel ones), made ready in the background;
    those `skipped` are left out, and no other step gets other samples for that.

    Each has `batch.accumulation` micro-batches of exactly `batch.micro` rows; the last step of an epoch is filled up with
    rows that learn nothing. All micro-batches of all ranks together are the same samples for any number of ranks and any
    accumulation. `StepBatch.step` counts from 0.

    Raises:
        ConfigError: the sizes of the batch do not agree.
        DataError: a global batch has no learned token.
    """
    check_batch(batch, rank, ranks)
    rows = rows_of(prepared, split)

    def order_of(epoch: int) -> Counts:
        return drawn(rows, seed, epoch)

    def made() -> Iterator[StepBatch]:
        count, size = epoch_size(rows), batch.global_size
        numbered = global_batches(order_of, count, size, start_step=start_step, total_steps=total_steps)
        for step, epoch, chosen in numbered:
            if step in skipped:
                continue
            labelled = int(rows.labelled[chosen].sum())
            if not labelled:
                raise _nothing_to_learn(step, rows, chosen)
            groups = deal(chosen, rows.lengths, micro=batch.micro, rank=rank, ranks=ranks, micro_batches=batch.accumulation)
            micro_batches = tuple(collate(prepared, rows, group, batch.micro, pad_id) for group in groups)
            positions = padded(rows.lengths[chosen], batch.micro, ranks * batch.accumulation)
            yield StepBatch(step, epoch, micro_batches, labelled, int(rows.lengths[chosen].sum()), positions)

    return _ahead(made(), PREFETCHED_STEPS)


def eval_batches(prepared: Prepared, micro: int, rank: int, ranks: int, pad_id: int) -> Iterator[MicroBatch]:
    """The held-out rows that fall to `rank`, each on one rank only.

    Every rank gets the same number of micro-batches of exactly `micro` rows, so that none waits for another; rows that
    learn nothing fill them up. Divide the sum of all losses by `prepared.eval_labelled`.
    """
    rows = rows_of(prepared, "eval")
    count = ceil_div(ceil_div(len(rows), micro), ranks)
    for group in deal(np.arange(len(rows)), rows.lengths, micro=micro, rank=rank, ranks=ranks, micro_batches=count):
        yield collate(prepared, rows, group, micro, pad_id)


def collate(prepared: Prepared, rows: Rows, chosen: Counts, micro: int, pad_id: int) -> MicroBatch:
    """The `chosen` rows (at most `micro`), padded on the right to the longest, then rows that only fill up.

    Padding goes on counting the positions of the document before it, so that it does not pass for one of its own.
    """
    width = int(rows.lengths[chosen].max()) if len(chosen) else FILLER_LENGTH
    input_ids = np.full((micro, width), pad_id, dtype=np.int64)
    labels = np.full((micro, width), IGNORED, dtype=np.int64)
    positions = np.tile(np.arange(width, dtype=np.int64), (micro, 1))
    for place, row in enumerate(chosen):
        start = 0
        for document in rows.documents(int(row)):
            stop = start + int(prepared.lengths[document])
            input_ids[place, start:stop] = prepared.input_ids[document]
            labels[place, start + 1 : stop] = prepared.labels[document][1:]
            positions[place, start:] -= positions[place, start]
            start = stop
    packed = torch.from_numpy(positions) if prepared.packing != "none" else None
    return MicroBatch(torch.from_numpy(input_ids), torch.from_numpy(labels), packed)


def _nothing_to_learn(step: int, rows: Rows, chosen: Counts) -> DataError:
    samples = np.concatenate([rows.documents(int(row)) for row in chosen])
    listed = ", ".join(str(sample) for sample in samples[:8]) + (", ..." if len(samples) > 8 else "")
    problem = f"none of the {len(samples)} samples of step {step} (samples {listed}) has a learned token"
    return DataError(Fault("data", problem, "raise data.seq_len or batch.global_size, or mend those samples"))


def _ahead(source: Iterator[T], depth: int) -> Generator[T]:
    """The items of `source` in order, up to `depth` of them made ready by a thread; what it raises is raised here.

    The thread ends with the iteration, also when that is broken off.
    """
    ready: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()
    free, closed = threading.Semaphore(depth), threading.Event()

    def fill() -> None:
        while free.acquire() and not closed.is_set():
            try:
                ready.put((next(source), None))
            except BaseException as error:  # StopIteration too: it travels to the reader, which ends or raises
                ready.put((None, error))
                return

    thread = threading.Thread(target=fill, name="data", daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            free.release()
            yield cast(T, item)
    finally:
        closed.set()
        free.release()
        thread.join()
