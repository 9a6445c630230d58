"""Repeating a middle micro-batch gives the trace of a longer accumulation, and fake results from memory are torch's own."""

from __future__ import annotations

from array import array
from dataclasses import replace

import pytest

from orchestrator.config import compose
from orchestrator.planner.allocator import replay
from orchestrator.planner.rehearsal import rehearse
from orchestrator.planner.repeat import repeat
from orchestrator.planner.trace import Note, Trace
from orchestrator.spec import RunSpec


def accumulated(micros: int, *, piling: bool = False) -> Trace:
    """One step of `micros` micro-batches: each frees what the one before left and leaves one block of its own."""
    segments: list[str] = ["load"]
    notes, events = [Note("load", 0)], [(1, 64, 0)]
    held, made = 1, 1
    for micro in range(micros):
        for phase in ("forward", "backward"):
            segments.append(phase)
            notes.append(Note(phase, len(segments) - 1))
        made += 1
        events.append((made, 64, 2 * micro + 1))
        if not piling:
            events.append((-held, 64, 2 * micro + 2))
        held = made
    segments.append("step")
    return Trace(tuple(segments), tuple(notes), *(array("q", column) for column in zip(*events, strict=True)))


@pytest.mark.parametrize("extra", [1, 4])
def test_the_middle_is_repeated_and_its_frees_find_their_blocks(extra: int) -> None:
    found = repeat(accumulated(3), extra)
    assert found is not None
    assert found.segments == accumulated(3 + extra).segments
    assert list(found) == list(accumulated(3 + extra))


def test_what_piles_up_is_not_repeated() -> None:
    assert repeat(accumulated(3, piling=True), 2) is None


@pytest.mark.parametrize("micros", [2, 4])
def test_only_three_micro_batches_are_repeated(micros: int) -> None:
    assert repeat(accumulated(micros), 2) is None


def spec_of(*overrides: str) -> RunSpec:
    spec = compose(
        ["model=llama32_1b", "cluster=4xa10", "data.seq_len=256", "batch.micro=1", "batch.global_size=20", *overrides]
    )
    assert spec.model.shape is not None
    return replace(spec, model=replace(spec.model, shape=replace(spec.model.shape, num_hidden_layers=2)))


def test_five_micro_batches_of_zero3_are_those_of_the_whole_trace() -> None:
    spec = spec_of("zero=stage3", "tuning=lora")
    repeated, whole = rehearse(spec), rehearse(spec, whole=True)
    assert (repeated.basis, whole.basis) == ("spliced", "full")
    assert repeated.peaks == whole.peaks
    for expandable in (False, True):
        assert replay(repeated.trace, expandable=expandable) == replay(whole.trace, expandable=expandable)
