"""One process, nothing sharded: the reference engine."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import torch
from torch import nn

from orchestrator.data.batch import MicroBatch
from orchestrator.engine import optimizers
from orchestrator.engine.census import measure
from orchestrator.engine.materialize import cast, fill, materialize, scales, without_storage
from orchestrator.engine.protocol import LossSum, Piece, StepResult, Weights
from orchestrator.engine.scaling import LossScale
from orchestrator.engine.states import Fragment
from orchestrator.layout import Row
from orchestrator.spec import Home, RunSpec
from orchestrator.units import TORCH_NAMES


class PlainEngine:
    """In fp32 the module's own parameters are optimized. In half precision they are working copies of fp32 masters, and
    each gradient is added to its master's in fp32 the moment that it is complete."""

    def __init__(self, spec: RunSpec, device: torch.device, loss_sum: LossSum) -> None:
        self.spec, self.device, self.loss_sum = spec, device, loss_sum
        self.compute = getattr(torch, TORCH_NAMES[spec.precision.compute])
        self.scale = LossScale.for_dtype(spec.precision.compute)
        self.model: nn.Module
        self.masters: dict[str, torch.Tensor] = {}
        self.optimizer: torch.optim.Optimizer

    def building(self) -> AbstractContextManager[object]:
        return without_storage()

    def adopt(self, model: nn.Module, weights: Weights) -> None:
        cast(model, lambda parameter: self.compute)
        materialize(model, self.device)
        fill(model, weights)
        self.model = model
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                self.masters[name] = self._master(name, parameter, weights)
        self.optimizer = optimizers.make_optimizer(self.masters.items(), self.spec)

    def _master(self, name: str, parameter: nn.Parameter, weights: Weights) -> torch.Tensor:
        if self.compute == torch.float32:
            return parameter
        whole = weights.read(name, 0, parameter.numel()).view(parameter.shape)
        master = whole.to(self.device, torch.float32, copy=True).requires_grad_()

        def collect(working: torch.Tensor) -> None:
            assert working.grad is not None, "the hook runs right after a gradient was accumulated"
            if master.grad is None:
                master.grad = working.grad.float()
            else:
                master.grad += working.grad
            working.grad = None

        parameter.register_post_accumulate_grad_hook(collect)
        return master

    def forward_backward(self, batch: MicroBatch, labelled: int, *, last: bool, learn: bool = True) -> torch.Tensor:
        self.model.train(learn)
        with torch.set_grad_enabled(learn):
            loss = self.loss_sum(self.model, batch)
        if learn:
            (loss * (self.scale.value / labelled)).backward()
        return loss.detach()

    @torch.no_grad()
    def step(self, lr: float) -> StepResult:
        masters = [master for master in self.masters.values() if master.grad is not None]
        gradients = [master.grad for master in masters if master.grad is not None]
        if self.scale.value != 1.0:
            torch._foreach_mul_(gradients, 1.0 / self.scale.value)
        norm = torch.nn.utils.get_total_norm(gradients)
        grad_norm = float(norm)
        finite = math.isfinite(grad_norm)
        if finite:
            if self.spec.optimizer.clip > 0:
                torch.nn.utils.clip_grads_with_norm_(masters, self.spec.optimizer.clip, norm)
            optimizers.set_lr(self.optimizer, lr)
            self.optimizer.step()
            self._publish()
        self.optimizer.zero_grad(set_to_none=True)
        self.scale.update(finite)
        return StepResult(grad_norm, finite)

    def _publish(self) -> None:
        """Round the masters into the working copies."""
        if self.compute != torch.float32:
            for name, parameter in self._trained():
                parameter.copy_(self.masters[name])

    def _trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, parameter) for name, parameter in self.model.named_parameters() if parameter.requires_grad)

    def save(self) -> tuple[Iterator[Piece], dict[str, float]]:
        pieces = optimizers.pieces(self.optimizer, self._fragments(), owned=True)
        return pieces, optimizers.scalars(self.optimizer, self.spec, self.scale.value)

    def _fragments(self) -> Iterator[Fragment]:
        return (Fragment(name, tuple(m.shape), m, 0, 0, m.numel()) for name, m in self.masters.items())

    @torch.no_grad()
    def load(self, read: Callable[[str, str, int, int], torch.Tensor], scalars: dict[str, float]) -> None:
        self.scale.value = scalars["loss_scale"] if self.scale.dynamic else 1.0
        optimizers.load(self.optimizer, self.spec, self.masters.values(), self._fragments(), read, scalars)
        self._publish()

    def full_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, parameter in self._trained():
            yield name, parameter.detach().cpu()

    def census(self) -> tuple[Row, ...]:
        line = "adapters" if any("lora_" in name for name, _ in self._trained()) else "weights"
        masters = list(self.masters.values())
        return measure(
            [
                ("frozen", Home.GPU, [p for p in self.model.parameters() if not p.requires_grad]),
                ("scales", Home.GPU, scales(self.model)),
                (line, Home.GPU, [p for _, p in self._trained()]),
                ("master", Home.GPU, masters),
                *optimizers.live_states(self.optimizer, Home.GPU),
                ("gradients", Home.GPU, [m.grad for m in masters] + [p.grad for p in self.model.parameters()]),
            ]
        )

    def close(self) -> None:
        self.masters.clear()
        del self.optimizer, self.model
