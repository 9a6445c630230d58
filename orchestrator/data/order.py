"""Which samples make up which step: a pure function of the seed, the epoch and the global batch, never of the ranks."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from orchestrator.data.prepared import Counts, Prepared
from orchestrator.data.rows import rows_of
from orchestrator.errors import ConfigError, Fault
from orchestrator.spec import Batch
from orchestrator.units import ceil_div


def steps_per_epoch(prepared: Prepared, batch: Batch) -> int:
    """Optimizer steps of one pass over the training split; the last one may be short."""
    return ceil_div(len(rows_of(prepared)), batch.global_size)


def epoch_order(indices: Counts, seed: int, epoch: int) -> Counts:
    """`indices` in the order of `epoch` (from 0)."""
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch])))
    return generator.permutation(indices)


def global_batches(
    indices: Counts, size: int, *, seed: int, start_step: int, total_steps: int
) -> Iterator[tuple[int, int, Counts]]:
    """(step, epoch, samples) of the steps [start_step, total_steps), each from its number alone: nothing is replayed."""
    per_epoch = ceil_div(len(indices), size)
    shuffled_epoch, order = -1, indices
    for step in range(start_step, total_steps):
        epoch, place = divmod(step, per_epoch)
        if epoch != shuffled_epoch:
            shuffled_epoch, order = epoch, epoch_order(indices, seed, epoch)
        yield step, epoch, order[place * size : (place + 1) * size]


def deal(samples: Counts, lengths: Counts, *, micro: int, rank: int, ranks: int, micro_batches: int) -> list[Counts]:
    """The `micro_batches` groups of at most `micro` samples that `rank` takes from `samples`.

    Samples go longest first, so that a group needs little padding, the ranks work on like lengths at the same time, and
    the step's peak of memory comes first. Group j of the whole batch is the (j // ranks)-th of rank j % ranks; the last
    ones may be short or empty.
    """
    ordered = samples[np.argsort(-lengths[samples], kind="stable")]
    return [ordered[group * micro : (group + 1) * micro] for group in range(rank, micro_batches * ranks, ranks)]


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
