"""What the forks of a sweep would each import for themselves: two seconds of every life of half a second."""

from __future__ import annotations

import gc
import importlib
import os

import torch

MODULES = ("deepspeed", "peft", "pyarrow", "tokenizers", "transformers.models.llama.modeling_llama")


def warm() -> None:
    """Import it once, and keep its objects out of the garbage collections of the forks (DeepSpeed makes one at each start)."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    torch.set_num_threads(1)
    for module in MODULES:
        importlib.import_module(module)
    gc.freeze()
