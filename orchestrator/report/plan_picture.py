"""Plans as a picture: a stacked bar for each, and the card's limit as a line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.errors import ConfigError, Fault
from orchestrator.planner.plan import Plan
from orchestrator.report.plans import columns_that_differ, shared
from orchestrator.units import GIB

if TYPE_CHECKING:  # drawing is imported when something is drawn
    from matplotlib.figure import Figure

MOST = 48
"""Bars in one picture; the first ones of the ranking."""

COLOURS: dict[str, str] = {
    "frozen": "#7f8fa6",
    "weights": "#2f6db3",
    "adapters": "#5aa3e8",
    "persistent": "#9cc7f0",
    "master": "#1b4f72",
    "moments": "#6c3483",
    "gradients": "#c0392b",
    "gathered": "#17a589",
    "bucket": "#73c6b6",
    "reduce_scatter": "#45b39d",
    "staging": "#a3e4d7",
    "activations": "#e59866",
    "backward": "#d35400",
    "logits": "#f4d03f",
    "workspace": "#bdc3c7",
    "context": "#909497",
    "other": "#d5d8dc",
}
"""One colour for each line of the ledger, the same in the picture and on the page."""


def bars(plan: Plan) -> dict[str, int]:
    """Bytes by line at the peak, in the order of `COLOURS`, with what lies outside torch; they add up to `memory.used`."""
    alive = dict(plan.peak.alive)
    known = {line: alive[line] for line in COLOURS if alive.get(line)}
    known["context"] = plan.memory.context + plan.memory.communication
    other = plan.memory.used - sum(known.values())
    return known | ({"other": other} if other > 0 else {})


def name(plan: Plan, extra: Sequence[str]) -> str:
    """The strategy and, before it, what else differs between the bars."""
    return " ".join([*(str(getattr(plan, field)) for field in extra), plan.words])


def _ink(plan: Plan) -> str:
    return "black" if plan.fits else "#a93226"


def draw(plans: Sequence[Plan], title: str, path: Path) -> Path:
    """Write the picture to `path` (PNG) and return it.

    Raises:
        ConfigError: the folder cannot be written.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib.figure import Figure

    shown, extra = list(plans)[:MOST], columns_that_differ(plans)
    figure = Figure(figsize=(12, 1.9 + 0.34 * len(shown)), layout="constrained")
    axes = figure.add_subplot()
    rows = [bars(plan) for plan in shown]
    positions = list(range(len(shown)))
    lines = [line for line in COLOURS if any(line in row for row in rows)]
    left = [0.0] * len(shown)
    for line in lines:
        widths = [row.get(line, 0) / GIB for row in rows]
        axes.barh(positions, widths, left=left, height=0.72, color=COLOURS[line], label=line, edgecolor="white", linewidth=0.4)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    limits = [plan.memory.limit / GIB for plan in shown]
    for position, limit in zip(positions, limits, strict=True):
        axes.plot([limit, limit], [position - 0.5, position + 0.5], color="black", linewidth=1.8)
    widest = max([*left, *limits])
    # A strategy that needs many times the card would squeeze all the others: its bar runs out of the picture.
    edge = min(widest, 2.5 * max(limits)) * 1.02
    for position, plan in zip(positions, shown, strict=True):
        step = f"{plan.seconds:7.2f} s" if plan.seconds is not None else ""
        mark = f"{plan.memory.used / GIB:7.1f} GiB{' →' if plan.memory.used / GIB > edge else '  '}{step}"
        axes.text(
            1.01, position, mark, va="center", fontsize=8, family="monospace",
            color=_ink(plan), transform=axes.get_yaxis_transform(),
        )  # fmt: skip
    axes.set_yticks(positions, [name(plan, extra) for plan in shown], fontsize=8)
    for label, plan in zip(axes.get_yticklabels(), shown, strict=True):
        label.set_color(_ink(plan))
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.set_xlim(0, edge)
    cut = f" (first {MOST} of {len(plans)})" if len(plans) > MOST else ""
    axes.set_xlabel("GiB on each card at its peak; black line: the card; red: does not fit")
    axes.set_title(f"{title}{cut}\n{shared(plans)}", loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=min(8, len(lines)), fontsize=8, frameon=False)
    return write(figure, path)


def write(figure: Figure, path: Path) -> Path:
    """`path`, with the picture in it.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=130)
    except OSError as error:
        raise ConfigError(
            Fault("out", f"{path} cannot be written: {error.strerror}", "name another folder: out=plans")
        ) from None
    return path
