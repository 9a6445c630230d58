"""Muon for the matrices of the blocks, AdamW for the rest: embeddings, head, norms, biases.

The arithmetic is torch's (torch/optim/_muon.py), with the rate of a matrix scaled so that its updates are as large as AdamW's
(arXiv:2502.16982, section 2.2): one learning rate serves both. Orthogonalisation needs the whole matrix, so where ranks hold
rows of it each gathers the matrix, works on all of it and keeps its own rows. torch's class does this on DTensors too, but
exchanges the matrix in each of its fifteen products instead of once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.optim._muon import DEFAULT_A, DEFAULT_B, DEFAULT_C, DEFAULT_NS_STEPS, EPS, _adjust_lr, _zeropower_via_newtonschulz

from orchestrator.engine.census import local
from orchestrator.engine.states import Elementwise, State
from orchestrator.engine.updates import like
from orchestrator.spec import Optimizer

FirstRow = Callable[[torch.Tensor], int]
"""The row of the whole matrix with which this rank's part of it begins."""


class Muon:
    """The rule for one matrix; its state is the momentum."""

    codec = Elementwise(("momentum", "exp_avg", "exp_avg_sq"))

    def __init__(self, spec: Optimizer, first_row: FirstRow) -> None:
        self.spec, self.first_row = spec, first_row

    def fresh(self, tensor: torch.Tensor) -> State:
        return {"momentum": like(tensor)}

    def update(self, tensor: torch.Tensor, gradient: torch.Tensor | None, state: State, lr: float) -> None:
        own = local(tensor.detach())
        direction = own
        if gradient is not None:
            momentum = state["momentum"].lerp_(gradient, 1 - self.spec.momentum)
            direction = gradient.lerp(momentum, self.spec.momentum)
        whole = _gathered(tensor, direction)
        del direction
        turned = _zeropower_via_newtonschulz(whole, (DEFAULT_A, DEFAULT_B, DEFAULT_C), DEFAULT_NS_STEPS, EPS)
        del whole
        first = self.first_row(tensor)
        own.mul_(1 - lr * self.spec.weight_decay)
        rows = turned[first : first + own.shape[0]].to(own.device)
        own.add_(rows, alpha=-_adjust_lr(lr, "match_rms_adamw", tensor.shape))


def _gathered(tensor: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """The whole matrix of which `part` lies here as a part of `tensor` does, on the device that computes."""
    if not isinstance(tensor, DTensor):
        return part
    placed = DTensor.from_local(
        part, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )
    whole: torch.Tensor = placed.full_tensor()
    return whole


class Joined(torch.optim.Optimizer):
    """Several optimizers as one: their groups, and one mapping of states."""

    def __init__(self, parts: Iterable[torch.optim.Optimizer]) -> None:
        self.parts = tuple(parts)
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        for part in self.parts:
            part.state = self.state

    def step(self, closure: Any = None) -> Any:
        assert closure is None, "the engines compute gradients themselves"
        for part in self.parts:
            part.step()

    def part_of(self, tensor: torch.Tensor) -> torch.optim.Optimizer:
        """The optimizer that updates `tensor`."""
        return next(
            part for part in self.parts if any(tensor is held for group in part.param_groups for held in group["params"])
        )
