"""How frozen weights rest in fewer bits: 4 through bitsandbytes' operations, 8 by the rows of the matrix.

A format turns runs of values into packed elements of the compute dtype and back; the tensors of scales are its layer's buffers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch

from orchestrator.errors import Fault, ModelError
from orchestrator.spec import INT8, NF4_DOUBLE, Parameter
from orchestrator.spec.quant import BLOCK, DIVISOR, NESTED_BLOCK, NESTED_VALUES, RUN
from orchestrator.units import ceil_div

Read = Callable[[int, int], torch.Tensor]
Scales = Mapping[str, torch.Tensor]
Buffers = dict[str, tuple[int, torch.dtype]]


class Format(Protocol):
    """One weight in fewer bits."""

    @property
    def run(self) -> int:
        """Values that are packed at once, whole groups of those that share a scale."""
        ...

    def buffers(self) -> Buffers:
        """Elements and dtype of each tensor of scales, by its name."""
        ...

    def scratch(self, scales: Scales) -> torch.Tensor:
        """Where the scales of runs are collected: a buffer, or a tensor that lives while the weight is packed."""
        ...

    def pack(self, values: torch.Tensor, first: int, collected: torch.Tensor) -> torch.Tensor:
        """The packed run of the flat `values`, which begin at `first` of the flattened weight; sets their scales."""
        ...

    def finish(self, collected: torch.Tensor, scales: Scales) -> None:
        """Turn the collected scales into the buffers."""
        ...

    def unpack(self, packed: torch.Tensor, scales: Scales, dtype: torch.dtype) -> torch.Tensor:
        """The whole weight, out × in, in `dtype`."""
        ...


@lru_cache(maxsize=1)
def dynamic_values() -> tuple[float, ...]:
    """The 256 values that NF4's scales are rounded to (arXiv:1511.04561). bitsandbytes is imported here, which registers its
    operations with torch: when the first layer is made, and by no run without one.

    Raises:
        ModelError: it is not installed.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it tells of kernels for inference that it has not found
    try:
        from bitsandbytes.functional import create_dynamic_map
    except ImportError as error:
        problem = f"weights in 4 bits need bitsandbytes, which cannot be imported: {error}"
        remedy = "pip install bitsandbytes, or use tuning.quant=int8 or tuning=lora"
        raise ModelError(Fault("tuning", problem, remedy)) from error
    return tuple(create_dynamic_map().tolist())


def prepare(form: str) -> None:
    """Import what the format needs, before anything is timed or traced."""
    if form and form != INT8:
        dynamic_values()


@dataclass(frozen=True, slots=True)
class Nf4:
    """Blocks of 64 over the flattened weight. The buffers are `absmax`, and with `double` quantisation `nested`: the table of
    256 values, the maxima of the maxima, their mean."""

    values: Parameter
    double: bool

    @property
    def run(self) -> int:
        return RUN

    @property
    def _blocks(self) -> int:
        return ceil_div(self.values.numel, BLOCK)

    def buffers(self) -> Buffers:
        dynamic_values()
        if not self.double:
            return {"absmax": (self._blocks, torch.float32)}
        nested = NESTED_VALUES + ceil_div(self._blocks, NESTED_BLOCK) + 1
        return {"absmax": (self._blocks, torch.uint8), "nested": (nested, torch.float32)}

    def scratch(self, scales: Scales) -> torch.Tensor:
        absmax = scales["absmax"]
        return torch.empty(absmax.shape, dtype=torch.float32, device=absmax.device) if self.double else absmax

    def pack(self, values: torch.Tensor, first: int, collected: torch.Tensor) -> torch.Tensor:
        packed, scale = torch.ops.bitsandbytes.quantize_4bit(values, BLOCK, "nf4", values.dtype)
        collected[first // BLOCK : ceil_div(first + values.numel(), BLOCK)] = scale
        return packed.view(-1)

    def finish(self, collected: torch.Tensor, scales: Scales) -> None:
        if not self.double:
            return
        code, maxima, mean = _nested_parts(scales["nested"])
        code.copy_(torch.tensor(dynamic_values()))
        mean.copy_(collected.mean())
        small, scale = torch.ops.bitsandbytes.quantize_blockwise(collected.sub_(mean), code, NESTED_BLOCK)
        scales["absmax"].copy_(small)
        maxima.copy_(scale)

    def unpack(self, packed: torch.Tensor, scales: Scales, dtype: torch.dtype) -> torch.Tensor:
        ops, absmax = torch.ops.bitsandbytes, scales["absmax"]
        if self.double:
            code, maxima, mean = _nested_parts(scales["nested"])
            absmax = ops.dequantize_blockwise(absmax, maxima, code, NESTED_BLOCK, torch.float32)
            absmax += mean
        # bitsandbytes' CPU kernel is wrong where a row is no multiple of the block, so it is shown rows of one block.
        rows = [self.values.numel // BLOCK, BLOCK]
        flat: torch.Tensor = ops.dequantize_4bit(packed, absmax, BLOCK, "nf4", rows, dtype)
        return flat.view(self.values.shape)


def _nested_parts(nested: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return nested[:NESTED_VALUES], nested[NESTED_VALUES:-1], nested[-1]


LARGEST = 127.0
"""The largest code of int8; -128 is not used."""


@dataclass(frozen=True, slots=True)
class Int8:
    """Weight × 127 ÷ the row's absolute maximum, rounded: the weights of LLM.int8 (bitsandbytes/backends/default/ops.py,
    int8_vectorwise_quant). Products are made with the unpacked weight, so inputs are not rounded as LLM.int8 does."""

    values: Parameter

    @property
    def run(self) -> int:
        columns = self.values.shape[1]
        whole = DIVISOR[INT8]  # rows, so that a run ends between elements of any compute dtype
        return max(1, RUN // columns // whole) * whole * columns

    def buffers(self) -> Buffers:
        return {"absmax": (self.values.shape[0], torch.float32)}

    def scratch(self, scales: Scales) -> torch.Tensor:
        return scales["absmax"]

    def pack(self, values: torch.Tensor, first: int, collected: torch.Tensor) -> torch.Tensor:
        rows = values.view(-1, self.values.shape[1])
        start = first // rows.shape[1]
        absmax = collected[start : start + len(rows)]
        absmax.copy_(torch.linalg.vector_norm(rows, torch.inf, dim=1))
        factor = (LARGEST / absmax).nan_to_num_(posinf=0.0)  # a row of zeros stays one
        return (rows * factor.unsqueeze(1)).round_().to(torch.int8).view(-1).view(values.dtype)

    def finish(self, collected: torch.Tensor, scales: Scales) -> None:
        pass

    def unpack(self, packed: torch.Tensor, scales: Scales, dtype: torch.dtype) -> torch.Tensor:
        codes = packed.view(torch.int8).view(self.values.shape)
        return codes.to(dtype).mul_((scales["absmax"] / LARGEST).unsqueeze(1))


def format_of(values: Parameter) -> Format:
    """The format that `values.quant` names."""
    return Int8(values) if values.quant == INT8 else Nf4(values, values.quant == NF4_DOUBLE)
