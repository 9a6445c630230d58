"""What to change so that a run fits: every change that the project knows, tried and ranked by what it costs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from orchestrator.planner.candidates import RECOMPUTE, candidates
from orchestrator.planner.plan import Fix, Plan
from orchestrator.planner.predict import by_layout, table_for
from orchestrator.spec import LINEARS, Batch, Parameter, RunSpec, Tuning

MOST = 4
"""Fixes shown at once."""

SHORTEST = 128
"""Tokens below which a shorter sequence is no remedy."""


def smaller_batches(spec: RunSpec) -> Iterator[tuple[str, RunSpec]]:
    """Micro-batches of half the size and less; the global batch stays, so the result does too."""
    share = spec.batch.global_size // spec.strategy.dp
    micro = spec.batch.micro // 2
    while micro >= 1:
        if share % micro == 0:
            yield f"batch.micro={micro}", replace(spec, batch=Batch(spec.batch.global_size, micro, share // micro))
        micro //= 2


def other_strategies(spec: RunSpec) -> Iterator[tuple[str, RunSpec]]:
    """The same run under another strategy, or with its activations recomputed."""
    if spec.recompute == RECOMPUTE[0]:
        yield "recompute=full", replace(spec, recompute="full")
    kinds = RECOMPUTE if spec.recompute == RECOMPUTE[0] else (spec.recompute,)
    for candidate in candidates(spec, kinds):
        if candidate.spec.strategy.label != spec.strategy.label:
            yield candidate.words, candidate.spec


def both(spec: RunSpec) -> Iterator[tuple[str, RunSpec]]:
    """Other strategies at a micro-batch of one, for a run that neither change alone makes fit."""
    for smaller, one in list(smaller_batches(spec))[-1:]:
        for words, other in other_strategies(one):
            yield f"{words} {smaller}", other


def other_results(spec: RunSpec) -> Iterator[tuple[str, RunSpec]]:
    """Changes that also change what is learned: shorter samples, adapters instead of all weights."""
    length = spec.data.seq_len // 2
    while length >= SHORTEST:
        yield f"data.seq_len={length}", replace(spec, data=replace(spec.data, seq_len=length))
        length //= 2
    if spec.tuning.kind == "full" and spec.model.shape is not None and spec.model.shape.known:
        lora = replace(spec, tuning=Tuning("lora", targets=LINEARS))
        yield "tuning=lora", lora
        for words, other in (*other_strategies(lora), *both(lora)):
            yield f"tuning=lora {words}", other


def _tried(spec: RunSpec, plan: Plan, changes: Iterator[tuple[str, RunSpec]], table: Sequence[Parameter]) -> list[Fix]:
    """The changes that fit with the margin of their basis, cheapest first; of equal ones the one that is shortest to type."""
    found = []
    for words, other in changes:
        new = by_layout(other, table if other.tuning == spec.tuning else None)
        if new.verdict != "fits":
            continue
        slowdown = new.seconds / plan.seconds if new.seconds and plan.seconds else None
        host = new.host.need if new.offloads else 0
        found.append(Fix(words, plan.memory.used - new.memory.used, slowdown, host))
    return sorted(found, key=lambda fix: (round(fix.slowdown or 0.0, 2), fix.words.count("="), -fix.saves))


def _one_of_each(fixes: Sequence[Fix]) -> list[Fix]:
    """The first of the fixes that begin alike: three stages of one engine say no more than the cheapest of them."""
    kinds: dict[str, Fix] = {}
    for fix in fixes:
        kinds.setdefault(fix.words.partition("=")[0], fix)
    return list(kinds.values())


def fixes(spec: RunSpec, plan: Plan) -> tuple[Fix, ...]:
    """The cheapest changes that make `spec` fit, those that keep its result first; empty where nothing known helps."""
    table = table_for(spec)
    same = _one_of_each(_tried(spec, plan, other_strategies(spec), table))
    smaller = _tried(spec, plan, smaller_batches(spec), table)[:1]
    kept = sorted(same + smaller, key=lambda fix: fix.slowdown or 0.0)
    kept = kept or _one_of_each(_tried(spec, plan, both(spec), table))
    changed = [] if len(kept) >= MOST else _one_of_each(_tried(spec, plan, other_results(spec), table))
    return tuple((kept + changed)[:MOST])
