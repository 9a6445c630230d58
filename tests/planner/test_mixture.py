"""Samples of several lengths: which are drawn, that they are really performed, and what their order does to the allocator."""

from __future__ import annotations

from array import array

import pytest
import torch
from truth_cases import Case, run_spec

from orchestrator.planner.allocator import replay
from orchestrator.planner.habits import with_foreach, without_masters
from orchestrator.planner.orders import ORDERS, orders
from orchestrator.planner.performance import Performance
from orchestrator.planner.programme import EARLIER, KEPT, Programme, mixture, spread
from orchestrator.planner.rehearsal import rehearse
from orchestrator.planner.trace import Note, Trace
from orchestrator.planner.tracer import Tracer
from orchestrator.spec import Engine

LENGTHS = (24, 9, 17, 32)


def test_a_mixture_follows_the_lengths_and_ends_with_the_longest():
    drawn = mixture(range(1, 1001), micro=1, count=10)
    assert sorted(drawn) == [51, 151, 251, 351, 451, 551, 651, 751, 851, 1000] and drawn[-1] == 1000
    assert drawn != tuple(sorted(drawn))
    pairs = mixture(range(1, 1001), micro=2, count=10)  # the longer of two: half of them above the median's square root
    assert sorted(pairs)[5] == 742 and mixture([7], micro=4, count=3) == (7, 7, 7)


def test_lengths_are_told_from_their_mean_and_deviation():
    found = spread(3000, 2000, 10**6, dropped=False)
    assert sum(found) / len(found) == pytest.approx(3000, rel=0.01)
    cut, dropped = spread(3000, 2000, 2048, dropped=False), spread(3000, 2000, 2048, dropped=True)
    assert max(cut) == 2048 == sorted(cut)[len(cut) // 2] and len(dropped) < len(cut) / 2 and max(dropped) <= 2048
    assert spread(3000, 1, 100, dropped=True) == [100]


def test_steps_hold_no_more_micro_batches_than_there_are_lengths():
    spec = run_spec(Case(1, "plain", "lora", "fp32", "none", 4))
    fitted, programme = Programme((5, 6, 7, 8, 9)).fitted(spec)
    assert fitted.batch.accumulation == 2 and programme.steps(fitted) == [(6, 7), (8, 9)]
    assert Programme.from_json(programme.to_json()) == programme
    assert Programme().steps(spec) == [(spec.data.seq_len,) * 4] * 2


@pytest.mark.parametrize("loss", [EARLIER, KEPT])
def test_a_rehearsed_mixture_is_the_real_one_to_the_byte(loss):
    spec = run_spec(Case(1, "plain", "lora", "fp32", "full", 1))
    programme = Programme(LENGTHS, loss)
    tracer = Tracer({"cpu": "gpu"})
    Performance(spec, torch.device("cpu"), tracer, programme=programme).run()
    rehearsed = rehearse(spec, programme=programme).trace
    assert tracer.trace().segments == rehearsed.segments and rehearsed.segments.count("step") == len(LENGTHS)
    assert tracer.trace().peaks("gpu") == rehearsed.peaks("gpu")
    several = list(orders(rehearsed))
    assert len(several) == (ORDERS if loss == EARLIER else 1)  # what is kept until the next forward ties steps together
    assert all(sorted(trace.block) == sorted(rehearsed.block) for trace in several)
    assert len({replay(trace, expandable=False).peak_allocated for trace in several}) == 1


SEGMENTS = ("load", "forward", "backward", "step", "save")


def told(*events: tuple[int, int, str], lines: dict[int, str] | None = None) -> Trace:
    """A trace of (block or its negative, bytes, segment)."""
    notes = tuple(Note("op", index) for index in range(len(SEGMENTS)))
    columns = [array("q", column) for column in zip(*((b, s, SEGMENTS.index(name)) for b, s, name in events), strict=True)]
    return Trace(SEGMENTS, notes, *columns, lines=lines or {})


def test_a_run_without_masters_holds_halves():
    lines = {1: "weights", 2: "master", 4: "moments", 5: "moments"}
    trace = told(
        (1, 200, "load"), (2, 400, "load"), (3, 400, "backward"), (4, 400, "step"), (5, 400, "step"), (-3, 400, "step"),
        (-5, 400, "save"), (-4, 400, "save"), lines=lines,
    )  # fmt: skip
    plain, fsdp = without_masters(trace, Engine.PLAIN), without_masters(trace, Engine.FSDP)
    assert trace.peak() == 1800 and plain.peak() == 200 + 200 + 400 and fsdp.peak() == 100 + 200 + 400
    assert with_foreach(plain).peak() == plain.peak() + 200
