"""The optimizer of every engine, and its state as pieces."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from orchestrator.spec import Optimizer

MOMENTS = ("exp_avg", "exp_avg_sq")


def make_adamw(parameters: Iterable[torch.Tensor], spec: Optimizer) -> torch.optim.AdamW:
    """torch's AdamW in one group. Fused: one pass over the state, no parameter-sized temporary, on CPU and CUDA alike."""
    return torch.optim.AdamW(parameters, lr=spec.lr, betas=spec.betas, eps=spec.eps, weight_decay=spec.weight_decay, fused=True)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def steps_taken(optimizer: torch.optim.Optimizer) -> int:
    """Number of updates that the optimizer's state has seen."""
    for state in optimizer.state.values():
        if "step" in state:
            return int(state["step"].item())
    return 0


def fresh_state(tensor: torch.Tensor, step: int) -> dict[str, Any]:
    """The state that AdamW would have made for `tensor`, with `step` updates counted and both moments zero."""
    return {
        "step": torch.tensor(float(step), dtype=torch.float32, device=_step_device(tensor)),
        **{kind: torch.zeros_like(tensor, memory_format=torch.preserve_format, requires_grad=False) for kind in MOMENTS},
    }


def _step_device(tensor: torch.Tensor) -> torch.device:
    return tensor.device  # fused AdamW keeps its counter beside the parameter (torch/optim/adamw.py)
