"""The tracer on real tensors, what a trace tells, and what a failed rehearsal says."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from planner.truth_cases import SHAPE, Case, run_spec

from orchestrator import spec as s
from orchestrator.planner.rehearsal import Rehearsal, RehearsalError, rehearse, summarize, with_chunk
from orchestrator.planner.trace import Trace
from orchestrator.planner.tracer import Tracer
from orchestrator.units import GIB

CPU = {"cpu": "gpu"}


def small_trace() -> Trace:
    """64 kB kept from load on; 40 kB more in forward, of which a view; both gone in backward, which makes 8 B."""
    tracer = Tracer(CPU)
    with tracer:
        tracer.enter_phase("load")
        weight = torch.zeros(16_000)
        tracer.name("weights", [weight])
        tracer.enter_phase("forward")
        activation = torch.ones(10_000)
        view = activation[:5]
        tracer.enter_phase("backward")
        del activation, view
        small = torch.zeros(2)
    del small, weight
    return tracer.trace()


def test_peaks_count_what_a_phase_finds_and_what_it_makes() -> None:
    trace = small_trace()
    assert trace.peaks() == {"load": 64_000, "forward": 104_000, "backward": 104_000}
    assert trace.peak() == 104_000
    assert trace.peaks("cpu") == {"load": 0, "forward": 0, "backward": 0}


def test_what_was_alive_at_the_peak() -> None:
    trace = small_trace()
    alive = trace.living(trace.peak_position())
    assert [(a.line, a.phase, a.bytes, a.blocks) for a in alive] == [
        ("weights", "load", 64_000, 1),
        ("activations", "forward", 40_000, 1),
    ]
    assert alive[0].op == "aten.zeros.default"


def test_a_storage_that_is_resized_is_freed_and_made_again() -> None:
    tracer = Tracer(CPU)
    with tracer:
        tracer.enter_phase("forward")
        gathered = torch.empty(1_000)
        gathered.untyped_storage().resize_(0)
        gathered.untyped_storage().resize_(4_000)
    sizes = [(event.block > 0, event.bytes) for event in tracer.trace()]
    assert sizes == [(True, 4_000), (False, 4_000), (True, 4_000)]


def test_json_gives_the_same_trace_and_rehearsal_back() -> None:
    rehearsal = summarize(1, small_trace(), 0.5)
    again = Rehearsal.from_json(json.loads(json.dumps(rehearsal.to_json())))
    assert again == rehearsal
    assert again.peak_phase == "forward" and again.peak_bytes == 104_000 and again.host_peak_bytes == 0


def card_spec(case: Case, compute: str = "bf16") -> s.RunSpec:
    spec = run_spec(replace(case, compute=compute), replace(SHAPE, num_hidden_layers=2))
    card = replace(spec.cluster.card, name="a10", memory_bytes=24 * GIB)
    return replace(spec, cluster=replace(spec.cluster, card=card))


def test_a_card_is_told_from_its_host() -> None:
    found = rehearse(card_spec(Case(2, "zero2_optimizer", "full", "bf16", "none", 1)))
    parameters = 2 * (257 * 48) + 48 + 2 * (2 * 48 + 48 * 48 * 2 + 48 * 24 * 2 + 3 * 48 * 80)
    assert found.peaks["cpu"]["step"] > 12 * parameters // 2  # master and moments of one of two ranks rest on the host
    assert found.peaks["gpu"]["step"] < 12 * parameters // 2
    assert {event.note.home for event in found.trace} == {"gpu", "cpu"}
    flash = "aten._scaled_dot_product_flash_attention.default"
    assert any(event.note.op == flash for event in found.trace)
    assert any(event.note.stream for event in found.trace)


def test_the_pieces_of_a_checkpoint_are_held_together() -> None:
    tracer = Tracer({"cpu": "cpu"})
    with tracer:
        tracer.enter_phase("save")
        for _ in range(3):
            torch.zeros(1_000)
    extended = with_chunk(tracer.trace())
    assert extended.peaks("cpu") == {"save": 12_000}
    assert with_chunk(small_save()) == small_save()


def small_save() -> Trace:
    tracer = Tracer(CPU)
    with tracer:
        tracer.enter_phase("save")
    return tracer.trace()


def test_a_failed_rehearsal_says_what_failed() -> None:
    spec = run_spec(Case(1, "plain", "lora", "bf16", "none", 1))
    wrong = replace(spec, tuning=replace(spec.tuning, targets=("no_such_layer",)))
    with pytest.raises(RehearsalError, match=r"plain: the rehearsal ended with code 1\n(.|\n)*no_such_layer") as caught:
        rehearse(wrong)
    assert len(str(caught.value).splitlines()) < 24


def test_zero3_fetches_weights_while_a_block_is_selectively_computed_again() -> None:
    """With weights let go behind each layer, the second forward fetches what the first one found there, or the other way."""
    spec = run_spec(Case(2, "zero3", "full", "bf16", "selective", 1))
    assert spec.strategy.buckets is not None
    buckets = replace(spec.strategy.buckets, max_reuse=0, max_live=8_000, prefetch=2_000, persistence=0)
    lean = rehearse(replace(spec, strategy=replace(spec.strategy, buckets=buckets)))
    assert 0 < lean.peak_bytes < rehearse(spec).peak_bytes


def test_a_rehearsal_that_takes_too_long_says_so() -> None:
    with pytest.raises(RehearsalError, match=r"plain: no result after 0 s"):
        rehearse(run_spec(Case(1, "plain", "full", "bf16", "none", 1)), timeout=0.2)
