"""The strategy for a run that names none: the fastest that fits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.errors import Fault, MisfitError
from orchestrator.planner.candidates import RECOMPUTE, Candidate, candidates
from orchestrator.planner.plan import FITS, SHORT, Plan
from orchestrator.planner.predict import by_layout, table_for
from orchestrator.planner.traffic import traffic
from orchestrator.spec import Parameter, RunSpec
from orchestrator.units import format_bytes

ALIKE = 0.01
"""Strategies within this share of the fastest count as equally fast; of those without offload, where there are some, the one
that needs least memory is taken."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The candidate taken, its plan, and why, in one line."""

    candidate: Candidate
    plan: Plan
    reason: str


def slowness(plan: Plan, spec: RunSpec, table: Sequence[Parameter]) -> float:
    """Seconds of a step; where the rates are not known the bytes that it sends, which then is all that differs."""
    if plan.seconds is not None:
        return plan.seconds
    moved = traffic(spec, table)
    recompute = 1 + (spec.recompute != RECOMPUTE[0])
    return float((1 + moved.sent + moved.fetched + moved.returned) * recompute)


def _reason(words: str, plan: Plan, fitting: int, tried: int) -> str:
    used, limit = format_bytes(plan.memory.used), format_bytes(plan.memory.limit)
    if plan.seconds is None:
        return (
            f"{words}: of {fitting} strategies that fit (of {tried}) the one that sends the fewest bytes, as this processor's "
            f"speed is not known; {used} of {limit} for each rank"
        )
    return (
        f"{words}: the fastest of {fitting} strategies that fit (of {tried}); {plan.seconds:.2f} s a step, "
        f"{used} of {limit} on each card"
    )


def choose(spec: RunSpec) -> Choice:
    """The fastest strategy that fits on the ranks of `spec`, by the Layout; recompute is added only where it is needed.

    Raises:
        MisfitError: none fits; names the one that is least short.
    """
    table = table_for(spec)
    every = candidates(spec, RECOMPUTE if spec.recompute == RECOMPUTE[0] else (spec.recompute,))
    # A disk wears under it: only who asks for NVMe gets it.
    tried = tuple(candidate for candidate in every if candidate.spec.strategy.nvme is None)
    plans = [(candidate, by_layout(candidate.spec, table)) for candidate in tried]
    safe = [pair for pair in plans if pair[1].verdict == FITS] or [pair for pair in plans if pair[1].verdict != SHORT]
    if not safe:
        nearest, plan = min(plans, key=lambda pair: pair[1].memory.short + pair[1].host.short)
        remedy = "add tuning=lora, or take" if spec.tuning.kind == "full" else "take"
        remedy += " more or larger cards, a shorter data.seq_len or a smaller model"
        problem = f"none of {len(plans)} strategies fits; {nearest.words} is {plan.shortfall}"
        raise MisfitError(Fault(f"{spec.model.name} on {spec.cluster.name}", problem, remedy))
    speed = {candidate.words: slowness(plan, candidate.spec, table) for candidate, plan in safe}
    fastest = min(speed.values())
    alike = [pair for pair in safe if speed[pair[0].words] <= fastest * (1 + ALIKE)]
    candidate, plan = min(alike, key=lambda pair: (pair[1].offloads, pair[1].memory.used))
    return Choice(candidate, plan, _reason(candidate.words, plan, len([p for _, p in plans if p.fits]), len(plans)))
