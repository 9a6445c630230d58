"""Packing: how full the rows are, that documents in a row are blind to each other, and that the loss is the same."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import run_ranks

from orchestrator.config import compose
from orchestrator.data import IGNORED, MicroBatch, Prepared, eval_batches, load_tokenizer, prepare, steps, steps_per_epoch
from orchestrator.data.packing import best_fit
from orchestrator.data.rows import rows_of
from orchestrator.engine import make
from orchestrator.model import build, loss_sum, open_weights, table_of
from orchestrator.spec import Batch, Data

CPU = torch.device("cpu")
MODEL = (
    "model=tiny", "model.hidden_size=32", "model.head_dim=8", "model.intermediate_size=64", "model.num_hidden_layers=2",
    "precision=fp32",
)  # fmt: skip


def one_by_one(lengths: list[int], capacity: int) -> list[int]:
    """Best-fit decreasing as it is defined: the room left in each row."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms[rooms.index(min(fitting))] -= length
        else:
            rooms.append(capacity - length)
    return rooms


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(1, 40), max_size=120), st.integers(40, 70))
def test_rows_are_those_of_best_fit_decreasing(lengths: list[int], capacity: int) -> None:
    starts, members = best_fit(np.array(lengths, dtype=np.int64), capacity)
    assert sorted(members.tolist()) == list(range(len(lengths)))
    held = [sum(lengths[i] for i in members[a:b]) for a, b in itertools.pairwise(starts)]
    assert sorted(capacity - total for total in held) == sorted(one_by_one(lengths, capacity))


@pytest.fixture(scope="module")
def packed(sample: Prepared) -> Prepared:
    return replace(sample, packing="best_fit", seq_len=128)


def documents(batch: MicroBatch) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(ids, labels) of every document of a packed micro-batch; padding (id 0) goes with the last one and is cut off."""
    assert batch.position_ids is not None
    found = []
    for ids, labels, positions in zip(batch.input_ids, batch.labels, batch.position_ids, strict=True):
        starts = [*torch.nonzero(positions == 0).flatten().tolist(), len(ids)]
        for start, stop in itertools.pairwise(starts):
            assert positions[start:stop].tolist() == list(range(stop - start))
            assert labels[start] == IGNORED
            length = int((ids[start:stop] != 0).sum())
            if length:
                found.append((tuple(ids[start : start + length].tolist()), tuple(labels[start : start + length].tolist())))
    return found


@pytest.mark.parametrize(("micro", "ranks"), [(8, 1), (2, 2), (1, 4)])
def test_an_epoch_of_packed_rows_shows_every_document_once(packed: Prepared, micro: int, ranks: int) -> None:
    batch = Batch(8, micro, 8 // micro // ranks)
    total = steps_per_epoch(packed, batch)
    assert total * 8 >= len(rows_of(packed)) > (total - 1) * 8
    seen: Counter[Any] = Counter()
    for rank in range(ranks):
        for step in steps(packed, batch, seed=1, rank=rank, ranks=ranks, pad_id=0, total_steps=total):
            seen.update(document for micro_batch in step.micro_batches for document in documents(micro_batch))
    assert seen == Counter((tuple(packed.input_ids[i].tolist()), tuple(packed.labels[i].tolist())) for i in packed.train)


def test_counts_of_packed_steps_are_exact(packed: Prepared) -> None:
    for step in steps(packed, Batch(4, 2, 2), seed=3, rank=0, ranks=1, pad_id=0, total_steps=20):
        counted = sum(int((micro.labels[:, 1:] != IGNORED).sum()) for micro in step.micro_batches)
        assert step.labelled == counted
        assert step.tokens == sum(len(ids) for micro in step.micro_batches for ids, _ in documents(micro))
    held_out = sum(int((batch.labels[:, 1:] != IGNORED).sum()) for batch in eval_batches(packed, 2, 0, 1, 0))
    assert held_out == packed.eval_labelled


def tiny(*overrides: str) -> Any:
    """A tiny model with random weights, behind the plain engine."""
    spec = compose([*MODEL, "batch.micro=1", "batch.global_size=1", *overrides], ranks=1)
    engine = make(spec, CPU, loss_sum)
    model = build(spec, engine.building())
    engine.adopt(model, open_weights(spec, table_of(model)))
    return engine, model


def test_changing_one_document_moves_no_logit_of_the_others(packed: Prepared) -> None:
    _, model = tiny()
    (step, *_) = steps(packed, Batch(4, 4, 1), seed=0, rank=0, ranks=1, pad_id=0, total_steps=1)
    (batch,) = step.micro_batches
    assert batch.position_ids is not None
    own = (batch.position_ids == 0).cumsum(1)
    changed = batch.input_ids.clone()
    changed[own == 2] = (changed[own == 2] + 7) % 2048
    with torch.no_grad():
        before, after = (
            model(input_ids=ids, position_ids=batch.position_ids, use_cache=False).logits for ids in (batch.input_ids, changed)
        )
    moved = (before - after).abs().amax(-1)
    assert int(own.max()) >= 4
    assert moved[own != 2].max() == 0
    assert (moved[own == 2] > 1e-3).all()


def test_a_document_has_the_logits_that_it_has_alone(packed: Prepared) -> None:
    _, model = tiny()
    (step, *_) = steps(packed, Batch(1, 1, 1), seed=0, rank=0, ranks=1, pad_id=0, total_steps=1)
    (batch,) = step.micro_batches
    assert batch.position_ids is not None
    with torch.no_grad():
        together = model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits[0]
        starts = [*torch.nonzero(batch.position_ids[0] == 0).flatten().tolist(), batch.input_ids.shape[1]]
        assert len(starts) > 3
        for start, stop in itertools.pairwise(starts):
            alone = model(input_ids=batch.input_ids[:, start:stop], use_cache=False).logits[0]
            torch.testing.assert_close(together[start:stop], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_the_loss_per_token_and_its_gradient_are_the_same_packed_and_unpacked(packed: Prepared, tuning: str) -> None:
    found = {}
    for packing in ("none", "best_fit"):
        prepared = replace(packed, packing=packing)
        engine, _ = tiny(f"tuning={tuning}")
        batch = Batch(len(rows_of(prepared)), 1, len(rows_of(prepared)))
        (step,) = steps(prepared, batch, seed=0, rank=0, ranks=1, pad_id=0, total_steps=1)
        last = len(step.micro_batches) - 1
        total = sum(
            float(engine.forward_backward(micro, step.labelled, last=index == last).double())
            for index, micro in enumerate(step.micro_batches)
        )
        found[packing] = (total / step.labelled, engine.step(1e-3).grad_norm, step.labelled, len(step.micro_batches))
        engine.close()
    (loss, norm, labelled, samples), (packed_loss, packed_norm, packed_labelled, rows) = found["none"], found["best_fit"]
    assert labelled == packed_labelled
    assert rows < samples / 3
    assert packed_loss == pytest.approx(loss, rel=1e-6, abs=1e-6)
    assert packed_norm == pytest.approx(norm, rel=1e-5)


def test_every_engine_gives_the_loss_and_gradient_of_the_unpacked_reference(tmp_path: Path) -> None:
    ended = run_ranks(Path(__file__).with_name("packing_worker.py"), [str(tmp_path)], ranks=2, timeout=900)
    assert [code for code, _ in ended] == [0, 0], ended
    found = json.loads((tmp_path / "found.json").read_text())
    loss, norm = found.pop("plain")
    assert sorted(found) == ["fsdp=full_shard", "plain, packed", "zero=stage2", "zero=stage3"]
    for words, (packed_loss, packed_norm) in found.items():
        assert packed_loss == pytest.approx(loss, rel=1e-6), words
        assert packed_norm == pytest.approx(norm, rel=1e-5), words


def test_rows_of_a_real_file_are_full(shared_data: Path, shared_tokenizer_path: Path, tmp_path: Path) -> None:
    data = Data(
        str(shared_data / "alpaca_en_demo.json"), seq_len=2048, tokenizer=str(shared_tokenizer_path), packing="best_fit"
    )
    prepared = prepare(data, load_tokenizer(data, None), 0, tmp_path)
    assert rows_of(prepared).fill(2048) >= 0.99
