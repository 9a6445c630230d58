"""Which samples make up which step: a pure function of the seed, the epoch and the global batch, never of the ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np

from orchestrator.data.prepared import Counts, Prepared
from orchestrator.data.rows import Rows, rows_of
from orchestrator.errors import ConfigError, Fault
from orchestrator.spec import Batch
from orchestrator.units import ceil_div

FILLER_LENGTH = 2
"""Length of a micro-batch that holds no sample: the shortest in which one position predicts another."""


def steps_per_epoch(prepared: Prepared, batch: Batch) -> int:
    """Optimizer steps of one pass over the training split; the last one may be short."""
    return ceil_div(epoch_size(rows_of(prepared)), batch.global_size)


def epoch_size(rows: Rows) -> int:
    """Rows that one epoch shows, each as often as it is shown; the same for every epoch."""
    return sum(int(weight) * (stop - start) + _extra(stop - start, weight) for start, stop, weight in rows.shares)


def _extra(count: int, weight: float) -> int:
    """Of `count` rows, how many an epoch shows once more, or at all where `weight` is below 1; one at least."""
    part = weight - math.floor(weight)
    return max(1, round(part * count)) if part and count else 0


def drawn(rows: Rows, seed: int, epoch: int) -> Counts:
    """The rows of `epoch` (from 0), each as often as it is shown, in order.

    Where a weight is no whole number, the rows beyond it change from epoch to epoch: a window that goes round and round
    through one fixed shuffle, so that in time all are shown equally often.
    """
    found = []
    for start, stop, weight in rows.shares:
        count = stop - start
        found.append(np.tile(np.arange(start, stop), int(weight)))
        if extra := _extra(count, weight):
            generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, 0x3E16, start])))
            window = (epoch * extra + np.arange(extra)) % count
            found.append(start + generator.permutation(count)[window])
    return epoch_order(np.concatenate(found), seed, epoch)


def epoch_order(indices: Counts, seed: int, epoch: int) -> Counts:
    """`indices` in the order of `epoch` (from 0)."""
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch])))
    return generator.permutation(indices)


def global_batches(
    order_of: Callable[[int], Counts], count: int, size: int, *, start_step: int, total_steps: int
) -> Iterator[tuple[int, int, Counts]]:
    """(step, epoch, rows) of the steps [start_step, total_steps), each from its number alone: nothing is replayed.

    `order_of(epoch)` gives the `count` rows of an epoch in order.
    """
    per_epoch = ceil_div(count, size)
    current, order = -1, np.zeros(0, np.int64)
    for step in range(start_step, total_steps):
        epoch, place = divmod(step, per_epoch)
        if epoch != current:
            current, order = epoch, order_of(epoch)
        yield step, epoch, order[place * size : (place + 1) * size]


def deal(samples: Counts, lengths: Counts, *, micro: int, rank: int, ranks: int, micro_batches: int) -> list[Counts]:
    """The `micro_batches` groups of at most `micro` samples that `rank` takes from `samples`.

    Samples go longest first, so that a group needs little padding, the ranks work on like lengths at the same time, and
    the step's peak of memory comes first. Group j of the whole batch is the (j // ranks)-th of rank j % ranks; the last
    ones may be short or empty.
    """
    ordered = samples[np.argsort(-lengths[samples], kind="stable")]
    return [ordered[group * micro : (group + 1) * micro] for group in range(rank, micro_batches * ranks, ranks)]


def padded(lengths: Counts, micro: int, groups: int) -> int:
    """The positions of a global batch of rows of `lengths` with their padding, dealt into `groups` micro-batches."""
    longest = np.sort(lengths)[::-1][::micro]
    return micro * (int(longest.sum()) + (groups - len(longest)) * FILLER_LENGTH)


def check_batch(batch: Batch, rank: int, ranks: int) -> None:
    """Pass if the three sizes agree for this number of data-parallel ranks.

    Raises:
        ConfigError: they do not.
    """
    if batch.global_size != batch.micro * batch.accumulation * ranks:
        product = f"{batch.micro} × accumulation {batch.accumulation} × {ranks} data-parallel ranks"
        problem = f"{batch.global_size} is not micro {product} = {batch.micro * batch.accumulation * ranks}"
        raise ConfigError(Fault("batch.global_size", problem, "set batch.global_size to that product"))
    assert 0 <= rank < ranks, f"rank {rank} of {ranks}"
