"""Orchestrator: DeepSpeed and FSDP2 fine-tuning that knows what every card will hold before anything is launched."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orchestrator.planner.planning import compare as compare
    from orchestrator.planner.planning import plan as plan

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`plan` and `compare`, imported when they are first asked for: the package itself imports nothing."""
    if name in ("plan", "compare"):
        from orchestrator.planner import planning

        return getattr(planning, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
