"""plan and compare: overrides in, Plans out. What the launch scripts, notebooks and tests call."""

from __future__ import annotations

import math
import re
import textwrap
import time
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
from orchestrator.planner.warm import warm
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

WITHIN = 105.0
"""Seconds after which `compare` under basis "auto" starts no more rehearsals and ends those that run, unless told otherwise."""

SHORTEST_START = 3.0
"""Seconds below which none is started."""

REHEARSED = "rehearsed row"
"""Under which basis `compare` keeps a plan: made without remedies, by a rehearsal alone."""

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
    basis: str = AUTO,
    within: float = WITHIN,
    cached: bool = True,
    progress: Progress = lambda done, total, words: None,
) -> list[Plan]:
    """The Plans of every strategy, or of the crossed groups, those that fit first, each part from the fastest to the slowest.

    Each Plan says what it rests on. Under basis "auto" those are rehearsed that may fit or not within the Layout's error, the
    fastest first, as long as `within` seconds are not over; under "rehearsal" all that it does not show to be hopeless, in the
    time that it takes.

    Raises:
        ConfigError: with all faults.
    """
    every = crossed(overrides)
    plans = [by_layout(candidate.spec) for candidate in every]
    names = [store.key(candidate.spec, REHEARSED) for candidate in every]
    asked = {LAYOUT: lambda made: False, AUTO: _doubtful, REHEARSAL: lambda made: not _hopeless(made)}[basis]
    open_ = [number for number, made in enumerate(plans) if asked(made)]
    found = store.recall([names[number] for number in open_]) if cached else {}
    for number in open_:
        plans[number] = found.get(names[number], plans[number])
    queue = sorted((number for number in open_ if names[number] not in found), key=lambda number: _urgency(plans[number]))
    progress(len(every) - len(queue), len(every), "")
    deadline = math.inf if basis == REHEARSAL else time.monotonic() + within

    def one(number: int) -> tuple[int, Plan]:
        left = deadline - time.monotonic()
        if left < SHORTEST_START:
            return number, _noted(plans[number], f"not rehearsed: {within:.0f} s were over")
        try:
            made = rehearse(every[number].spec, min(ASKED, left))
        except RehearsalError as error:
            return number, _noted(plans[number], f"the rehearsal failed, so this is from the layout: {_reason(error)}")
        if cached:
            store.keep(names[number], made)
        return number, made

    if queue:
        with warm() as rehearse, ThreadPoolExecutor(WORKERS) as pool:
            for done, (number, made) in enumerate(pool.map(one, queue), start=len(every) - len(queue) + 1):
                plans[number] = made
                progress(done, len(every), every[number].words)
    return ranked(plans)


def _hopeless(made: Plan) -> bool:
    """Whether the Layout alone shows that it cannot fit, whatever it may err."""
    return made.memory.short > DOUBT * made.memory.limit or made.host.short > DOUBT * made.host.limit


def _urgency(made: Plan) -> tuple[bool, bool, float]:
    """Doubtful ones first, then those that fit, the fastest first."""
    return not _doubtful(made), not made.fits, made.seconds or 0.0


def ranked(plans: Sequence[Plan]) -> list[Plan]:
    """Those that fit first, from the fastest to the slowest; then the others, from the least to the most short."""

    def order(made: Plan) -> tuple[bool, float, float]:
        short = made.memory.short + made.host.short + made.nvme.short
        return not made.fits, (short if short else made.seconds or 0.0), made.memory.used

    return sorted(plans, key=order)
