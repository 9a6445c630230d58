"""Tables for a terminal: what was predicted beside what was measured, and what a run came to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from orchestrator.report.record import MEMORY_LINES, Record
from orchestrator.train.display import count, home_word
from orchestrator.units import format_bytes, format_count, format_seconds

_COLUMNS_AT_ONCE = 8
"""Ranks beside each other; more go below."""


def _table(headers: Iterable[str]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for number, header in enumerate(headers):
        table.add_column(header, justify="left" if number == 0 else "right", no_wrap=True)
    return table


def _groups(ranks: Sequence[Mapping[str, Any]]) -> Iterable[Sequence[Mapping[str, Any]]]:
    return (ranks[start : start + _COLUMNS_AT_ONCE] for start in range(0, len(ranks), _COLUMNS_AT_ONCE))


def _bytes_by_class(rows: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str, str], int]:
    totals: dict[tuple[str, str, str], int] = {}
    for row in rows:
        key = (row["line"], row["dtype"], row["home"])
        totals[key] = totals.get(key, 0) + row["bytes"]
    return totals


def _cell(predicted: int, measured: int | None) -> str:
    if measured is None:
        return f"{format_bytes(predicted)} | -"
    if predicted == measured:
        return f"{format_bytes(predicted)} | same"
    return f"{format_bytes(predicted)} | {format_bytes(measured)}"


def _title(text: str) -> Text:
    return Text(f"\n{text}", style="bold")


def at_rest(ranks: Sequence[Mapping[str, Any]], card: str = "") -> list[RenderableType]:
    """Tensors at rest between steps, a line for each class and a column "predicted | measured" for each rank.

    `card` "cpu": there is no card, and what would rest on it is said to rest on the device.
    """
    tables: list[RenderableType] = [_title("At rest after a step, predicted | measured")]
    for group in _groups(ranks):
        table = _table(["", *(f"rank {account['rank']}" for account in group)])
        predicted = [_bytes_by_class(account["predicted"]) for account in group]
        found = [account["measured"].get("step") for account in group]
        measured = [None if rows is None else _bytes_by_class(rows) for rows in found]
        keys = list(dict.fromkeys(key for totals in [*predicted, *(m or {} for m in measured)] for key in totals))
        for key in keys:
            cells = [
                _cell(p.get(key, 0), None if m is None else m.get(key, 0)) for p, m in zip(predicted, measured, strict=True)
            ]
            table.add_row(f"{key[0]} ({key[1]}, {home_word(key[2], card)})", *cells)
        sums = [(sum(p.values()), None if m is None else sum(m.values())) for p, m in zip(predicted, measured, strict=True)]
        table.add_row("together", *(_cell(p, m) for p, m in sums), style="bold")
        tables.append(table)
    return tables


def memory(ranks: Sequence[Mapping[str, Any]], title: str) -> list[RenderableType]:
    """The memory of every rank side by side; `ranks` are rows of `Memory.to_json`."""
    tables: list[RenderableType] = [_title(title)]
    for group in _groups(ranks):
        table = _table(["", *(f"rank {held['rank']}" for held in group)])
        for label, field in MEMORY_LINES:
            values = [held.get(field) for held in group]
            if any(value is not None for value in values):
                table.add_row(label, *("-" if value is None else format_bytes(value) for value in values))
        tables.append(table)
    return tables


def drift(predicted: int, measured: int) -> str:
    """The measured figure and how far the prediction was from it: "12.31 GiB (+1.2 %)", where + is predicted too much."""
    return f"{format_bytes(measured)} ({100 * (predicted / measured - 1):+.1f} %)" if measured else format_bytes(measured)


def planned(record: Record) -> list[RenderableType]:
    """The peaks that the plan gave before the run, beside those of every rank."""
    plan = record.plan
    if plan is None:
        return []
    lines = [
        ("torch allocated, peak", "allocated", plan.memory.allocated),
        ("torch reserved, peak", "reserved", plan.memory.reserved),
        ("card used", "device_used", plan.memory.used),
    ]
    if plan.card == "cpu":
        lines = [("process resident, peak", "resident_peak", plan.memory.used)]
    tables: list[RenderableType] = [
        _title(f"Peak, predicted (from the {plan.basis}) and measured, with the prediction's error")
    ]
    for group in _groups([account["memory"] for account in record.ranks]):
        table = _table(["", "predicted", *(f"rank {held['rank']}" for held in group)])
        for label, field, expected in lines:
            values = [held.get(field) for held in group]
            if any(value is not None for value in values):
                cells = ("-" if value is None else drift(expected, value) for value in values)
                table.add_row(label, format_bytes(expected), *cells)
        tables.append(table)
    return tables


def over_time(record: Record, most: int = 12) -> list[RenderableType]:
    """What every rank held during the run: one line for each of at most `most` logging intervals, evenly chosen."""
    moments = record.memory_over_time
    if not moments:
        return []
    stride = max(1, -(-len(moments) // most))
    chosen = moments[::stride] if moments[-1] in moments[::stride] else [*moments[::stride], moments[-1]]
    on_card = chosen[0][1][0].get("device_used") is not None
    field, title = (
        ("device_used", "Card memory in use during the run") if on_card else ("resident", "Resident memory during the run")
    )
    tables: list[RenderableType] = [_title(title)]
    for start in range(0, len(chosen[0][1]), _COLUMNS_AT_ONCE):
        group = chosen[0][1][start : start + _COLUMNS_AT_ONCE]
        table = _table(["step", *(f"rank {held['rank']}" for held in group)])
        for step, ranks in chosen:
            cells = (format_bytes(held[field]) for held in ranks[start : start + _COLUMNS_AT_ONCE])
            table.add_row(str(step), *cells)
        tables.append(table)
    return tables


def summary(record: Record) -> RenderableType:
    """What the run came to: steps, loss, speed."""
    spec = record.spec
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    table.add_row("model", f"{spec.model.name}, {spec.tuning.kind}")
    table.add_row("strategy", f"{spec.strategy.label}, {count(len(record.ranks), 'rank')}, {spec.precision.compute}")
    skipped = f", {record.skipped} of them skipped as not finite" if record.skipped else ""
    table.add_row("steps", f"{record.lines[-1]['step']} in {format_seconds(record.seconds)}{skipped}")
    if record.losses is not None:
        table.add_row("loss", f"{record.losses[0]:.4f} -> {record.losses[1]:.4f}")
    if record.eval_losses:
        (first, before), (last, after) = record.eval_losses[0], record.eval_losses[-1]
        table.add_row("eval loss", f"{before:.4f} (step {first}) -> {after:.4f} (step {last})")
    if record.tokens_per_second is not None:
        padding = f", {record.padding:.1%} padding beside them" if record.padding is not None else ""
        table.add_row("tokens/s, median", f"{format_count(round(record.tokens_per_second))}{padding}")
    if record.labelled_per_second:
        table.add_row("learned tokens/s", format_count(round(record.labelled_per_second)))
    if record.waiting is not None:
        table.add_row("waiting for data", f"{record.waiting:.2%} of the time of a step")
    return Group(_title(f"Run {record.path}"), table)


def report(record: Record, *, over: bool = True) -> RenderableType:
    """Everything about a run for the screen; `over` includes the memory of all ranks over time."""
    parts: list[RenderableType] = [summary(record), *at_rest(record.ranks, record.spec.cluster.card.name)]
    parts += memory([account["memory"] for account in record.ranks], "Memory of each rank, at its end")
    parts += planned(record)
    if over:
        parts += over_time(record)
    return Group(*parts)


def print_report(record: Record, *, over: bool = True, console: Console | None = None) -> None:
    """Print `report` as wide as it needs to be where the output is not a terminal."""
    console = console or Console()
    if not console.is_terminal:
        console = Console(file=console.file, width=200)
    console.print(report(record, over=over), highlight=False)
