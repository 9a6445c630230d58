"""Data: from files of conversations or text to the micro-batches of a rank.

Importing this loads neither transformers nor torch: the processes that only tokenise need no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orchestrator.data.batch import IGNORED, MicroBatch, StepBatch
    from orchestrator.data.loader import eval_batches, steps
    from orchestrator.data.order import steps_per_epoch
    from orchestrator.data.preparation import Progress, cache_folder, prepare
    from orchestrator.data.prepared import Prepared, check_vocabulary
    from orchestrator.data.report import Report
    from orchestrator.data.rows import Rows, rows_of
    from orchestrator.data.tokenizer import choose_pad_id, load_tokenizer

__all__ = [
    "IGNORED",
    "MicroBatch",
    "Prepared",
    "Progress",
    "Report",
    "Rows",
    "StepBatch",
    "cache_folder",
    "check_vocabulary",
    "choose_pad_id",
    "eval_batches",
    "load_tokenizer",
    "prepare",
    "rows_of",
    "steps",
    "steps_per_epoch",
]  # fmt: skip

_HOMES = {
    "batch": ("IGNORED", "MicroBatch", "StepBatch"),
    "loader": ("eval_batches", "steps"),
    "order": ("steps_per_epoch",),
    "preparation": ("Progress", "cache_folder", "prepare"),
    "prepared": ("Prepared", "check_vocabulary"),
    "report": ("Report",),
    "rows": ("Rows", "rows_of"),
    "tokenizer": ("choose_pad_id", "load_tokenizer"),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
