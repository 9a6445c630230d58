"""ZeRO: the only file that imports deepspeed.

Attributes of DeepSpeed's optimizers that are read here are those of 0.19.8: runtime/zero/stage_1_and_2.py,
runtime/zero/stage3.py, runtime/fp16/unfused_optimizer.py.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from orchestrator.data.batch import MicroBatch
from orchestrator.engine import optimizers
from orchestrator.engine.census import local, measure
from orchestrator.engine.deepspeed_aio import load_op
from orchestrator.engine.deepspeed_groups import TENSOR, Groups, forget
from orchestrator.engine.deepspeed_swap import (
    SwappedStates,
    disk_rows,
    free_weight_buffers,
    on_disk,
    put_part,
    swapper_of,
    weight_buffers,
)
from orchestrator.engine.materialize import (
    StoredWeights,
    cast,
    materialize,
    move_buffers,
    replace_parameters,
    scales,
    without_storage,
)
from orchestrator.engine.protocol import LossSum, Piece, StepResult, Weights
from orchestrator.engine.states import Fragment, fill_run
from orchestrator.engine.swap_folder import SwapFolder, claim
from orchestrator.engine.tensor_parallel import TensorParallel
from orchestrator.layout import Row, lower
from orchestrator.spec import Home, RunSpec, Shard
from orchestrator.units import TORCH_NAMES, ceil_div


def _import_deepspeed(on_cpu: bool) -> Any:
    """deepspeed, quiet, and without the shared-memory op that it would compile for ten seconds and never use in training."""
    if on_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if on_cpu:
        # `deepspeed.comm.torch` as an attribute is torch itself (a star import), so go through sys.modules.
        backend: Any = sys.modules["deepspeed.comm.torch"]
        backend.build_shm_op = lambda: None
    return deepspeed


def _partitioner(deepspeed: Any, config: dict[str, Any], dtype: torch.dtype) -> AbstractContextManager[object]:
    """`zero.Init` without its broadcast of every whole parameter from rank 0: the values are filled in later, part by part,
    so sending them would move the whole model for nothing and touch memory that no rank keeps."""

    def keep_own_part(init: Any, parameter: Any) -> None:
        init._convert_to_deepspeed_param(parameter)
        parameter.partition()

    partitioner: Any = type("Partitioner", (deepspeed.zero.Init,), {"_zero_init_param": keep_own_part})
    context: AbstractContextManager[object] = partitioner(config_dict_or_path=config, dtype=dtype)
    return context


@contextlib.contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    """Keep floating-point buffers as they are while DeepSpeed casts the module: a rope table in bf16 moves positions."""
    kept = [(module, name, buffer) for module in model.modules() for name, buffer in module._buffers.items()]
    yield
    for module, name, buffer in kept:
        if buffer is not None and buffer.is_floating_point():
            module._buffers[name] = buffer.to(module.get_buffer(name).device)


class DeepSpeedEngine:
    """The real `deepspeed.initialize` engine under the JSON that the Layout lowers to.

    Stages 0, 1 and 2 are built without storage and filled whole on each rank, as they must hold them; stage 3 is built
    inside `zero.Init`, which keeps only this rank's part of each tensor, and each part is filled by itself.
    """

    def __init__(self, spec: RunSpec, device: torch.device, loss_sum: LossSum) -> None:
        self.spec, self.device, self.loss_sum = spec, device, loss_sum
        self.deepspeed = _import_deepspeed(device.type == "cpu")
        self.deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)
        self.swap_folder = self._claim_swap_folder()
        self.config = lower(self.spec)
        self.compute = getattr(torch, TORCH_NAMES[spec.precision.compute])
        self.shard = spec.strategy.shard
        self.ranks, self.rank = spec.strategy.dp, dist.get_rank()
        self.groups = Groups(device, spec.strategy.tp) if spec.strategy.tp > 1 else None
        self.tensor = TensorParallel(self.groups.mesh[TENSOR] if self.groups else None)
        self.micro_step = 0
        self.model: nn.Module
        self.engine: Any
        self.zero: Any
        self.states: SwappedStates

    def _claim_swap_folder(self) -> SwapFolder | None:
        """A folder for this job where it swaps to NVMe, from now on the spec's path: one on each machine, shared by the ranks
        that one launcher has started there."""
        nvme = self.spec.strategy.nvme
        if nvme is None:
            return None
        load_op()
        claimed = claim(Path(nvme.path), f"{os.getppid()}-{os.environ.get('MASTER_PORT') or os.getpid()}")
        strategy = replace(self.spec.strategy, nvme=replace(nvme, path=str(claimed.path)))
        self.spec = replace(self.spec, strategy=strategy)
        return claimed

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer inside whatever DeepSpeed wrapped around it."""
        inner: torch.optim.Optimizer = getattr(self.zero, "optimizer", self.zero)
        return inner

    def building(self) -> AbstractContextManager[object]:
        # A layer is quantised after it was made: it has no storage until then, and is divided when the engine adopts it.
        if self.shard is not Shard.PARAMETERS or self.spec.tuning.form:
            return without_storage()
        return _partitioner(self.deepspeed, self.config, self.compute)

    def adopt(self, model: nn.Module, weights: Weights) -> None:
        if self.shard is Shard.PARAMETERS:
            if self.spec.tuning.form:
                cast(model, lambda parameter: self.compute)
                self._partition_modules(model)
            self._fill_partitions(model, weights)
        else:
            cast(model, lambda parameter: self.compute)
            self.tensor.divide(model)
            materialize(model, self.device)
            self.tensor.fill(model, weights)
            self.tensor.add_up_as_made(model)
        trained: list[tuple[str, Any]] = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        for name, parameter in trained:
            parameter.model_parallel = self.tensor.is_divided(name)  # whose squares differ among ranks (runtime/utils.py)
        with _buffers_kept(model):
            self.engine, self.zero, _, _ = self.deepspeed.initialize(
                model=model,
                optimizer=optimizers.make_optimizer(trained, self.spec),
                config=self.config,
                dist_init_required=False,
                mpu=self.groups,
            )
        self.model = model
        self.states = SwappedStates(self.zero)
        if self.shard is Shard.NONE and self.compute != torch.float32:
            # The unfused half-precision optimizer steps once on zero gradients while it is made; undo that.
            self.zero.optimizer.state.clear()
            self.zero.refresh_fp32_params()

    @torch.no_grad()
    def _partition_modules(self, model: nn.Module) -> None:
        """What `zero.Init` does while a module is made, for one that was made without storage: each parameter of the base gets
        storage and is divided, one at a time; adapters stay whole."""
        partitioner: Any = _partitioner(self.deepspeed, self.config, self.compute)
        partitioner._enable_mem_efficient_linear()

        def place(parameter: nn.Parameter) -> nn.Parameter:
            placed = nn.Parameter(torch.empty_like(parameter, device=self.device), parameter.requires_grad)
            if not parameter.requires_grad:
                partitioner._zero_init_param(placed)
            return placed

        replace_parameters(model, place)
        move_buffers(model, self.device)

    @torch.no_grad()
    def _fill_partitions(self, model: nn.Module, weights: Weights) -> None:
        weights = StoredWeights(model, weights)
        for name, parameter in model.named_parameters():
            if not hasattr(parameter, "ds_tensor"):  # made outside zero.Init: adapters, still whole
                parameter.data = weights.read(name, 0, parameter.numel()).view(parameter.shape).to(self.device, self.compute)
                continue
            start, stop = self._partition(parameter)
            put_part(parameter, weights.read(name, start, stop))

    def _partition(self, parameter: Any) -> tuple[int, int]:
        """[start, stop) of this rank's part of the flattened parameter; parts are equal, the last is padded."""
        part = ceil_div(parameter.ds_numel, self.ranks)
        return min(self.rank * part, parameter.ds_numel), min((self.rank + 1) * part, parameter.ds_numel)

    def forward_backward(self, batch: MicroBatch, labelled: int, *, last: bool, learn: bool = True) -> torch.Tensor:
        self.engine.train(learn)
        with self.tensor.loss():
            with torch.set_grad_enabled(learn):
                loss = self.loss_sum(self.engine, batch)
            if learn:
                # DeepSpeed averages over the ranks; the contract wants the sum, and no division by the accumulation.
                self.engine.backward(loss * (self.ranks / labelled), scale_wrt_gas=False)
                if not last:
                    self.engine.step()  # inside an accumulation this only counts the micro-batch
        return local(loss.detach())

    def step(self, lr: float) -> StepResult:
        optimizers.set_lr(self.optimizer, lr)
        if self.shard is Shard.NONE and self.compute == torch.float32:
            return self._step_unsharded_fp32()
        skipped = self.engine.skipped_steps
        self.engine.step()
        norm = self.engine.get_global_grad_norm()
        grad_norm = math.nan if norm is None else float(norm)
        finite = self.engine.skipped_steps == skipped and math.isfinite(grad_norm) and grad_norm >= 0
        return StepResult(grad_norm if finite else math.nan, finite)

    def _step_unsharded_fp32(self) -> StepResult:
        """Stage 0 in fp32 runs the bare optimizer and would apply a non-finite gradient: look before it does."""
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        grad_norm = float(torch.nn.utils.get_total_norm(gradients))
        finite = math.isfinite(grad_norm)
        kept = [(group, group["params"]) for group in self.optimizer.param_groups]
        if not finite:
            for gradient in gradients:
                gradient.zero_()  # the engine clips them
            for group, _ in kept:
                group["params"] = []  # neither weights nor states
        self.engine.step()
        for group, parameters in kept:
            group["params"] = parameters
        return StepResult(grad_norm, finite)

    # The training state ------------------------------------------------------------------------------------------

    def _trained(self) -> Iterator[tuple[str, Any]]:
        return ((name, parameter) for name, parameter in self.model.named_parameters() if parameter.requires_grad)

    def _masters(self) -> list[torch.Tensor]:
        """The fp32 tensors that the optimizer updates, as it knows them."""
        if self.shard is Shard.PARAMETERS:
            return list(self.zero.fp32_partitioned_groups_flat)
        if self.shard is not Shard.NONE:
            return list(self.zero.single_partition_of_fp32_groups)
        if self.compute != torch.float32:
            return [master for group in self.zero.fp32_groups for master in group]
        return [parameter for _, parameter in self._trained()]

    def _fragments(self) -> Iterator[Fragment]:
        """What of each parameter this rank's masters hold."""
        masters = self._masters()
        if self.shard is Shard.NONE:
            for (name, parameter), master in zip(self._trained(), masters, strict=True):
                yield Fragment(name, tuple(parameter.shape), master, 0, 0, parameter.numel())
        elif self.shard is Shard.PARAMETERS:
            for name, parameter in self._trained():
                group, offset, _ = self.zero.grad_position[self.zero.get_param_id(parameter)]
                start, stop = self._partition(parameter)
                if stop > start:
                    yield Fragment(name, tuple(parameter.ds_shape), masters[group], offset, start, stop - start)
        else:
            for name, parameter in self._trained():
                fragment = parameter._hp_mapping
                if fragment is not None:
                    address, own = fragment.get_hp_fragment_address(), fragment.lp_fragment_address
                    master = masters[fragment.param_group_index]
                    yield Fragment(name, tuple(parameter.shape), master, address.start, own.start, own.numel)

    def save(self) -> tuple[Iterator[Piece], dict[str, float]]:
        scale = float(getattr(self.zero, "cur_scale", 1.0)) if self.compute == torch.float16 else 1.0
        owned = self.shard is not Shard.NONE or self.rank == 0
        pieces = self.states.pieces(self.optimizer, self._masters(), self._fragments(), owned)
        return self.tensor.placed(pieces), optimizers.scalars(self.optimizer, self.spec, scale)

    @torch.no_grad()
    def load(self, read: Callable[[str, str, int, int], torch.Tensor], scalars: dict[str, float]) -> None:
        own = self.tensor.reader(read, {name: tuple(p.shape) for name, p in self._trained()}) if self.groups else read
        self.states.load(self.optimizer, self.spec, self._masters(), self._fragments(), own, scalars)
        self._publish(own)
        if self.compute == torch.float16 and hasattr(self.zero, "loss_scaler"):
            self.zero.loss_scaler.cur_scale = scalars["loss_scale"]

    def _publish(self, read: Callable[[str, str, int, int], torch.Tensor]) -> None:
        """Bring the working copies of the weights up to the masters that were just read. After a step stage 3 keeps small
        weights whole: they are let go of and gathered again, as after an update (stage3.py, `_post_step`)."""
        standing = [p for p in self.zero.persistent_parameters if p.numel()] if self.shard is Shard.PARAMETERS else []
        if standing:
            standing[0].partition(standing)
        for name, parameter in self._trained():
            if self.shard is Shard.PARAMETERS:
                start, stop = self._partition(parameter)
                if on_disk(parameter):
                    put_part(parameter, read(name, "weight", start, stop))
                else:
                    fill_run(parameter.ds_tensor.data[: stop - start], read, name, "weight", start)
            else:
                fill_run(parameter.view(-1), read, name, "weight", 0)
        if standing:
            standing[0].all_gather(standing)

    def full_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, parameter in self._trained():
            gathered = contextlib.nullcontext()
            if self.shard is Shard.PARAMETERS:
                gathered = self.deepspeed.zero.GatheredParameters([parameter])
            with gathered:
                whole = self.tensor.gather(name, parameter.detach())
                whole = whole.to("cpu", copy=True) if self.rank == 0 else torch.empty(0, dtype=self.compute)
            yield name, whole

    # What is live --------------------------------------------------------------------------------------------------

    def census(self) -> tuple[Row, ...]:
        line = "adapters" if any("lora_" in name for name, _ in self._trained()) else "weights"
        strategy = self.spec.strategy
        optimizer_home, zero = strategy.optimizer_home.in_memory, self.zero
        parameter_home = strategy.parameter_home.in_memory
        parameters: list[Any] = list(self.model.parameters())
        frozen = [p for p in parameters if not p.requires_grad]
        masters = self._masters()
        moments = optimizers.live_states(self.optimizer, optimizer_home)
        leaf_gradients = [p.grad for p in parameters]
        if self.shard is Shard.PARAMETERS:
            swapper = swapper_of(parameters)
            swapped = [
                (line if p.requires_grad else "frozen", p.nvme_swapper.get_path(p), self.compute)
                for p in parameters
                if on_disk(p)
            ]
            swapped += [(line, path, torch.float32) for line, path in self.states.files()]
            return disk_rows(swapped) + measure(
                [
                    ("frozen", parameter_home, [p.ds_tensor for p in frozen]),
                    ("scales", Home.GPU, scales(self.model)),
                    (line, parameter_home, [p.ds_tensor for p in parameters if p.requires_grad]),
                    ("persistent", Home.GPU, [p.data for p in parameters if p.numel()]),
                    ("master", optimizer_home, masters),
                    *moments,
                    ("gradients", optimizer_home, [zero.grad_partitions_flat_buffer, *(m.grad for m in masters)]),
                    ("gradients", Home.GPU, leaf_gradients),
                    ("bucket", Home.GPU, [bucket.buffer for bucket in zero.ipg_buckets.values()]),
                    ("staging", Home.CPU, weight_buffers(swapper) + self.states.buffers()),
                ]
            )
        rows: list[tuple[str, Home, list[Any]]] = [
            ("frozen", Home.GPU, frozen),
            ("scales", Home.GPU, scales(self.model)),
            (line, Home.GPU, [p for p in parameters if p.requires_grad]),
            ("master", optimizer_home, masters),
            *moments,
        ]
        if optimizer_home is not Home.GPU:
            staging = [*zero.param_buffer_of_bit16_for_cpu_offload_groups, zero.temp_grad_buffer_for_cpu_offload]
            rows.append(("staging", optimizer_home, staging))
            rows.append(("staging", Home.GPU, [zero.temp_grad_buffer_for_gpu_offload]))
            accumulated = list(zero.accumulated_grads_in_cpu.values())
            rows.append(("gradients", optimizer_home, [*(m.grad for m in masters), *accumulated]))
            rows.append(("gradients", Home.GPU, leaf_gradients))
        else:
            rows.append(("gradients", Home.GPU, [*leaf_gradients, *(m.grad for m in masters)]))
        if self.shard is not Shard.NONE:
            rows.append(("bucket", Home.GPU, [buffer for bucket in zero.ipg_buckets.values() for buffer in bucket.buffer]))
        return measure(rows)

    def close(self) -> None:
        swapper = swapper_of(self.model.parameters())
        self.engine.destroy()
        forget()
        free_weight_buffers(swapper)
        if self.swap_folder is not None:
            self.swap_folder.release()
        del self.engine, self.zero, self.model
