"""What fits, for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from orchestrator.planner.climb import Step, first_that_fits
from orchestrator.planner.ladder import Rung
from orchestrator.planner.plan import Fix
from orchestrator.report.grid import grid, within
from orchestrator.report.plans import WIDE, gib
from orchestrator.units import format_bytes, format_count

SPARE = ("host GiB", "saves GiB", "rung")
"""Columns of the ladder that go first where it is too wide, in this order."""


def rungs(steps: tuple[Step, ...], width: int = WIDE) -> RenderableType:
    """The ladder: what each rung adds to what to type, what it saves and costs; the first on which the run fits is marked."""
    fitting = first_that_fits(steps)
    limit = format_bytes(steps[0].limit)
    said = "no rung is high enough: take more or larger cards, or a smaller model"
    if fitting == 0:
        said = "it fits as it is; what lies below would leave more room"
    elif fitting is not None:
        said = (
            f"add every line up to the arrow; each is on top of those before it, and what lies below it is not needed ({limit})"
        )
    columns: dict[str, list[str | Text]] = {
        "": [Text("->" if index == fitting else "", style="green") for index in range(len(steps))],
        "rung": [step.name for step in steps],
        "add": [step.adds for step in steps],
        "card GiB": [Text(gib(step.used), style="green" if step.used <= step.limit else "red") for step in steps],
        "saves GiB": [gib(step.saves) for step in steps],
        "time of a step": [f"x {step.slowdown:.2f}" if step.slowdown is not None else "-" for step in steps],
        "host GiB": [gib(step.host) for step in steps],
    }
    styles = ["" if fitting is None or index <= fitting else "dim" for index in range(len(steps))]
    shown = dict(within(columns, SPARE, width))
    if "rung" not in shown:
        shown["add"] = [step.adds or f"({step.name})" for step in steps]
    table = grid(shown, left=("", "rung", "add"), styles=styles)
    return Group(Text(f"\nThe ladder, from the cheapest rung to the dearest: {said}"), table)


DROPPED = ("host GiB", "card used then", "tokens/s")
"""Columns of the table of strategies that go first where it is too wide, in this order."""


def _reach(rung: Rung) -> str | Text:
    """The largest micro-batch, or what is missing for a single sample."""
    if rung.micro:
        return str(rung.micro)
    return Text(f"{format_bytes(rung.short)} short" if rung.short else "too tight", style="red")


def _longest(rung: Rung) -> str:
    """The longest sequence, and whether the model itself ends there."""
    if not rung.seq_len:
        return "-"
    return f"{rung.seq_len} (model's)" if rung.limited_by == "model" else str(rung.seq_len)


NEAREST = 3
"""Strategies shown of those that do not fit, the least short."""


def table(rungs: Sequence[Rung], fixes: Sequence[Fix], width: int = WIDE) -> RenderableType:
    """One line for each strategy that fits, the fastest first, and for those that nearly do; below them, where nothing fits,
    what would help."""
    extra = [field for field in ("model", "tuning", "cluster") if len({getattr(rung, field) for rung in rungs}) > 1]
    lengths = sorted({rung.stated_len for rung in rungs})
    at = f"micro at {lengths[0]}" if len(lengths) == 1 else "micro"
    fitting = sorted((rung for rung in rungs if rung.micro), key=lambda rung: -(rung.tokens_per_second or 0.0))
    short = sorted((rung for rung in rungs if not rung.micro), key=lambda rung: rung.short)
    ordered = [*fitting, *short[:NEAREST]]
    columns: dict[str, list[str | Text]] = {"strategy": [rung.words for rung in ordered]}
    columns |= {field: [str(getattr(rung, field)) for rung in ordered] for field in extra}
    columns[at] = [_reach(rung) for rung in ordered]
    columns["longest sequence"] = [_longest(rung) for rung in ordered]
    columns["card used then"] = [
        f"{format_bytes(rung.used)} of {format_bytes(rung.limit)}" if rung.micro else "-" for rung in ordered
    ]
    columns["host GiB"] = [gib(rung.host) for rung in ordered]
    rates = [rung.tokens_per_second if rung.micro else None for rung in ordered]
    columns["tokens/s"] = [format_count(round(rate)) if rate else "-" for rate in rates]
    parts: list[RenderableType] = [grid(within(columns, DROPPED, width), left=("strategy", *extra))]
    if short[NEAREST:]:
        parts.append(Text(f"and {len(short) - NEAREST} that are further from fitting", style="dim"))
    if fixes:
        parts += [Text("\nNothing fits as asked. The smallest changes that help:")]
        parts += [Text(f"  -> {fix.sentence}") for fix in fixes]
    elif not fitting:
        parts.append(
            Text("\nNothing fits, and no change that is known here helps: take more or larger cards, or a smaller model.")
        )
    return Group(*parts)
