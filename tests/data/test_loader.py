"""Steps and evaluation: the same samples in the same steps whatever the ranks, and nothing lost or twice."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from orchestrator.data import IGNORED, MicroBatch, Prepared, StepBatch, eval_batches, steps, steps_per_epoch
from orchestrator.data.order import epoch_order, global_batches
from orchestrator.errors import ConfigError, DataError
from orchestrator.spec import Batch

PAD = 0
Row = tuple[tuple[int, ...], tuple[int, ...]]


def length_of(ids: torch.Tensor) -> int:
    """Tokens of a row without its padding: no sample holds the pad token."""
    return int((ids != PAD).sum())


def real_rows(batch: MicroBatch) -> list[Row]:
    """(ids, labels) of the rows that are samples, without their padding."""
    found = []
    for ids, labels in zip(batch.input_ids, batch.labels, strict=True):
        length = length_of(ids)
        if length:
            found.append((tuple(ids[:length].tolist()), tuple(labels[:length].tolist())))
    return found


def run(prepared: Prepared, global_size: int, micro: int, ranks: int, total: int, start: int = 0) -> list[list[StepBatch]]:
    """The steps of every rank: result[step][rank]."""
    batch = Batch(global_size, micro, global_size // micro // ranks)
    made = [
        list(steps(prepared, batch, seed=5, rank=rank, ranks=ranks, pad_id=PAD, start_step=start, total_steps=total))
        for rank in range(ranks)
    ]
    return [list(of_ranks) for of_ranks in zip(*made, strict=True)]


def contents(of_ranks: list[StepBatch]) -> Counter[Row]:
    """The multiset of samples of one step over all ranks."""
    return Counter(row for step in of_ranks for micro in step.micro_batches for row in real_rows(micro))


@pytest.mark.parametrize(("micro", "ranks"), [(16, 1), (4, 1), (8, 2), (2, 2), (4, 4), (1, 4)])
def test_the_steps_do_not_depend_on_ranks_or_accumulation(sample: Prepared, micro: int, ranks: int) -> None:
    reference = run(sample, 16, 1, 1, total=40)
    other = run(sample, 16, micro, ranks, total=40)
    assert [contents(step) for step in other] == [contents(step) for step in reference]
    for step, (one,) in zip(other, reference, strict=True):
        for rank in step:
            assert (rank.step, rank.epoch, rank.labelled, rank.tokens) == (one.step, one.epoch, one.labelled, one.tokens)
            assert len(rank.micro_batches) == 16 // micro // ranks
            assert all(batch.input_ids.shape[0] == micro for batch in rank.micro_batches)


def test_counts_are_those_of_the_global_batch(sample: Prepared) -> None:
    for of_ranks in run(sample, 16, 2, 2, total=20):
        labels = sum(int((batch.labels[:, 1:] != IGNORED).sum()) for step in of_ranks for batch in step.micro_batches)
        rows = contents(of_ranks)
        assert of_ranks[0].labelled == labels
        assert of_ranks[0].tokens == sum(len(ids) * count for (ids, _), count in rows.items())


def test_an_epoch_shows_each_training_sample_once_and_ends_with_a_short_batch(sample: Prepared) -> None:
    batch = Batch(16, 4, 2)
    per_epoch = steps_per_epoch(sample, batch)
    assert len(sample.train) == 232
    assert per_epoch == 15
    made = run(sample, 16, 4, 2, total=2 * per_epoch)
    expected = Counter((tuple(sample.input_ids[i].tolist()), tuple(sample.labels[i].tolist())) for i in sample.train)
    for epoch in (0, 1):
        of_epoch = made[epoch * per_epoch : (epoch + 1) * per_epoch]
        assert {rank.epoch for step in of_epoch for rank in step} == {epoch}
        assert sum((contents(step) for step in of_epoch), Counter()) == expected
        assert sum(contents(of_epoch[-1]).values()) == 232 - 14 * 16 == 8
    assert [contents(step) for step in made[:per_epoch]] != [contents(step) for step in made[per_epoch:]]


def test_filler_rows_learn_nothing(sample: Prepared) -> None:
    last = run(sample, 16, 4, 2, total=15)[-1]
    empty = [batch for rank in last for batch in rank.micro_batches if not real_rows(batch)]
    assert len(empty) == 2
    for batch in empty:
        assert batch.input_ids.shape == (4, 2)
        assert (batch.labels == IGNORED).all()
        assert (batch.input_ids == PAD).all()


def test_fillers_beside_samples_learn_nothing(sample: Prepared) -> None:
    small = replace(sample, train=sample.train[:3])
    (step,) = steps(small, Batch(4, 4, 1), seed=0, rank=0, ranks=1, pad_id=PAD, total_steps=1)
    (batch,) = step.micro_batches
    assert len(real_rows(batch)) == 3
    assert (batch.labels[3] == IGNORED).all()
    assert (batch.input_ids[3] == PAD).all()


def test_rows_are_padded_on_the_right_to_the_longest_of_the_micro_batch(sample: Prepared) -> None:
    for (step,) in run(sample, 16, 4, 1, total=15):
        for batch in step.micro_batches:
            assert batch.input_ids.dtype == batch.labels.dtype == torch.int64
            lengths = [length_of(ids) for ids in batch.input_ids]
            if any(lengths):
                assert max(lengths) == batch.input_ids.shape[1]
            for ids, labels, length in zip(batch.input_ids, batch.labels, lengths, strict=True):
                assert (ids[:length] != PAD).all() and (labels[length:] == IGNORED).all()


def test_ranks_work_on_like_lengths_longest_first(sample: Prepared) -> None:
    for of_ranks in run(sample, 16, 2, 2, total=14):
        widths = [batch.input_ids.shape[1] for pair in zip(*(r.micro_batches for r in of_ranks), strict=True) for batch in pair]
        assert widths == sorted(widths, reverse=True)


@pytest.mark.parametrize("start", [1, 14, 15, 33])
def test_starting_later_gives_the_same_batches(sample: Prepared, start: int) -> None:
    whole = run(sample, 16, 4, 2, total=36)[start:]
    resumed = run(sample, 16, 4, 2, total=36, start=start)
    assert len(whole) == len(resumed)
    for one, other in zip(whole, resumed, strict=True):
        for a, b in zip(one, other, strict=True):
            assert (a.step, a.epoch, a.labelled, a.tokens) == (b.step, b.epoch, b.labelled, b.tokens)
            for x, y in zip(a.micro_batches, b.micro_batches, strict=True):
                assert torch.equal(x.input_ids, y.input_ids)
                assert torch.equal(x.labels, y.labels)


def test_a_start_after_the_end_gives_nothing(sample: Prepared) -> None:
    assert run(sample, 16, 16, 1, total=3, start=3) == []


def test_the_order_is_pinned() -> None:
    """Another order would break the resuming of every old run."""
    assert epoch_order(np.arange(8), 5, 0).tolist() == [1, 4, 2, 3, 7, 5, 6, 0]
    assert epoch_order(np.arange(8), 5, 1).tolist() == [4, 2, 5, 0, 7, 6, 3, 1]


def test_a_far_step_costs_no_replay() -> None:
    (step, epoch, samples), *_ = global_batches(
        lambda epoch: epoch_order(np.arange(10), 0, epoch), 10, 4, start_step=3 * 10**9 + 2, total_steps=3 * 10**9 + 3
    )
    assert (step, epoch, len(samples)) == (3 * 10**9 + 2, 10**9, 2)


def test_a_batch_larger_than_the_data_is_filled_up(sample: Prepared) -> None:
    small = replace(sample, train=sample.train[:3])
    made = run(small, 16, 4, 2, total=2)
    assert [sum(contents(step).values()) for step in made] == [3, 3]
    assert [step[0].epoch for step in made] == [0, 1]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("micro", [1, 4, 5])
def test_evaluation_shows_every_held_out_sample_once_in_equal_turns(sample: Prepared, micro: int, ranks: int) -> None:
    per_rank = [list(eval_batches(sample, micro, rank, ranks, PAD)) for rank in range(ranks)]
    assert len({len(batches) for batches in per_rank}) == 1
    shown = Counter(row for batches in per_rank for batch in batches for row in real_rows(batch))
    assert shown == Counter((tuple(sample.input_ids[i].tolist()), tuple(sample.labels[i].tolist())) for i in sample.eval)
    labels = sum(int((batch.labels[:, 1:] != IGNORED).sum()) for batches in per_rank for batch in batches)
    assert labels == sample.eval_labelled


def test_evaluation_of_nothing_is_empty(sample: Prepared) -> None:
    assert list(eval_batches(replace(sample, eval=sample.eval[:0]), 4, 0, 2, PAD)) == []


def test_sizes_that_disagree_are_refused(sample: Prepared) -> None:
    with pytest.raises(ConfigError, match=r"16 is not micro 3 × accumulation 2 × 2 data-parallel ranks = 12"):
        steps(sample, Batch(16, 3, 2), seed=0, rank=0, ranks=2, pad_id=PAD, total_steps=1)


def test_a_step_without_learned_tokens_is_refused_and_the_thread_ends(sample: Prepared) -> None:
    blank = replace(sample, labelled=np.zeros_like(sample.labelled))
    before = threading.active_count()
    with pytest.raises(DataError, match=r"none of the 16 samples of step 2 \(samples (\d+, ){8}\.\.\.\) has a learned token"):
        list(steps(blank, Batch(16, 16, 1), seed=0, rank=0, ranks=1, pad_id=PAD, start_step=2, total_steps=4))
    assert threading.active_count() == before


def test_breaking_off_ends_the_thread(sample: Prepared) -> None:
    before = threading.active_count()
    stream = steps(sample, Batch(16, 16, 1), seed=0, rank=0, ranks=1, pad_id=PAD, total_steps=100)
    assert next(stream).step == 0
    assert threading.active_count() == before + 1
    stream.close()
    assert threading.active_count() == before
