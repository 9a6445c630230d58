"""Finished runs side by side: what was predicted beside what each card held."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Group, RenderableType
from rich.text import Text

from orchestrator.report.grid import grid, wide, within
from orchestrator.report.plan_picture import write
from orchestrator.report.plans import WIDE
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


def _held(record: Record) -> list[str]:
    """What each rank held, with the prediction's error where there was one."""
    field, _ = meter(record)
    held = [account["memory"][field] for account in record.ranks]
    return [drift(record.plan.memory.used, count) if record.plan is not None else format_bytes(count) for count in held]


def _cells(record: Record) -> dict[str, str]:
    """What the ranks of a run have in common."""
    plan = record.plan
    planned = format_seconds(plan.seconds) if plan is not None and plan.seconds is not None else "-"
    return {
        "run": record.path.name,
        "strategy": plan.words if plan is not None else record.spec.strategy.label,
        "predicted": format_bytes(plan.memory.used) if plan is not None else "-",
        "step predicted": planned,
        "step measured": format_seconds(step_seconds(record)),
    }


LEFT = ("run", "strategy", "rank")
DROPPED = ("step predicted", "strategy")
"""Columns that go first where even a line for each rank is too wide, in this order."""


def table(records: Sequence[Record], width: int = WIDE) -> RenderableType:
    """Predicted, then every rank with the prediction's error; predicted and measured step. One line for each run where that
    goes into `width` characters, else one for each rank."""
    meters = dict.fromkeys(meter(record)[1] for record in records)
    said = Text(f"\n{' and '.join(meters)}, with the prediction's error: + is predicted too much")
    most = max(len(record.ranks) for record in records)
    shared = [_cells(record) for record in records]
    columns: dict[str, list[str]] = {name: [cells[name] for cells in shared] for name in ("run", "strategy", "predicted")}
    for rank in range(most):
        columns[f"rank {rank}"] = [held[rank] if rank < len(held) else "-" for held in map(_held, records)]
    columns |= {name: [cells[name] for cells in shared] for name in ("step predicted", "step measured")}
    if wide(columns) <= width:
        return Group(grid(columns, LEFT), said)
    rows = [
        {name: text if rank == 0 else "" for name, text in cells.items()} | {"rank": str(rank), "measured": count}
        for record, cells in zip(records, shared, strict=True)
        for rank, count in enumerate(_held(record))
    ]
    names = ("run", "strategy", "rank", "predicted", "measured", "step predicted", "step measured")
    tall = {name: [row[name] for row in rows] for name in names}
    return Group(grid(within(tall, DROPPED, width), LEFT), said)


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
            name = f"{record.path.name} ({record.plan.words}): predicted"
            bars.append((name, record.plan.memory.used / GIB, "#7f8fa6"))
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
