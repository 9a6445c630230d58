"""What fits, for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from orchestrator.planner.climb import Step, first_that_fits
from orchestrator.planner.ladder import Rung
from orchestrator.planner.plan import Fix
from orchestrator.report.plans import gib
from orchestrator.units import format_bytes, format_count


def rungs(steps: tuple[Step, ...]) -> RenderableType:
    """The ladder: what each rung adds to what to type, what it saves and costs; the first on which the run fits is marked."""
    grid = Table(box=None, padding=(0, 2, 0, 0))
    for number, header in enumerate(["", "rung", "add", "card GiB", "saves GiB", "time of a step", "host GiB"]):
        grid.add_column(header, justify="left" if number < 3 else "right", no_wrap=True)
    fitting = first_that_fits(steps)
    for index, step in enumerate(steps):
        mark = Text("->" if index == fitting else "", style="green")
        style = "" if fitting is None or index <= fitting else "dim"
        time = f"x {step.slowdown:.2f}" if step.slowdown is not None else "-"
        used = Text(gib(step.used), style="green" if step.used <= step.limit else "red")
        saves = gib(step.saves) if step.saves else "-"
        grid.add_row(mark, step.name, step.adds, used, saves, time, gib(step.host) if step.host else "-", style=style)
    limit = format_bytes(steps[0].limit)
    said = "no rung is high enough: take more or larger cards, or a smaller model"
    if fitting == 0:
        said = "it fits as asked; what lies above would leave more room"
    elif fitting is not None:
        said = (
            f"add every line up to the arrow; each is on top of those before it, and what lies below it is not needed ({limit})"
        )
    return Group(Text(f"\nThe ladder, from the cheapest rung to the dearest: {said}"), grid)


def table(rungs: Sequence[Rung], fixes: Sequence[Fix]) -> RenderableType:
    """One line for each strategy, the fastest first; below it, where nothing fits, what would help."""
    extra = [field for field in ("model", "tuning", "cluster") if len({getattr(rung, field) for rung in rungs}) > 1]
    lengths = sorted({rung.stated_len for rung in rungs})
    grid = Table(box=None, padding=(0, 2, 0, 0))
    at = f"micro-batch at {lengths[0]}" if len(lengths) == 1 else "micro-batch"
    for number, header in enumerate(["strategy", *extra, at, "longest sequence", "card used then", "host GiB", "tokens/s"]):
        grid.add_column(header, justify="left" if number <= len(extra) else "right", no_wrap=True)
    for rung in sorted(rungs, key=lambda rung: (not rung.micro, -(rung.tokens_per_second or 0.0), rung.short)):
        words = [rung.words, *(str(getattr(rung, field)) for field in extra)]
        length = "-" if not rung.seq_len else f"{rung.seq_len}{' (model limit)' if rung.limited_by == 'model' else ''}"
        if not rung.micro:
            missing = f"{format_bytes(rung.short)} short" if rung.short else "too tight"
            grid.add_row(*words, Text(missing, style="red"), length, "-", gib(rung.host), "-")
            continue
        rate = format_count(round(rung.tokens_per_second)) if rung.tokens_per_second else "-"
        used = f"{format_bytes(rung.used)} of {format_bytes(rung.limit)}"
        grid.add_row(*words, str(rung.micro), length, used, gib(rung.host), rate)
    parts: list[RenderableType] = [grid]
    if fixes:
        parts += [Text("\nNothing fits as asked. The smallest changes that help:")]
        parts += [Text(f"  -> {fix.sentence}") for fix in fixes]
    elif not any(rung.micro for rung in rungs):
        parts.append(
            Text("\nNothing fits, and no change that is known here helps: take more or larger cards, or a smaller model.")
        )
    return Group(*parts)
