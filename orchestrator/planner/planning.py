"""plan and compare: overrides in, Plans out. What the launch scripts, notebooks and tests call."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from orchestrator.cluster.local import local_cluster
from orchestrator.config import compose
from orchestrator.config.entry import sweep
from orchestrator.planner import store
from orchestrator.planner.candidates import RECOMPUTE, Candidate, candidates, typed
from orchestrator.planner.choose import choose
from orchestrator.planner.fixes import fixes
from orchestrator.planner.plan import LAYOUT, REHEARSAL, SHORT, Plan
from orchestrator.planner.predict import by_layout, by_rehearsal
from orchestrator.planner.rehearsal import RehearsalError
from orchestrator.spec import Engine, RunSpec

AUTO = "auto"
BASES = (AUTO, LAYOUT, REHEARSAL)
"""What a plan may rest on; "auto" rehearses where the Layout's answer could be wrong."""

DOUBT = 0.12
"""The closed form's largest error over 23 traced configurations (docs/planning.md): nearer to the limit than this, a
rehearsal decides."""

ASKED = 600.0
PATIENCE = 120.0
"""Seconds that a rehearsal may take: where it was asked for, and under basis "auto"."""

WORKERS = 2
"""Rehearsals at once; each is one process of one thread with up to 0.7 GB."""

Progress = Callable[[int, int, str], None]
"""Called with (plans made, plans in all, the words of the last)."""


def _doubtful(plan: Plan) -> bool:
    return abs(plan.memory.used - plan.memory.limit) <= DOUBT * plan.memory.limit


def _noted(plan: Plan, note: str) -> Plan:
    return replace(plan, notes=(*plan.notes, note))


def _reason(error: RehearsalError) -> str:
    """The line of a failed rehearsal that names the error, without the rank in front."""
    lines = [re.sub(r"^\[rank\d+\]:\s*", "", line).strip() for line in str(error).splitlines()]
    telling = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Drift)\b", line)] or lines
    return textwrap.shorten(telling[-1], 160)


def _made(spec: RunSpec, basis: str) -> Plan:
    if basis == LAYOUT:
        return by_layout(spec)
    if basis == AUTO and not _doubtful(by_layout(spec)):
        return by_layout(spec)
    try:
        return by_rehearsal(spec, timeout=PATIENCE if basis == AUTO else ASKED)
    except RehearsalError as error:
        if basis == REHEARSAL:
            raise
        return _noted(by_layout(spec), f"the rehearsal failed, so this is from the layout: {_reason(error)}")


def plan_of(spec: RunSpec, basis: str = AUTO, *, cached: bool = True, remedies: bool = True) -> Plan:
    """The Plan of `spec`, from the cache where it is there; with `remedies`, what to change where it does not fit.

    Raises:
        RehearsalError: basis "rehearsal" was asked for and the engine could not be rehearsed.
    """
    name = store.key(spec, basis if remedies else f"{basis}, bare")
    cached = cached and basis != LAYOUT  # milliseconds: not worth a file
    if cached:
        found = store.recall([name]).get(name)
        if found is not None:
            return found
    made = _made(spec, basis)
    if remedies and made.verdict == SHORT:
        made = replace(made, fixes=fixes(spec, made))
    if cached:
        store.keep(name, made)
    return made


def names_strategy(spec: RunSpec) -> bool:
    """Whether the run says how it is spread: an engine that shards, or one rank, where plain is one way."""
    return spec.strategy.engine is not Engine.PLAIN


def plan(overrides: Sequence[str], *, basis: str = AUTO, cached: bool = True) -> Plan:
    """The Plan of the run that `overrides` ask for, as on the command line; with several ranks and neither zero nor fsdp the
    fastest strategy that fits is planned, and its notes say so.

    Raises:
        ConfigError: with all faults.
        MisfitError: no strategy was named, and none fits.
    """
    spec = compose(overrides, local=local_cluster, strict=False)
    if not names_strategy(spec) and spec.strategy.ranks > 1:
        chosen = choose(spec)
        return _noted(plan_of(chosen.candidate.spec, basis, cached=cached), f"chosen: {chosen.reason}")
    return plan_of(spec, basis, cached=cached)


def crossed(overrides: Sequence[str]) -> tuple[Candidate, ...]:
    """Every run to compare: `key=a,b` crossed, and for each that names no strategy all strategies on its ranks.

    Raises:
        ConfigError: with all faults of the first combination that has some.
    """
    found: list[Candidate] = []
    stated = {override.partition("=")[0].lstrip("+") for override in overrides}
    for run in sweep(overrides):
        spec = compose(run, local=local_cluster, strict=False)
        if stated & {"zero", "fsdp", "tensor"}:
            found.append(Candidate(typed(spec), spec))
            continue
        kinds = (spec.recompute,) if "recompute" in stated else RECOMPUTE
        found += candidates(spec, kinds)
    return tuple(found)


def compare(
    overrides: Sequence[str],
    *,
    basis: str = LAYOUT,
    cached: bool = True,
    progress: Progress = lambda done, total, words: None,
) -> list[Plan]:
    """The Plans of every strategy, or of the crossed groups, those that fit first, each part from the fastest to the slowest.

    Under basis "rehearsal" or "auto" a candidate that the Layout shows to be hopeless is not rehearsed.

    Raises:
        ConfigError: with all faults.
    """
    every = crossed(overrides)
    done = 0

    def one(candidate: Candidate) -> Plan:
        hopeless = by_layout(candidate.spec).memory.short > DOUBT * candidate.spec.cluster.card.memory_bytes
        return plan_of(candidate.spec, LAYOUT if hopeless else basis, cached=cached, remedies=False)

    plans: list[Plan] = []
    with ThreadPoolExecutor(WORKERS if basis != LAYOUT else 1) as pool:
        for made, candidate in zip(pool.map(one, every), every, strict=True):
            done += 1
            progress(done, len(every), candidate.words)
            plans.append(made)
    return ranked(plans)


def ranked(plans: Sequence[Plan]) -> list[Plan]:
    """Those that fit first, from the fastest to the slowest; then the others, from the least to the most short."""

    def order(made: Plan) -> tuple[bool, float, float]:
        short = made.memory.short + made.host.short + made.nvme.short
        return not made.fits, (short if short else made.seconds or 0.0), made.memory.used

    return sorted(plans, key=order)
