"""Plans for a terminal: one in full, or many in a table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from orchestrator.ledger import PHASES
from orchestrator.planner.plan import FITS, MARGIN, REHEARSAL, SHORT, Plan
from orchestrator.report.grid import grid, within
from orchestrator.units import GIB, format_bytes, format_count, format_seconds

SMALL = 1 / 200
"""Lines below this share of the card are shown together."""

WIDE = 240
"""Characters in a line where the output is not a terminal."""

COLOURS = {FITS: "green", "tight": "yellow", SHORT: "red"}


def gib(count: int) -> str:
    """GiB with two digits, "-" for none."""
    return f"{count / GIB:.2f}" if count else "-"


def columns_that_differ(plans: Sequence[Plan]) -> list[str]:
    """Of model, tuning, cluster, precision and sequence length those that are not the same in all plans."""
    fields = ("model", "tuning", "cluster", "compute", "seq_len", "micro")
    return [field for field in fields if len({getattr(plan, field) for plan in plans}) > 1]


def shared(plans: Sequence[Plan]) -> str:
    """What all plans have in common, in a line: the run that they are for."""
    words: dict[str, Callable[[Any], str]] = {
        "model": str,
        "tuning": str,
        "compute": str,
        "cluster": "on {}".format,
        "seq_len": "{} tokens".format,
        "micro": "micro-batch {}".format,
    }
    differ = columns_that_differ(plans)
    return ", ".join(say(getattr(plans[0], field)) for field, say in words.items() if plans and field not in differ)


def verdict(plan: Plan) -> Text:
    """The verdict in its colour, with what is missing."""
    missing = plan.memory.short or plan.host.short or plan.nvme.short
    where = "" if plan.memory.short or not missing else " host" if plan.host.short else " NVMe"
    text = plan.verdict if plan.fits else f"{format_bytes(missing)} short{where}"
    return Text(text, style=COLOURS[plan.verdict])


def said(plan: Plan) -> str:
    """The verdict as a sentence."""
    if not plan.fits:
        return f"does not fit: {plan.shortfall}"
    if plan.verdict == FITS:
        return "fits"
    return f"fits, but by less than the {MARGIN[plan.basis]:.0%} that a plan from the {plan.basis} can err"


def _plain_table(*headers: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for number, header in enumerate(headers):
        table.add_column(header, justify="left" if number == 0 else "right", no_wrap=True)
    return table


def ledger_table(plan: Plan) -> RenderableType:
    """Bytes on the card by line (down) and phase (across), with their sum; small lines together."""
    ledger, home = plan.ledger, "gpu"
    phases = [phase for phase in PHASES if ledger.total(phase, home)]
    table = _plain_table("GiB on a card", *phases)
    small = dict.fromkeys(phases, 0)
    for line in ledger.lines(home=home):
        held = {phase: ledger.lines(phase, home).get(line, 0) for phase in phases}
        if max(held.values()) < SMALL * plan.memory.used:
            small = {phase: small[phase] + held[phase] for phase in phases}
        else:
            table.add_row(line, *(gib(held[phase]) for phase in phases))
    if any(small.values()):
        table.add_row("smaller ones", *(gib(small[phase]) for phase in phases), style="dim")
    table.add_row("together", *(gib(ledger.total(phase, home)) for phase in phases), style="bold")
    return table


def _memory(plan: Plan) -> RenderableType:
    memory = plan.memory
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_column()
    on_card = plan.card != "cpu"
    table.add_row("allocated, peak", format_bytes(memory.allocated), f"in {plan.peak.phase}: {plan.peak.what}")
    if on_card:
        table.add_row("reserved, peak", format_bytes(memory.reserved), "in torch's allocator")
        table.add_row("context", format_bytes(memory.context), "CUDA and its kernels")
    else:
        table.add_row("process", format_bytes(memory.context), "interpreter and libraries")
    if memory.communication:
        table.add_row("NCCL", format_bytes(memory.communication), "buffers of its channels")
    what = "used on the card" if on_card else "resident"
    table.add_row(what, format_bytes(memory.used), f"of {format_bytes(memory.limit)}", style="bold")
    if on_card:
        limit = f"of {format_bytes(plan.host.limit)}" if plan.host.limit else "no limit stated"
        table.add_row("host, each rank", format_bytes(plan.host.need), limit)
    if plan.nvme.need:
        limit = f"of {format_bytes(plan.nvme.limit)}" if plan.nvme.limit else "no limit stated"
        table.add_row("NVMe, each rank", format_bytes(plan.nvme.need), limit)
    return table


def _time(plan: Plan) -> list[RenderableType]:
    if plan.time is None:
        return []
    parts = ", ".join(f"{name} {format_seconds(seconds)}" for name, seconds in plan.time.parts().items() if seconds >= 0.0005)
    hidden = f"; {format_seconds(plan.time.overlapped)} of communication hidden" if plan.time.overlapped >= 0.0005 else ""
    rate = f", {format_count(round(plan.tokens_per_second))} tokens/s" if plan.tokens_per_second else ""
    return [Text(f"\nstep     {format_seconds(plan.time.total)}{rate}: {parts}{hidden}")]


def one(plan: Plan) -> RenderableType:
    """Everything about a plan: the run, the card by phase and line, the sums, the time, the verdict and the fixes."""
    ranks = f"{plan.ranks} × {plan.card}" if plan.card != "cpu" else f"{plan.ranks} on this machine's memory"
    batch = f"{plan.micro} × {plan.accumulation} samples of {plan.seq_len} tokens a step and rank"
    parts: list[RenderableType] = [
        Text(f"{plan.model}, {plan.tuning}, {plan.compute}, {plan.optimizer} on {plan.cluster} ({ranks})", style="bold"),
        Text(f"strategy {plan.words}\nbatch    {batch}\nbasis    {plan.basis}\n"),
        ledger_table(plan),
        Text(),
        _memory(plan),
        *_time(plan),
        Text("\n") + Text(said(plan), style=f"bold {COLOURS[plan.verdict]}"),
    ]
    parts += [Text(f"  -> {fix.sentence}") for fix in plan.fixes]
    parts += [Text(f"note: {note}", style="dim") for note in plan.notes]
    return Group(*parts)


DROPPED = ("other", "logits", "activations", "at rest", "tokens/s", "of", "host GiB")
"""Columns of the table of many plans that go first where it is too wide, in this order."""


def many(plans: Sequence[Plan], width: int = WIDE) -> RenderableType:
    """One line for each plan: what it needs of what, how long a step takes, and whether it fits; below, what all share. Columns
    that do not go into `width` characters are left out, the least telling first."""
    columns = _columns(plans)
    bases = {plan.basis for plan in plans}
    limits = {plan.memory.limit for plan in plans}
    if len(bases) == 1:
        del columns["basis"]
    if len(limits) == 1:
        del columns["of"]
    table = grid(within(columns, DROPPED, width), left=("strategy",))
    said = f"{sum(plan.fits for plan in plans)} of {len(plans)} fit"
    if len(limits) == 1:
        said += f" {'the card' if plans[0].card != 'cpu' else 'the memory'} of {format_bytes(*limits)}"
    return Group(table, Text(f"\n{shared(plans)}: {said}; predicted {_bases(plans)}"))


def _bases(plans: Sequence[Plan]) -> str:
    rehearsed = sum(plan.basis == REHEARSAL for plan in plans)
    if rehearsed in (0, len(plans)):
        return f"from the {plans[0].basis}"
    return f"from the layout, {rehearsed} nearest to the limit by rehearsal"


def _columns(plans: Sequence[Plan]) -> dict[str, list[str | Text]]:
    """The cells below each header."""
    parts = [split(plan) for plan in plans]
    found: dict[str, list[str | Text]] = {"strategy": [plan.words for plan in plans]}
    found |= {field: [str(getattr(plan, field)) for plan in plans] for field in columns_that_differ(plans)}
    found["card GiB"] = [gib(plan.memory.used) for plan in plans]
    found["of"] = [gib(plan.memory.limit) for plan in plans]
    names = ("at rest", "activations", "logits", "other")
    found |= {name: [gib(part[index]) for part in parts] for index, name in enumerate(names)}
    found["host GiB"] = [gib(plan.host.need) for plan in plans]
    if any(plan.time is not None for plan in plans):
        found["step"] = [format_seconds(plan.seconds) if plan.seconds is not None else "-" for plan in plans]
        rates = [plan.tokens_per_second for plan in plans]
        found["tokens/s"] = [format_count(round(rate)) if rate else "-" for rate in rates]
    return found | {"basis": [plan.basis for plan in plans], "verdict": [verdict(plan) for plan in plans]}


RESTING = ("frozen", "weights", "adapters", "persistent", "master", "moments", "gradients")
"""Lines that a strategy shards or moves."""

LIVE = ("activations", "backward")


def split(plan: Plan) -> tuple[int, int, int, int]:
    """Bytes at the peak: (states and gradients, activations, logits, everything else to what the driver shows)."""
    alive = dict(plan.peak.alive)
    rest = sum(alive.get(line, 0) for line in RESTING)
    live = sum(alive.get(line, 0) for line in LIVE)
    logits = alive.get("logits", 0)
    return rest, live, logits, plan.memory.used - rest - live - logits


def width() -> int:
    """Characters that go into a line of the output."""
    console = Console()
    return console.width if console.is_terminal else WIDE


def show(what: RenderableType, console: Console | None = None) -> None:
    """Print as wide as needed where the output is not a terminal."""
    console = console or Console()
    if not console.is_terminal:
        console = Console(file=console.file, width=WIDE)
    console.print(what, highlight=False)
