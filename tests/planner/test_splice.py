"""Truth 2: splicing is exact. A few layers spliced to the whole depth give the events of the whole depth, one by one."""

from __future__ import annotations

from array import array
from dataclasses import replace

import pytest

from orchestrator.config import compose
from orchestrator.planner.allocator import replay
from orchestrator.planner.buckets import BUCKET, emptied_in_time
from orchestrator.planner.rehearsal import FEW, rehearse, shallow
from orchestrator.planner.splice import splice
from orchestrator.planner.trace import Note, Trace
from orchestrator.spec import RunSpec

SHAPES = [
    ["cluster=1xa10"], ["cluster=1xa10", "recompute=full"], ["cluster=1xa10", "tuning=lora"],
    ["cluster=1xa10", "tuning=lora", "recompute=full"], ["cluster=1xa10", "precision=fp32"],
    ["cluster=1xa10", "model=qwen25_0_5b", "batch.micro=2"], ["fsdp=full_shard"], ["fsdp=full_shard", "recompute=full"],
    ["fsdp=full_shard", "tuning=lora"], ["fsdp=full_shard", "tuning=lora", "recompute=full"], ["fsdp=shard_grad_op"],
    ["fsdp=full_shard", "offload=cpu"], ["fsdp=hybrid_shard"], ["fsdp=full_shard", "batch.global_size=8"],
    ["fsdp=full_shard", "recompute=selective"], ["fsdp=full_shard", "tuning=lora", "recompute=offload"],
    ["cluster=1xa10", "recompute=selective", "tuning=lora"], ["cluster=1xa10", "attention=eager"],
    ["cluster=1xa10", "tuning=qlora"], ["cluster=1xa10", "tuning=head", "tuning.quant=nf4", "tuning.untie=true"],
    ["cluster=1xa10", "optimizer=adamw_8bit", "recompute=every_n"], ["fsdp=full_shard", "tuning=qlora", "tuning.quant=int8"],
    ["fsdp=full_shard", "tuning=lora", "tuning.dora=true"], ["fsdp=full_shard", "optimizer=muon"],
    ["fsdp=full_shard", "tuning=lora", "tuning.modules=[norms]"], ["fsdp=full_shard", "tensor=2", "tuning=lora"],
    ["tensor=2", "recompute=every_n", "optimizer=lion"],
]  # fmt: skip

ZERO3 = [
    "zero=stage3", "tuning=lora", "zero.max_live_parameters=80000000", "zero.max_reuse_distance=80000000",
    "zero.prefetch_bucket=20000000", "zero.reduce_bucket=6000000",
]  # fmt: skip
"""Thresholds that reach 1.7 layers, as those of a model of 70 B do, and a bucket that is full after 8."""

SHAPES += [[*ZERO3, *more] for more in (
    ["recompute=full", "batch.global_size=12"], ["tuning.dora=true"],
    ["precision=fp16", "recompute=selective"], ["recompute=offload", "data.packing=best_fit"],
)]  # fmt: skip


def spec_of(overrides: list[str]) -> RunSpec:
    """Eleven layers of a Llama of 1 B (eighteen where every second differs and under ZeRO-3), 256 tokens, on 4xa10, unless said
    otherwise."""
    base = ["model=llama32_1b", "cluster=4xa10", "data.seq_len=256", "batch.micro=1", "batch.global_size=4"]
    spec = compose([*base, *overrides])
    assert spec.model.shape is not None
    layers = 18 if spec.recompute == "every_n" or "zero=stage3" in overrides else 11
    return replace(spec, model=replace(spec.model, shape=replace(spec.model.shape, num_hidden_layers=layers)))


def same_as_whole(overrides: list[str]) -> None:
    spliced, whole = rehearse(spec_of(overrides)), rehearse(spec_of(overrides), whole=True)
    assert (spliced.basis, whole.basis) == ("spliced", "full")
    events = [[(e.block > 0, e.bytes, e.note) for e in r.trace] for r in (spliced, whole)]
    assert events[0] == events[1]
    assert spliced.peaks == whole.peaks
    for expandable in (False, True):
        assert replay(spliced.trace, expandable=expandable) == replay(whole.trace, expandable=expandable)


@pytest.mark.parametrize("overrides", [SHAPES[6], ZERO3], ids=" ".join)
def test_spliced_is_whole(overrides: list[str]) -> None:
    same_as_whole(overrides)


@pytest.mark.slow
@pytest.mark.parametrize("overrides", SHAPES, ids=" ".join)
def test_every_shape_spliced_is_whole(overrides: list[str]) -> None:
    same_as_whole(overrides)


def layered(layers: int, *, growing: bool = False) -> Trace:
    """A forward that keeps two blocks a layer, a backward that frees them in reverse, and one block that grows with depth."""
    notes = (Note("embed", 0), Note("attend", 0), Note("mix", 0), Note("free", 1), Note("sum", 1))
    events: list[tuple[int, int, int]] = [(1, 512, 0)]
    for layer in range(layers):
        size = 100 * (layer + 1) if growing else 100
        events += [(2 + 2 * layer, size, 1), (3 + 2 * layer, 200, 2)]
    events += [(-block, size, 3) for block, size, _ in reversed(events)]
    total = 2 + 2 * layers
    events += [(total, 4 * layers, 4), (-total, 4 * layers, 3)]
    columns = [array("q", column) for column in zip(*events, strict=True)]
    return Trace(("forward", "backward"), notes, *columns)


def test_a_layer_is_repeated_and_its_frees_find_their_blocks() -> None:
    found = splice(layered(4), layered(5), 6)
    assert found is not None
    assert list(found) == list(layered(10))


def test_layers_that_are_not_alike_are_not_spliced() -> None:
    assert splice(layered(4, growing=True), layered(5, growing=True), 6) is None


def test_other_segments_are_not_spliced() -> None:
    assert splice(layered(4), replace(layered(5), segments=("forward", "step")), 6) is None


def filled() -> Trace:
    """A backward that puts five gradients of ten elements, two bytes each, into a bucket and empties it at its end."""
    notes = (Note("mm", 0), Note("mark", 0, home=BUCKET), Note("free", 0, home=BUCKET), Note("cat", 0, stream=2))
    events: list[tuple[int, int, int]] = []
    for gradient in range(1, 6):
        events += [(gradient, 20, 0), (100 + gradient, 10, 1)]
    events += [(-100 - gradient, 10, 2) for gradient in range(1, 6)]
    events += [(200, 100, 3), (-200, 100, 3)]
    return Trace(("backward",), notes, *(array("q", column) for column in zip(*events, strict=True)))


@pytest.mark.parametrize(("most", "copies"), [(30, [60, 40]), (39, [60, 40]), (50, [100])])
def test_a_full_bucket_is_emptied_before_the_next_gradient(most: int, copies: list[int]) -> None:
    found = emptied_in_time(filled(), most, 2)
    assert found is not None
    assert [(e.block > 0, e.bytes) for e in found if e.note.op == "cat"] == [(m, n) for n in copies for m in (True, False)]
    assert not any(event.note.home == BUCKET for event in found)
    if len(copies) > 1:
        assert list(found)[4].note.op == "cat"  # four gradients were made, the fourth does not go in any more


@pytest.mark.parametrize(
    ("most", "width"), [(20, 2), (50, 4)], ids=["one gradient is left alone", "the copy is of another size"]
)
def test_a_bucket_that_is_emptied_otherwise_is_not_told(most: int, width: int) -> None:
    assert emptied_in_time(filled(), most, width) is None


@pytest.mark.parametrize(
    "overrides",
    [
        ["zero=stage2"],
        ["zero=stage3"],
        ["zero=stage3", "tuning=lora"],
        [*ZERO3, "zero.gradients=fp32"],
        [*ZERO3, "tuning=qlora"],
    ],
    ids=" ".join,
)
def test_what_sums_over_layers_is_traced_whole(overrides: list[str]) -> None:
    assert shallow(spec_of(overrides)) is None


def test_a_shallow_model_is_traced_whole() -> None:
    spec = spec_of(["fsdp=full_shard"])
    assert spec.model.shape is not None
    few = replace(spec, model=replace(spec.model, shape=replace(spec.model.shape, num_hidden_layers=2 * FEW)))
    assert shallow(spec) == FEW and shallow(few) is None
