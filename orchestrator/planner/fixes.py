"""What to change so that a run fits: every change that the project knows, tried and ranked by what it costs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from orchestrator.config.optimizer import suits
from orchestrator.planner.candidates import RECOMPUTE, candidates
from orchestrator.planner.plan import FITS, LAYOUT, MARGIN, Fix, Plan
from orchestrator.planner.predict import by_layout, table_for
from orchestrator.spec import LINEARS, Batch, Home, Parameter, RunSpec, Tuning

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
    away = spec.strategy.optimizer_home is not Home.GPU  # then a strategy that keeps all on the card must say so
    for candidate in candidates(spec, kinds):
        if candidate.spec.strategy.label != spec.strategy.label:
            yield candidate.words + (" offload=none" if away and "offload=" not in candidate.words else ""), candidate.spec


def both(spec: RunSpec) -> Iterator[tuple[str, RunSpec]]:
    """Other strategies at a micro-batch of one, for a run that neither change alone makes fit."""
    for smaller, one in list(smaller_batches(spec))[-1:]:
        for words, other in other_strategies(one):
            yield f"{words} {smaller}", other


def fewer_bits(spec: RunSpec) -> Iterator[tuple[str, RunSpec]]:
    """AdamW's states in 8 bits, under every strategy; the result changes by rounding."""
    if spec.optimizer.name != "adamw":
        return
    smaller = replace(spec, optimizer=replace(spec.optimizer, name="adamw_8bit"))
    if suits("adamw_8bit", spec.strategy):
        yield "optimizer=adamw_8bit", smaller
    for words, other in (*other_strategies(smaller), *both(smaller)):
        yield f"optimizer=adamw_8bit {words}", other


def shorter_samples(spec: RunSpec) -> Iterator[tuple[str, RunSpec]]:
    """Half the length and less; what is learned changes."""
    length = spec.data.seq_len // 2
    while length >= SHORTEST:
        yield f"data.seq_len={length}", replace(spec, data=replace(spec.data, seq_len=length))
        length //= 2


def adapters(spec: RunSpec) -> Iterator[tuple[str, RunSpec]]:
    """Adapters instead of all weights, and a base in 4 bits instead of 16, under every strategy."""
    if spec.tuning.form or spec.model.shape is None or not spec.model.shape.known:
        return
    tunings = [replace(spec.tuning, kind="qlora", quant="nf4", double_quant=True, dora=False)]
    if not spec.tuning.adapters:
        lora = Tuning("lora", targets=LINEARS)
        tunings = [lora, replace(lora, kind="qlora", quant="nf4", double_quant=True, dora=False)]
    for tuning in tunings:
        other = replace(spec, tuning=tuning)
        changes = (("", other), *smaller_batches(other), *other_strategies(other), *both(other))
        yield from ((f"tuning={tuning.kind} {words}".rstrip(), further) for words, further in changes if _can_be(further))


def _can_be(spec: RunSpec) -> bool:
    """Whether compose takes the packed base of `spec`, if it has one (config/divisions.py, checks.py, computing.py)."""
    return not spec.tuning.form or (spec.strategy.tp == 1 and spec.strategy.nvme is None and spec.compile == "none")


@dataclass(frozen=True, slots=True)
class _Misfit:
    """A run that does not fit: its plan by the Layout, as its changes are planned, and the bytes on the card by which a
    rehearsal found more than that; changes are taken to be wrong by as much."""

    spec: RunSpec
    table: Sequence[Parameter]
    plan: Plan
    more: int

    @classmethod
    def of(cls, spec: RunSpec, plan: Plan) -> _Misfit:
        table = table_for(spec)
        same = plan if plan.basis == LAYOUT else by_layout(spec, table)
        return cls(spec, table, same, max(0, plan.memory.used - same.memory.used))

    def mended_by(self, new: Plan) -> bool:
        """Whether `new` fits with the margin of its basis."""
        return new.verdict == FITS and new.memory.used + self.more <= (1 - MARGIN[new.basis]) * new.memory.limit


def _tried(run: _Misfit, changes: Iterator[tuple[str, RunSpec]]) -> list[Fix]:
    """The changes that mend `run`, in the order given."""
    found, plan = [], run.plan
    for words, other in changes:
        new = by_layout(other, run.table if other.tuning == run.spec.tuning else None)
        if not run.mended_by(new):
            continue
        slowdown = new.seconds / plan.seconds if new.seconds and plan.seconds else None
        host = new.host.need if new.offloads else 0
        found.append(Fix(words, plan.memory.used - new.memory.used, slowdown, host))
    return found


def _cheapest(fixes: Sequence[Fix]) -> list[Fix]:
    """By the length of a step; of equal ones the shortest to type first, and none that only adds words to another."""
    ordered = sorted(fixes, key=lambda fix: (round(fix.slowdown or 0.0, 2), fix.words.count("="), -fix.saves))
    kept: list[Fix] = []
    for fix in ordered:
        if not any(set(other.words.split()) < set(fix.words.split()) for other in kept):
            kept.append(fix)
    return kept


def _one_of_each(fixes: Sequence[Fix]) -> list[Fix]:
    """The first of the fixes that begin alike: three stages of one engine say no more than the cheapest of them."""
    kinds: dict[str, Fix] = {}
    for fix in fixes:
        kinds.setdefault(fix.words.partition("=")[0], fix)
    return list(kinds.values())


def fixes(spec: RunSpec, plan: Plan) -> tuple[Fix, ...]:
    """The cheapest changes that make `spec` fit, those that keep its result first; empty where nothing known helps."""
    run = _Misfit.of(spec, plan)
    largest_batch = _tried(run, smaller_batches(spec))[:1]
    kept = _one_of_each(_cheapest(_tried(run, other_strategies(spec)) + largest_batch))
    kept = kept or _one_of_each(_cheapest(_tried(run, both(spec))))
    if len(kept) < MOST:
        kept += _one_of_each(_cheapest(_tried(run, fewer_bits(spec))))
        kept += _tried(run, shorter_samples(spec))[:1]
        kept += _one_of_each(_cheapest(_tried(run, adapters(spec))))
    return tuple(kept[:MOST])
