"""Linear layers whose frozen weights rest in 4 or 8 bits.

The layer is a plain `nn.Linear` whose weight is one packed tensor in the compute dtype, so every engine divides, gathers
and offloads it as any other; bitsandbytes' own layers keep their scales in the parameter object, which engines replace.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from orchestrator.errors import Fault, ModelError
from orchestrator.model.formats import Read, format_of
from orchestrator.spec import Parameter, RunSpec, stored_shape
from orchestrator.spec.quant import DIVISOR, WEIGHTS_PER_BYTE
from orchestrator.units import SHORT_NAMES, TORCH_NAMES


class QuantisedLinear(nn.Linear):
    """`nn.Linear` with its weight frozen in few bits. `weight` holds the packed bits, n × 1 in the compute dtype; the scales
    are buffers."""

    def __init__(self, rows: int, columns: int, bias: nn.Parameter | None, form: str, compute: str) -> None:
        super().__init__(columns, rows, bias=False, device="meta")
        self.register_parameter("bias", bias)
        self.values = Parameter("weight", (rows, columns), 0, trainable=False, quant=form)
        self.format = format_of(self.values)
        dtype: torch.dtype = getattr(torch, TORCH_NAMES[compute])
        packed = torch.empty(stored_shape(self.values, compute), dtype=dtype, device="meta")
        self.weight = nn.Parameter(packed, requires_grad=False)
        for name, (size, kind) in self.format.buffers().items():
            self.register_buffer(name, torch.empty(size, dtype=kind, device="meta"), persistent=False)

    def _named_scales(self) -> dict[str, torch.Tensor]:
        return {name: buffer for name, buffer in self._buffers.items() if buffer is not None}

    def scales(self) -> list[torch.Tensor]:
        """What rests beside the packed weight."""
        return list(self._named_scales().values())

    @torch.no_grad()
    def pack(self, read: Read, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of the packed weight, flat, on the device of the scales, which are filled whole.

        `read(first, last)` gives values of the flattened weight. They pass in runs, cast to the compute dtype as a reader of
        the exported base would have them; neither the values nor the packed weight are ever held whole.
        """
        scales = self._named_scales()
        dtype, device = self.weight.dtype, scales["absmax"].device
        numel = self.values.numel
        each = WEIGHTS_PER_BYTE[self.values.quant] * dtype.itemsize
        kept = torch.empty(stop - start, dtype=dtype, device=device)
        collected = self.format.scratch(scales)
        for first in range(0, numel, self.format.run):
            last = min(first + self.format.run, numel)
            packed = self.format.pack(read(first, last).to(device, dtype), first, collected)
            begin, end = max(first // each, start), min(last // each, stop)
            if begin < end:
                kept[begin - start : end - start] = packed[begin - first // each : end - first // each]
        self.format.finish(collected, scales)
        return kept

    def dequantised(self, packed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The whole weight, out × in, in `dtype`: made for one product and let go."""
        return self.format.unpack(packed, self._named_scales(), dtype)

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
        form = spec.tuning.form
        if module.in_features * module.out_features % DIVISOR[form]:
            size = f"{module.out_features} × {module.in_features}"
            problem = f"{name} has {size} weights, which {form} cannot divide into blocks of {DIVISOR[form]}"
            raise ModelError(Fault("tuning", problem, "use tuning=lora"))
        parent, _, leaf = name.rpartition(".")
        rows, columns = module.out_features, module.in_features
        packed = QuantisedLinear(rows, columns, module.bias, form, spec.precision.compute)
        setattr(model.get_submodule(parent), leaf, packed)
