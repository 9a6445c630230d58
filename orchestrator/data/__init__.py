"""Data: from a file of conversations to the micro-batches of a rank. Importing this loads no transformers."""

from orchestrator.data.batch import IGNORED, MicroBatch, StepBatch
from orchestrator.data.loader import eval_batches, steps
from orchestrator.data.order import steps_per_epoch
from orchestrator.data.prepare import prepare
from orchestrator.data.prepared import Prepared, Report, check_vocabulary
from orchestrator.data.tokenizer import choose_pad_id, load_tokenizer

__all__ = [
    "IGNORED", "MicroBatch", "Prepared", "Report", "StepBatch", "check_vocabulary", "choose_pad_id", "eval_batches",
    "load_tokenizer", "prepare", "steps", "steps_per_epoch",
]  # fmt: skip
