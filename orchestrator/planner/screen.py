"""The screen: what the Layout alone proves impossible, in milliseconds and without torch.

It counts what must rest on a card and what each phase must hold besides; activations are not in it, so it can refuse a
run for certain and never promises that one fits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from orchestrator.errors import Fault, MisfitError
from orchestrator.layout import Layout, lay_out
from orchestrator.planner.candidates import candidates
from orchestrator.planner.device import CPU
from orchestrator.spec import Home, Parameter, RunSpec
from orchestrator.units import format_bytes


@dataclass(frozen=True, slots=True)
class Need:
    """Lower bounds of one rank's peak, in bytes, beside what its card and its share of the host have (0 = not stated)."""

    card: int
    card_limit: int
    host: int
    host_limit: int

    @property
    def short(self) -> int:
        """Bytes that are certainly missing, on the worse of both; 0 or less: not shown to be impossible."""
        on_card = self.card - self.card_limit
        on_host = self.host - self.host_limit if self.host_limit else 0
        return max(on_card, on_host)


def need(spec: RunSpec, table: Sequence[Parameter]) -> Need:
    """The lower bounds for rank 0 of `spec`. On a machine without cards everything is host memory."""
    layout = lay_out(spec, table)
    card, host = layout.peak_bytes(Home.GPU), layout.peak_bytes(Home.CPU)
    if spec.cluster.card.name == CPU:
        return Need(card + host, spec.cluster.card.memory_bytes, 0, 0)
    share = spec.cluster.host_bytes // max(1, spec.cluster.cards_per_node)
    return Need(card, spec.cluster.card.memory_bytes, host, share)


def alternatives(spec: RunSpec) -> Iterator[tuple[str, RunSpec]]:
    """(what to type, the spec it gives) for every strategy on the same ranks, with the same recompute."""
    for candidate in candidates(spec, (spec.recompute,)):
        yield candidate.words, candidate.spec


def fixes(spec: RunSpec, table: Sequence[Parameter]) -> list[tuple[str, int]]:
    """(what to type instead, lower bound in bytes on a card) of the strategies that the screen lets pass."""
    found = []
    for words, other in alternatives(spec):
        if other.strategy.label != spec.strategy.label:
            bound = need(other, table)
            if bound.short <= 0:
                found.append((words, bound.card))
    return found


def screen(spec: RunSpec, table: Sequence[Parameter]) -> Need:
    """The lower bounds of `spec`.

    Raises:
        MisfitError: it cannot fit, whatever the activations; names the shortfall and the strategies that might.
    """
    bound = need(spec, table)
    if bound.short <= 0:
        return bound
    layout: Layout = lay_out(spec, table)
    rows = sorted(layout.rows, key=lambda row: -row.bytes)[:3]
    largest = ", ".join(f"{row.line} {format_bytes(row.bytes)}" for row in rows if row.bytes)
    where = "on each card" if bound.card > bound.card_limit else "of host memory for each rank"
    has, wants = (bound.card_limit, bound.card) if bound.card > bound.card_limit else (bound.host_limit, bound.host)
    options = fixes(spec, table)
    if options:
        remedy = "; ".join(f"{words} ({format_bytes(size)} at least)" for words, size in options[:3])
    elif spec.tuning.kind == "full":
        remedy = "no strategy holds it: tuning=lora trains a small part, or take more or larger cards"
    else:
        remedy = "no strategy holds it: take more or larger cards, or a smaller model"
    raise MisfitError(
        Fault(
            f"{spec.strategy.label} on {spec.cluster.name}",
            f"short {format_bytes(bound.short)} {where}: at least {format_bytes(wants)} before any activation, "
            f"{format_bytes(has)} there ({largest})",
            remedy,
        )
    )
