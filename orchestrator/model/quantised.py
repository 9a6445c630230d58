"""Linear layers whose frozen weights rest in 4 bits, through bitsandbytes' operations.

The layer is a plain `nn.Linear` whose weight is one packed tensor in the compute dtype, so every engine divides, gathers
and offloads it as any other; bitsandbytes' own layer keeps its scales in the parameter object, which engines replace.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from orchestrator.errors import Fault, ModelError
from orchestrator.spec import NF4_DOUBLE, Parameter, RunSpec, stored_shape
from orchestrator.spec.quant import BLOCK, NESTED_BLOCK, NESTED_VALUES, RUN
from orchestrator.units import SHORT_NAMES, TORCH_NAMES, ceil_div

Read = Callable[[int, int], torch.Tensor]


@lru_cache(maxsize=1)
def dynamic_values() -> tuple[float, ...]:
    """The 256 values that scales are rounded to (arXiv:1511.04561). bitsandbytes is imported here, which registers its
    operations with torch: when the first layer is made, and by no run without one.

    Raises:
        ModelError: it is not installed.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it tells of kernels for inference that it has not found
    try:
        from bitsandbytes.functional import create_dynamic_map
    except ImportError as error:
        problem = f"quantised weights need bitsandbytes, which cannot be imported: {error}"
        raise ModelError(Fault("tuning", problem, "pip install bitsandbytes, or use tuning=lora")) from error
    return tuple(create_dynamic_map().tolist())


class QuantisedLinear(nn.Linear):
    """`nn.Linear` with its weight frozen in NF4. `weight` holds the packed bits, n × 1 in the compute dtype; the scales are
    buffers: `absmax`, and with double quantisation `nested` (the table of 256 values, the maxima of the maxima, their mean)."""

    absmax: torch.Tensor
    nested: torch.Tensor

    def __init__(self, rows: int, columns: int, bias: nn.Parameter | None, form: str, compute: str) -> None:
        super().__init__(columns, rows, bias=False, device="meta")
        dynamic_values()
        self.register_parameter("bias", bias)
        self.form = form
        self.values = Parameter("weight", (rows, columns), 0, trainable=False, quant=form)
        dtype: torch.dtype = getattr(torch, TORCH_NAMES[compute])
        packed = torch.empty(stored_shape(self.values, compute), dtype=dtype, device="meta")
        self.weight = nn.Parameter(packed, requires_grad=False)
        blocks, nested = ceil_div(self.values.numel, BLOCK), form == NF4_DOUBLE
        scale = torch.empty(blocks, dtype=torch.uint8 if nested else torch.float32, device="meta")
        self.register_buffer("absmax", scale, persistent=False)
        if nested:
            size = NESTED_VALUES + ceil_div(blocks, NESTED_BLOCK) + 1
            self.register_buffer("nested", torch.empty(size, dtype=torch.float32, device="meta"), persistent=False)

    def scales(self) -> list[torch.Tensor]:
        """What rests beside the packed weight."""
        return [buffer for buffer in self._buffers.values() if buffer is not None]

    @torch.no_grad()
    def pack(self, read: Read, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of the packed weight, flat, on the device of the scales, which are filled whole.

        `read(first, last)` gives values of the flattened weight. They pass in runs, cast to the compute dtype as a reader of
        the exported base would have them; neither the values nor the packed weight are ever held whole.
        """
        ops, dtype, device = torch.ops.bitsandbytes, self.weight.dtype, self.absmax.device
        each, numel = 2 * dtype.itemsize, self.values.numel
        kept = torch.empty(stop - start, dtype=dtype, device=device)
        double = self.form == NF4_DOUBLE
        largest = torch.empty(self.absmax.shape, dtype=torch.float32, device=device) if double else self.absmax
        for first in range(0, numel, RUN):
            last = min(first + RUN, numel)
            packed, scale = ops.quantize_4bit(read(first, last).to(device, dtype), BLOCK, "nf4", dtype)
            largest[first // BLOCK : ceil_div(last, BLOCK)] = scale
            begin, end = max(first // each, start), min(last // each, stop)
            if begin < end:
                kept[begin - start : end - start] = packed.view(-1)[begin - first // each : end - first // each]
        if double:
            self._nest(largest)
        return kept

    def _nest(self, largest: torch.Tensor) -> None:
        code, maxima, mean = self._nested_parts()
        code.copy_(torch.tensor(dynamic_values()))
        mean.copy_(largest.mean())
        small, scale = torch.ops.bitsandbytes.quantize_blockwise(largest.sub_(mean), code, NESTED_BLOCK)
        self.absmax.copy_(small)
        maxima.copy_(scale)

    def _nested_parts(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.nested[:NESTED_VALUES], self.nested[NESTED_VALUES:-1], self.nested[-1]

    def dequantised(self, packed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The whole weight, out × in, in `dtype`: made for one product and let go."""
        absmax = self.absmax
        if self.form == NF4_DOUBLE:
            code, maxima, mean = self._nested_parts()
            absmax = torch.ops.bitsandbytes.dequantize_blockwise(absmax, maxima, code, NESTED_BLOCK, torch.float32)
            absmax += mean
        # bitsandbytes' CPU kernel is wrong where a row is no multiple of the block, so it is shown rows of one block.
        rows = [self.values.numel // BLOCK, BLOCK]
        flat = torch.ops.bitsandbytes.dequantize_4bit(packed, absmax, BLOCK, "nf4", rows, dtype)
        return flat.view(self.values.shape)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = _Product.apply(x, self)
        return result


class _Product(torch.autograd.Function):
    """x · Wᵀ + b with W dequantised in the forward and again in the backward; only the layer is remembered between them, since
    sharding engines take its weight away and bring it back."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: QuantisedLinear) -> torch.Tensor:
        ctx.layer = layer
        # Not functional.linear: DeepSpeed puts a function of its own there.
        return torch._C._nn.linear(x, layer.dequantised(layer.weight, x.dtype), layer.bias)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        (gradient,) = gradients
        return gradient.matmul(ctx.layer.dequantised(ctx.layer.weight, gradient.dtype)), None


def rounded(values: torch.Tensor, form: str, device: torch.device) -> torch.Tensor:
    """`values` (out × in) as a quantised layer computes with them: packed and unpacked again on `device`, then as they were."""
    layer = _packed(values, form, device)
    return layer.dequantised(layer.weight, values.dtype).to(values.device)


@torch.no_grad()
def _packed(values: torch.Tensor, form: str, device: torch.device, bias: nn.Parameter | None = None) -> QuantisedLinear:
    compute = SHORT_NAMES[str(values.dtype).removeprefix("torch.")]
    layer = QuantisedLinear(values.shape[0], values.shape[1], bias, form, compute)
    for name, buffer in layer._buffers.items():
        layer._buffers[name] = None if buffer is None else torch.empty_like(buffer, device=device)
    flat, shape = values.reshape(-1), layer.weight.shape
    packed = layer.pack(lambda start, stop: flat[start:stop], 0, shape.numel())
    layer.weight = nn.Parameter(packed.view(shape), requires_grad=False)
    return layer


def quantise_loaded(model: nn.Module, blocks: Callable[[str], bool], form: str) -> None:
    """Pack each linear layer whose name `blocks` accepts, one at a time, where it is."""
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and blocks(name):
            parent, _, leaf = name.rpartition(".")
            packed = _packed(module.weight.detach(), form, module.weight.device, module.bias)
            setattr(model.get_submodule(parent), leaf, packed)


def quantise_linears(model: nn.Module, blocks: Callable[[str], bool], spec: RunSpec) -> None:
    """Put a `QuantisedLinear` in the place of each linear layer whose name `blocks` accepts.

    Raises:
        ModelError: there is none, or a weight cannot be packed.
    """
    found = [(name, module) for name, module in model.named_modules() if type(module) is nn.Linear and blocks(name)]
    if not found:
        problem = f"{type(model).__name__} has no linear layer in its blocks that could be quantised"
        raise ModelError(Fault("tuning", problem, "use tuning=lora"))
    for name, module in found:
        if module.in_features * module.out_features % BLOCK:
            size = f"{module.out_features} × {module.in_features}"
            problem = f"{name} has {size} weights, which NF4 cannot divide into blocks of {BLOCK}"
            raise ModelError(Fault("tuning", problem, "use tuning=lora"))
        parent, _, leaf = name.rpartition(".")
        rows, columns = module.out_features, module.in_features
        packed = QuantisedLinear(rows, columns, module.bias, spec.tuning.form, spec.precision.compute)
        setattr(model.get_submodule(parent), leaf, packed)
