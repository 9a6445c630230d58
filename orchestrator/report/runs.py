"""Finished runs side by side: what was predicted beside what each card held."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import RenderableType
from rich.table import Table

from orchestrator.report.plan_picture import write
from orchestrator.report.record import Record
from orchestrator.report.tables import drift
from orchestrator.units import GIB, format_bytes, format_seconds


def meter(record: Record) -> tuple[str, str]:
    """(field of a rank's memory that the plan's `used` is held against, its name): the whole card, or the process on a CPU."""
    on_card = record.ranks[0]["memory"].get("device_used") is not None
    return ("device_used", "card used") if on_card else ("resident_peak", "process resident, peak")


def step_seconds(record: Record) -> float:
    """Median length of a step after the first, which warms up; of the first where there is no other."""
    seconds = sorted(line["step_seconds"] for line in (record.lines[1:] or record.lines))
    return float(seconds[len(seconds) // 2])


def table(records: Sequence[Record]) -> RenderableType:
    """One line for each run: predicted, then every rank with the prediction's error; predicted and measured step."""
    most = max(len(record.ranks) for record in records)
    grid = Table(box=None, padding=(0, 2, 0, 0))
    headers = ["run", "strategy", "meter", "predicted", *(f"rank {rank}" for rank in range(most)), "step predicted", "measured"]
    for number, header in enumerate(headers):
        grid.add_column(header, justify="left" if number < 3 else "right", no_wrap=True)
    for record in records:
        field, name = meter(record)
        held = [account["memory"][field] for account in record.ranks]
        plan = record.plan
        cells = [drift(plan.memory.used, count) if plan is not None else format_bytes(count) for count in held]
        cells += ["-"] * (most - len(cells))
        expected = format_bytes(plan.memory.used) if plan is not None else "-"
        planned = format_seconds(plan.seconds) if plan is not None and plan.seconds is not None else "-"
        words = plan.words if plan is not None else record.spec.strategy.label
        grid.add_row(record.path.name, words, name, expected, *cells, planned, format_seconds(step_seconds(record)))
    return grid


def draw(records: Sequence[Record], path: Path) -> Path:
    """Write a picture: for each run a bar of what was predicted and one for each rank; the card's limit as a line.

    Raises:
        ConfigError: the folder cannot be written.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib.figure import Figure

    bars: list[tuple[str, float, str]] = []
    limits: list[tuple[float, float, float]] = []
    for record in records:
        field, _ = meter(record)
        start = len(bars)
        if record.plan is not None:
            bars.append((f"{record.path.name}: predicted", record.plan.memory.used / GIB, "#7f8fa6"))
        bars += [(f"rank {account['rank']}", account["memory"][field] / GIB, "#2f6db3") for account in record.ranks]
        if record.plan is not None:
            limits.append((record.plan.memory.limit / GIB, start - 0.5, len(bars) - 0.5))
    figure = Figure(figsize=(10, 1.2 + 0.32 * len(bars)), layout="constrained")
    axes = figure.add_subplot()
    sizes = [size for _, size, _ in bars]
    axes.barh(range(len(bars)), sizes, color=[colour for _, _, colour in bars], height=0.75)
    for position, size in enumerate(sizes):
        axes.text(
            1.01,
            position,
            f"{size:8.2f} GiB",
            va="center",
            fontsize=8,
            family="monospace",
            transform=axes.get_yaxis_transform(),
        )
    shown = [limit for limit in limits if limit[0] <= 3 * max(sizes)]
    for limit, top, bottom in shown:
        axes.plot([limit, limit], [top, bottom], color="black", linewidth=1.8)
    axes.set_yticks(range(len(bars)), [name for name, _, _ in bars], fontsize=8)
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.set_xlabel("GiB; black line: the limit" if shown else "GiB")
    axes.spines[["top", "right"]].set_visible(False)
    return write(figure, path)
