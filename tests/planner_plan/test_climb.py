"""The ladder of changes, from the cheapest to the dearest, for the cases in which people climb it."""

from __future__ import annotations

import io

from rich.console import Console

from orchestrator.config import compose
from orchestrator.planner.climb import climb, first_that_fits
from orchestrator.planner.predict import by_layout
from orchestrator.report import ladders, plans

FULL = ["model=llama3_8b", "cluster=1xa10", "precision=fp32", "batch.micro=8", "data.seq_len=2048"]


def shown(steps) -> str:
    file = io.StringIO()
    plans.show(ladders.rungs(steps), Console(file=file, width=160))
    return file.getvalue()


def test_what_the_rungs_add_is_what_one_would_type() -> None:
    steps = climb(compose(FULL))
    fitting = first_that_fits(steps)
    assert fitting is not None
    added = [word for step in steps[1 : fitting + 1] for word in step.adds.split()]
    replaced = {word.partition("=")[0] for word in added}
    made = by_layout(compose([*(word for word in FULL if word.partition("=")[0] not in replaced), *added]))
    assert (made.memory.used, made.verdict) == (steps[fitting].used, "fits")


def test_the_order_is_from_the_cheapest_to_the_dearest() -> None:
    names = [step.name.partition(" (")[0] for step in climb(compose(FULL))]
    assert names[1:] == [
        "mixed precision", "smaller micro-batch", "recompute", "low-bit optimizer", "QLoRA", "shorter sequence",
        "offload to the host", "offload to a disk",
    ]  # fmt: skip


def test_several_ranks_begin_where_nothing_is_divided_and_shard_before_they_offload() -> None:
    steps = climb(compose(["model=llama3_8b", "cluster=4xa10", "data.seq_len=2048"], strict=False))
    adds = [step.adds for step in steps]
    assert adds[0] == "zero=stage0"
    assert adds.index("zero=stage3") < adds.index("zero=stage3 offload=cpu")


def test_saved_bytes_add_up() -> None:
    steps = climb(compose(FULL))
    assert steps[0].used - sum(step.saves for step in steps) == steps[-1].used


def test_the_arrow_stands_at_the_first_rung_that_fits() -> None:
    steps = climb(compose(FULL))
    fitting = first_that_fits(steps)
    assert fitting is not None and all(step.verdict != "fits" for step in steps[:fitting])
    line = next(line for line in shown(steps).splitlines() if "->" in line)
    assert steps[fitting].adds in line


def test_a_run_that_fits_is_told_so() -> None:
    assert "it fits as it is" in shown(climb(compose(["model=llama32_1b", "cluster=1xa10", "tuning=lora", "data.seq_len=512"])))


def test_where_no_rung_is_high_enough_that_is_said() -> None:
    steps = climb(compose(["model=llama3_8b", "cluster=1xt4", "cluster.card.memory_mib=1500", "data.seq_len=512"]))
    assert first_that_fits(steps) is None
    assert "no rung is high enough" in shown(steps)
