"""FSDP2, alone or over tensor-parallel groups: the only file that calls `fully_shard`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from orchestrator.data.batch import MicroBatch
from orchestrator.engine import materialize, optimizers
from orchestrator.engine.census import local, measure
from orchestrator.engine.protocol import LossSum, Piece, StepResult, Weights
from orchestrator.engine.scaling import LossScale
from orchestrator.engine.states import Fragment, Read
from orchestrator.engine.tensor_parallel import Region, TensorParallel
from orchestrator.errors import Fault, ModelError
from orchestrator.layout import Row, lower
from orchestrator.spec import Home, RunSpec
from orchestrator.units import TORCH_NAMES


def blocks(model: nn.Module) -> list[nn.Module]:
    """The transformer blocks, in order: the modules that transformers itself says must not be split.

    Raises:
        ModelError: the model class names none.
    """
    names: set[str] = set()
    for module in model.modules():
        names |= set(getattr(module, "_no_split_modules", None) or ())
    found = [module for module in model.modules() if type(module).__name__ in names]
    if not found:
        raise ModelError(
            Fault("model", f"{type(model).__name__} names no transformer block (_no_split_modules)", "use zero=stage3 instead")
        )
    return found


def _rows_before(shape: torch.Size, ranks: int, position: int) -> tuple[int, int]:
    """(offset, elements) of this rank's run in the flattened parameter: torch.chunk over dim 0, row-major."""
    rows, rest = shape[0], math.prod(shape[1:])
    stride = -(-rows // ranks)
    first = min(rows, position * stride)
    return first * rest, (min(rows, first + stride) - first) * rest


class FsdpEngine:
    """Trainable parameters rest in fp32, sharded over `dp_shard`; they are their own master. Every micro-batch reduces its
    gradients into fp32 shards, so accumulation costs communication, never memory. Under tensor parallelism a parameter is
    cut first, and what a rank holds of it is then sharded like any other."""

    def __init__(self, spec: RunSpec, device: torch.device, loss_sum: LossSum) -> None:
        self.spec, self.device, self.loss_sum = spec, device, loss_sum
        self.policy = lower(spec)
        self.home = Home(self.policy["offload"]["device"])
        self.compute = getattr(torch, TORCH_NAMES[spec.precision.compute])
        self.scale = LossScale.for_dtype(spec.precision.compute)
        self.mesh = self._mesh()
        self.shard_axis = self.mesh["dp_shard"]
        self.tensor = TensorParallel(self.mesh["tp"])
        self.model: nn.Module
        self.optimizer: torch.optim.Optimizer

    def _mesh(self) -> DeviceMesh:
        axes = self.policy["mesh"]
        return init_device_mesh(self.device.type, tuple(axes.values()), mesh_dim_names=tuple(axes))

    def building(self) -> AbstractContextManager[object]:
        return materialize.without_storage()

    def adopt(self, model: nn.Module, weights: Weights) -> None:
        # Reads top to bottom: dtypes at rest, tensor parallel, blocks, root, storage, values, optimizer.
        materialize.cast(model, lambda parameter: torch.float32 if parameter.requires_grad else self.compute)
        self.tensor.divide(model)
        offload: OffloadPolicy = OffloadPolicy()
        if self.home is not Home.GPU:
            offload = CPUOffloadPolicy(pin_memory=self.policy["offload"]["pin_memory"])
        settings: dict[str, Any] = {
            "mesh": self.mesh["dp_replicate", "dp_shard"] if self.mesh["dp_replicate"].size() > 1 else self.shard_axis,
            "reshard_after_forward": self.policy["reshard_after_forward"],
            "mp_policy": MixedPrecisionPolicy(param_dtype=self.compute, reduce_dtype=torch.float32),
            "offload_policy": offload,
        }
        for block in blocks(model):
            fully_shard(block, **settings)
        fully_shard(model, **settings)
        resting = self.device if self.home is Home.GPU else torch.device("cpu")
        materialize.materialize(model, resting, self.device)
        self.model = model
        self._fill(weights)
        self.optimizer = optimizers.make_optimizer(self._trained(), self.spec, optimizers.Parts(self._total, self._first_row))

    @torch.no_grad()
    def _fill(self, weights: Weights) -> None:
        weights = materialize.StoredWeights(self.model, weights)
        for name, parameter in self.model.named_parameters():
            region, shard = self._region(name, parameter), local(parameter)
            # Also where nothing of it is held: a quantised layer makes its scales from all of its weights.
            shard.copy_(weights.read(name, region.start, region.stop, region.columns).view(shard.shape))

    def _region(self, name: str, parameter: torch.Tensor) -> Region:
        """Where this rank's shard lies in the whole parameter."""
        return self.tensor.region(name, parameter.shape, *self._run(parameter))

    def _run(self, parameter: torch.Tensor) -> tuple[int, int]:
        return _rows_before(parameter.shape, self.shard_axis.size(), self.shard_axis.get_local_rank())

    def _first_row(self, parameter: torch.Tensor) -> int:
        return self._run(parameter)[0] // math.prod(parameter.shape[1:])

    def _total(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of `values` over the ranks of the shard axis; what rests in host memory goes by way of the device."""
        summed = values.to(self.device)
        dist.all_reduce(summed, group=self.shard_axis.get_group())
        return summed.to(values.device)

    def _trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, parameter) for name, parameter in self.model.named_parameters() if parameter.requires_grad)

    def forward_backward(self, batch: MicroBatch, labelled: int, *, last: bool, learn: bool = True) -> torch.Tensor:
        self.model.train(learn)
        with self.tensor.loss():
            with torch.set_grad_enabled(learn):
                loss = self.loss_sum(self.model, batch)
            if learn:
                # FSDP averages over the data-parallel ranks; the contract wants the sum.
                (loss * (self.scale.value * self.spec.strategy.dp / labelled)).backward()
            else:
                self._reshard()
        return local(loss.detach())

    def _reshard(self) -> None:
        """Free what a forward without a backward leaves gathered."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    @torch.no_grad()
    def step(self, lr: float) -> StepResult:
        named = [(name, local(p.grad)) for name, p in self._trained() if p.grad is not None]
        self.tensor.add_up(named, self.device)
        grad_norm = self._norm(named) / self.scale.value
        finite = math.isfinite(grad_norm)
        if finite:
            clip = self.spec.optimizer.clip
            factor = min(1.0, clip / (grad_norm + 1e-6)) if clip > 0 else 1.0
            factor /= self.scale.value
            if factor != 1.0:
                torch._foreach_mul_([gradient for _, gradient in named], factor)
            optimizers.set_lr(self.optimizer, lr)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.scale.update(finite)
        return StepResult(grad_norm, finite)

    def _norm(self, gradients: list[tuple[str, torch.Tensor]]) -> float:
        """Norm of the whole gradient: squares of the local shards, added up over the shard axis and, where they are divided
        among its ranks, over the tensor-parallel group."""
        squares = torch.stack(
            [
                self._square([g for name, g in gradients if g.numel() and self.tensor.is_divided(name) is divided])
                for divided in (True, False)
            ]
        ).to(self.device)
        dist.all_reduce(squares, group=self.shard_axis.get_group())
        square = float(self.tensor.add_squares(squares[0], squares[1]))
        return math.sqrt(square) if math.isfinite(square) else math.nan

    def _square(self, gradients: list[torch.Tensor]) -> torch.Tensor:
        return torch.nn.utils.get_total_norm(gradients).float().square() if gradients else torch.zeros((), device=self.device)

    def save(self) -> tuple[Iterator[Piece], dict[str, float]]:
        first_copy = self.mesh["dp_replicate"].get_local_rank() == 0
        pieces = optimizers.pieces(self.optimizer, self._fragments(), first_copy)
        return self.tensor.placed(pieces), optimizers.scalars(self.optimizer, self.spec, self.scale.value)

    def _fragments(self) -> Iterator[Fragment]:
        """What this rank holds, as runs of the tensor-parallel part that is its own."""
        for name, parameter in self._trained():
            start, count = self._run(parameter)
            if count:
                yield Fragment(name, tuple(parameter.shape), parameter, 0, start, count)

    @torch.no_grad()
    def load(self, read: Read, scalars: dict[str, float]) -> None:
        self.scale.value = scalars["loss_scale"] if self.scale.dynamic else 1.0
        trained = dict(self._trained())
        own = self.tensor.reader(read, {name: tuple(parameter.shape) for name, parameter in trained.items()})
        optimizers.load(self.optimizer, self.spec, trained.values(), self._fragments(), own, scalars)

    def full_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, parameter in self._trained():
            sharded = cast(DTensor, parameter.detach())
            if self.home is not Home.GPU:
                sharded = cast(DTensor, sharded.to(self.device))
            whole = self.tensor.gather(name, sharded.full_tensor().to(self.compute))
            yield name, whole.cpu() if dist.get_rank() == 0 else whole.new_empty(0)

    def census(self) -> tuple[Row, ...]:
        trained = [p for _, p in self._trained()]
        line = "adapters" if any("lora_" in name for name, _ in self._trained()) else "weights"
        return measure(
            [
                ("frozen", self.home, [p for p in self.model.parameters() if not p.requires_grad]),
                ("scales", Home.GPU, materialize.scales(self.model)),
                (line, self.home, trained),
                *optimizers.live_states(self.optimizer, self.home),
                ("gradients", self.home, [p.grad for p in self.model.parameters()]),
            ]
        )

    def close(self) -> None:
        del self.optimizer, self.model
