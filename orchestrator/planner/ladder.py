"""The ladder: how far a strategy can go on its cards before it stops fitting."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from orchestrator.planner.candidates import Candidate
from orchestrator.planner.fixes import fixes
from orchestrator.planner.plan import MARGIN, Fix, Plan
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


def spare(plan: Plan) -> float:
    """Bytes that a plan leaves of what it may fill and still be called safe, of the memory that is nearest to its end; negative
    where it is not."""
    share = 1 - MARGIN[plan.basis]
    rooms = [(plan.memory.used, plan.memory.limit * share), (plan.host.need, plan.host.limit * share)]
    return min(limit - need for need, limit in (*rooms, (plan.nvme.need, plan.nvme.limit)) if limit)


def largest(left: Callable[[int], float], most: int) -> int:
    """The largest n of 1..`most` of which `left` is not negative; 0 if it is of 1. `left` falls with n, about in a line: each
    guess is where the line through the last two meets zero, and halves what lies between them where that hardly moves."""
    low, high = 1, most
    at_low, at_high = left(low), left(high)
    if at_low < 0:
        return 0
    if at_high >= 0:
        return most
    guessed = True
    while high - low > 1:
        before = high - low
        on_line = low + int(before * at_low / (at_low - at_high))
        middle = min(max(on_line if guessed else low + before // 2, low + 1), high - 1)
        found = left(middle)
        if found >= 0:
            low, at_low = middle, found
        else:
            high, at_high = middle, found
        guessed = high - low <= before // 2 or not guessed
    return low


def ladder(candidate: Candidate) -> Rung:
    """How far `candidate` goes, by the Layout, with the margin of its basis left free."""
    spec = candidate.spec
    table = table_for(spec)
    shape = spec.model.shape
    bound = shape.max_position_embeddings if shape is not None and shape.max_position_embeddings else LONGEST

    def plan_at(micro: int, seq_len: int) -> Plan:
        return by_layout(with_length(with_micro(spec, micro), seq_len), table)

    micro = largest(lambda size: spare(plan_at(size, spec.data.seq_len)), LARGEST_MICRO)
    steps = largest(lambda count: spare(plan_at(1, count * LENGTH_STEP)), max(1, bound // LENGTH_STEP))
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
