"""The ladder: how far a strategy can go on its cards before it stops fitting."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from orchestrator.planner.candidates import Candidate
from orchestrator.planner.fixes import fixes
from orchestrator.planner.plan import FITS, Fix, Plan
from orchestrator.planner.predict import by_layout, table_for
from orchestrator.spec import Batch, Parameter, RunSpec
from orchestrator.units import ceil_div

LENGTH_STEP = 128
"""Sequence lengths are tried in multiples of this."""

LARGEST_MICRO = 1024
LONGEST = 1_048_576


@dataclass(frozen=True, slots=True)
class Rung:
    """How far one strategy goes. `micro` is the largest micro-batch at the stated length, `seq_len` the longest sequence at
    micro-batch 1, 0 where even that does not fit; `limited_by` says whether the model's own limit ended the search.

    `used`, `host` (of one rank) and `tokens_per_second` are those of the largest micro-batch; `short` is what one sample of
    the stated length lacks, 0 also where it would fit but for the margin.
    """

    words: str
    model: str
    tuning: str
    cluster: str
    stated_len: int
    micro: int
    seq_len: int
    limited_by: str
    used: int
    limit: int
    host: int
    tokens_per_second: float | None
    short: int


def with_micro(spec: RunSpec, micro: int) -> RunSpec:
    """`spec` with another micro-batch; the global batch grows to the next multiple where it does not divide."""
    accumulation = ceil_div(spec.batch.global_size, spec.strategy.dp * micro)
    return replace(spec, batch=Batch(spec.strategy.dp * micro * accumulation, micro, accumulation))


def with_length(spec: RunSpec, seq_len: int) -> RunSpec:
    """`spec` with another sequence length."""
    return replace(spec, data=replace(spec.data, seq_len=seq_len))


def largest(passes: Callable[[int], bool], most: int) -> int:
    """The largest n of 1..`most` that passes, where all below it do too; 0 if not even 1 does."""
    if not passes(1):
        return 0
    low, high = 1, 2
    while high <= most and passes(high):
        low, high = high, 2 * high
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if passes(middle) else (low, middle)
    return low


def ladder(candidate: Candidate) -> Rung:
    """How far `candidate` goes, by the Layout, with the margin of its basis left free."""
    spec = candidate.spec
    table = table_for(spec)
    shape = spec.model.shape
    bound = shape.max_position_embeddings if shape is not None and shape.max_position_embeddings else LONGEST

    def plan_at(micro: int, seq_len: int) -> Plan:
        return by_layout(with_length(with_micro(spec, micro), seq_len), table)

    micro = largest(lambda size: plan_at(size, spec.data.seq_len).verdict == FITS, LARGEST_MICRO)
    steps = largest(lambda count: plan_at(1, count * LENGTH_STEP).verdict == FITS, max(1, bound // LENGTH_STEP))
    best = plan_at(max(1, micro), spec.data.seq_len)
    return Rung(
        candidate.words,
        spec.model.name,
        spec.tuning.kind,
        spec.cluster.name,
        spec.data.seq_len,
        micro,
        steps * LENGTH_STEP,
        "model" if steps == bound // LENGTH_STEP else "memory",
        best.memory.used,
        best.memory.limit,
        best.host.need,
        best.tokens_per_second,
        0 if micro else max(best.memory.short, best.host.short),
    )


def remedies(every: Sequence[Candidate]) -> tuple[Fix, ...]:
    """The smallest changes that make the least short of `every` fit; empty where nothing known does."""

    def shortest(candidate: Candidate) -> int:
        spec = with_micro(candidate.spec, 1)
        table: Sequence[Parameter] = table_for(spec)
        plan = by_layout(spec, table)
        return plan.memory.short + plan.host.short

    nearest = with_micro(min(every, key=shortest).spec, 1)
    return fixes(nearest, by_layout(nearest))
