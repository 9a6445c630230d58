"""What of a block's activations waits for the backward, and what is computed again. Always by the non-reentrant checkpoint:
the reentrant one leaves `lora_B` at zero."""

from __future__ import annotations

from collections import defaultdict
from functools import partial
from typing import Any

import torch
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import _CachedTorchDispatchMode, _CachingTorchDispatchMode, checkpoint

from orchestrator.spec import RunSpec

PRODUCTS = (
    "mm", "bmm", "addmm", "_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention",
)  # fmt: skip
"""Operations whose results `recompute=selective` keeps: matrix products and attention, which cost most to compute again."""

KEPT = frozenset(getattr(torch.ops.aten, name).default for name in PRODUCTS)


class _Keeping(_CachingTorchDispatchMode):
    """Keeps the results of `KEPT` in a forward and looks at nothing else: what an engine does on the way, such as ZeRO-3's
    fetching of weights, need not happen again when the block is computed again."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in KEPT:
            return func(*args, **(kwargs or {}))
        return super().__torch_dispatch__(func, types, args, kwargs)


class _Kept(_CachedTorchDispatchMode):
    """Gives those results back when the block is computed again."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in KEPT:
            return func(*args, **(kwargs or {}))
        return super().__torch_dispatch__(func, types, args, kwargs)


def _contexts() -> tuple[_Keeping, _Kept]:
    """What one block is computed in, first and again (torch/utils/checkpoint.py, create_selective_checkpoint_contexts)."""
    storage: dict[Any, dict[int, Any]] = defaultdict(dict)
    return _Keeping(lambda *_, **__: True, storage), _Kept(None, storage)


def use_recompute(model: Any, spec: RunSpec) -> None:
    """Let the blocks of a transformers `model` keep what `spec.recompute` says."""
    if spec.recompute == "none":
        return
    settings: dict[str, Any] = {"use_reentrant": False}
    if spec.recompute == "selective":
        settings["context_fn"] = _contexts
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
