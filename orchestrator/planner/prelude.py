"""Before a run: settle its strategy, plan it, and refuse what does not fit. Called once for all ranks."""

from __future__ import annotations

from dataclasses import dataclass, replace

from orchestrator.errors import Fault, MisfitError
from orchestrator.planner.choose import choose
from orchestrator.planner.fixes import fixes
from orchestrator.planner.plan import SHORT, TIGHT, Plan
from orchestrator.planner.planning import AUTO, names_strategy, plan_of
from orchestrator.planner.predict import by_layout
from orchestrator.spec import RunSpec
from orchestrator.units import format_bytes

REFUSE, WARN = "refuse", "warn"
"""Values of plan.on_misfit; under "ignore" nothing is said."""


@dataclass(frozen=True, slots=True)
class Prelude:
    """The spec to run, its plan, and what to tell the person, line by line."""

    spec: RunSpec
    plan: Plan
    lines: tuple[str, ...]


def predicted(plan: Plan) -> str:
    """The plan in one line: what each card, or each rank's share of the memory, will hold."""
    on_card = plan.card != "cpu"
    where = "on each card" if on_card else "of memory for each rank"
    used, limit = format_bytes(plan.memory.used), format_bytes(plan.memory.limit)
    speed = f", {plan.seconds:.2f} s a step" if plan.seconds is not None else ""
    tight = ", tight" if plan.verdict == TIGHT else ""
    host = f", {format_bytes(plan.host.need)} of host memory" if on_card and plan.offloads else ""
    disk = f", {format_bytes(plan.nvme.need)} on NVMe for each rank" if plan.nvme.need else ""
    peak = f"peak in {plan.peak.phase} ({plan.peak.what})"
    return f"{used} of {limit} {where}{tight}{host}{disk}, {peak}{speed}; from the {plan.basis}"


def misfit(plan: Plan) -> Fault:
    """Why the run does not fit, with numbers, and what to change."""
    largest = ", ".join(f"{line} {format_bytes(count)}" for line, count in plan.peak.alive[:3])
    need = f"{format_bytes(plan.memory.used)} needed, {format_bytes(plan.memory.limit)} there ({largest})"
    if not plan.memory.short:
        room = plan.host if plan.host.short else plan.nvme
        need = f"{format_bytes(room.need)} needed, {format_bytes(room.limit)} there"
    remedy = "\n    -> ".join(fix.sentence for fix in plan.fixes) or "take more or larger cards, or a smaller model"
    remedy += "\n    -> plan.on_misfit=warn runs it all the same"
    return Fault(f"{plan.words} on {plan.cluster}", f"{plan.shortfall}: {need}", remedy)


def _plan(spec: RunSpec) -> Plan:
    """The Layout's plan, in milliseconds; before a refusal in a doubtful case a rehearsal has the last word."""
    made = by_layout(spec)
    if made.verdict != SHORT:
        return made
    made = plan_of(spec, AUTO)
    return made if made.fits or made.fixes else replace(made, fixes=fixes(spec, made))


def settle(spec: RunSpec) -> Prelude:
    """The prelude of `spec`: with several ranks and neither zero nor fsdp, under the fastest strategy that fits.

    Raises:
        MisfitError: it does not fit and plan.on_misfit is "refuse", or no strategy was named and none fits.
    """
    lines = []
    if not names_strategy(spec) and spec.strategy.ranks > 1:
        choice = choose(spec)
        spec = choice.candidate.spec
        lines.append(f"chosen   {choice.reason}")
    plan = _plan(spec)
    if not plan.fits and spec.plan.on_misfit == REFUSE:
        raise MisfitError(misfit(plan))
    lines.append(f"plan     {predicted(plan)}")
    if not plan.fits and spec.plan.on_misfit == WARN:
        lines.append(f"warning  {misfit(plan)}")
    return Prelude(spec, plan, tuple(lines))
