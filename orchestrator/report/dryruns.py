"""A dry run beside its rehearsal, for a terminal and as data."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from orchestrator.planner.allocator import replay
from orchestrator.planner.dryrun import DryRun, differing_operations, error_of
from orchestrator.planner.rehearsal import Rehearsal
from orchestrator.units import MIB


def beside(measured: DryRun, predicted: Rehearsal) -> dict[str, Any]:
    """Every phase with what was requested, allocated, reserved and used, measured and predicted, in bytes; JSON data.

    Allocated and reserved exist where a CUDA allocator was at work; the prediction replays the rehearsed trace.
    """
    replayed = replay(predicted.trace, expandable=False)
    phases = []
    for phase in measured.phases:
        row: dict[str, Any] = {
            "phase": phase.phase,
            "requested": {"measured": phase.requested, "predicted": predicted.peaks["gpu"].get(phase.phase, 0)},
        }
        if phase.allocated is not None and phase.reserved is not None:
            allocated, reserved = replayed.by_phase.get(phase.phase, (0, 0))
            row["allocated"] = {"measured": phase.allocated, "predicted": allocated}
            row["reserved"] = {"measured": phase.reserved, "predicted": reserved}
            row["device_used"] = phase.device_used
        phases.append(row)
    return {
        "rank": measured.rank,
        "device": measured.device,
        "error": measured.error,
        "step_seconds": measured.step_seconds,
        "phases": phases,
        "differing_operations": differing_operations(measured.trace, predicted.trace),
    }


def show(result: dict[str, Any], title: str, stand_in: str = "") -> RenderableType:
    """The table of `beside`; `stand_in` names the card in whose place the CPU has run."""
    table = Table(box=None, padding=(0, 2, 0, 0), title=title, title_justify="left")
    for number, header in enumerate(("MiB", "measured", "predicted", "apart")):
        table.add_column(header, justify="left" if number == 0 else "right")
    for row in result["phases"]:
        for kind in ("requested", "allocated", "reserved"):
            if kind in row:
                found, told = row[kind]["measured"], row[kind]["predicted"]
                apart = f"{error_of(found, told):+.2%}" if found else "-"
                table.add_row(f"{row['phase']}, {kind}", f"{found / MIB:.1f}", f"{told / MIB:.1f}", apart)
    parts: list[RenderableType] = [table]
    if stand_in:
        parts.append(
            f"\nThere was no GPU, so the tensors of a rank on {stand_in} were made on the CPU. What a card adds by itself (its "
            "attention kernels, context, NCCL, workspaces, rounding) is not in them: launch/plan.py predicts that."
        )
    if result["error"]:
        parts.append(result["error"])
    if result["differing_operations"]:
        parts.append("operations that differ (measured − predicted): " + "; ".join(result["differing_operations"]))
    return Group(*parts)
