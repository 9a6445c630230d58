"""What of a block's activations waits for the backward, and what is computed again. Always by the non-reentrant checkpoint:
the reentrant one leaves `lora_B` at zero."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from orchestrator.spec import RunSpec

PRODUCTS = (
    "mm", "bmm", "addmm", "_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention",
)  # fmt: skip
"""Operations whose results `recompute=selective` keeps: matrix products and attention, which cost most to compute again."""


def use_recompute(model: Any, spec: RunSpec) -> None:
    """Let the blocks of a transformers `model` keep what `spec.recompute` says."""
    if spec.recompute == "none":
        return
    settings: dict[str, Any] = {"use_reentrant": False}
    if spec.recompute == "selective":
        kept = [getattr(torch.ops.aten, name).default for name in PRODUCTS]
        settings["context_fn"] = partial(create_selective_checkpoint_contexts, kept)
    # The newer name where transformers has it, as the older one is deprecated there.
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable(settings, every_n_layers=spec.recompute_every if spec.recompute == "every_n" else 1)
    if spec.recompute == "offload":
        pinned = spec.cluster.card.name != "cpu"
        for module in model.modules():
            if hasattr(module, "_gradient_checkpointing_func"):
                module._gradient_checkpointing_func = partial(_with_input_on_host, pinned)


def _with_input_on_host(pinned: bool, function: Any, *args: Any, **kwargs: Any) -> Any:
    """The block under a checkpoint whose saved input lies in host memory. Weights are not saved there: inside the checkpoint
    its own hooks are on top, and they save nothing."""
    with save_on_cpu(pin_memory=pinned):
        return checkpoint(function, *args, use_reentrant=False, **kwargs)
