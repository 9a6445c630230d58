"""Quantised weights: what rests of a parameter that is stored in fewer bits, to the element.

NF4 (arXiv:2305.14314, section 3): 4 bits to a weight and one absolute maximum to a block of 64, over the flattened tensor.
Double quantisation keeps these maxima in 8 bits, in blocks of 256, with their mean and a table of 256 values
(bitsandbytes/functional.py, quantize_4bit).
int8 (LLM.int8's weights, arXiv:2208.07339, section 2.1): 8 bits to a weight and one absolute maximum to a row of the matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from orchestrator.spec.model import LINEARS, ROOT, Parameter
from orchestrator.units import ceil_div, dtype_bytes

NF4, NF4_DOUBLE, INT8 = "nf4", "nf4-double", "int8"

WEIGHTS_PER_BYTE = {NF4: 2, NF4_DOUBLE: 2, INT8: 1}

BLOCK, NESTED_BLOCK, NESTED_VALUES = 64, 256, 256

DIVISOR = {NF4: BLOCK, NF4_DOUBLE: BLOCK, INT8: 4}
"""What must divide the number of a matrix's weights: whole blocks, and whole elements of any dtype that holds them."""

SMALLEST = 16
"""Bytes of the smallest tensor that is counted (engine/census.py leaves out single counters)."""

RUN = 2**24
"""Weights that are read, cast and quantised at once: 32 MiB in half precision. A multiple of every block."""


def quantised(table: Sequence[Parameter], form: str) -> tuple[Parameter, ...]:
    """The base model's table with every linear layer of its blocks in `form`; embeddings, norms, biases and head stay."""
    if not form:
        return tuple(table)

    def rests(parameter: Parameter) -> bool:
        module, _, leaf = parameter.name.rpartition(".")
        return parameter.block != ROOT and leaf == "weight" and module.rpartition(".")[2] in LINEARS

    return tuple(replace(p, quant=form) if rests(p) else p for p in table)


def stored_shape(parameter: Parameter, compute: str) -> tuple[int, ...]:
    """The shape of the tensor that holds `parameter` at rest. Packed weights are kept in the compute dtype, whatever their bits
    mean: FSDP2 casts a group, and ZeRO a model, to one dtype."""
    if not parameter.quant:
        return parameter.shape
    return (parameter.numel // (WEIGHTS_PER_BYTE[parameter.quant] * dtype_bytes(compute)), 1)


def stored(table: Sequence[Parameter], compute: str) -> tuple[Parameter, ...]:
    """The table with the shapes at rest; what a strategy divides and gathers is counted in these elements."""
    return tuple(replace(p, shape=stored_shape(p, compute), quant="") if p.quant else p for p in table)


def scale_elements(table: Sequence[Parameter]) -> dict[str, int]:
    """Elements by dtype of the scales beside the quantised weights; every rank holds all of them."""
    found: dict[str, int] = {}
    for parameter in table:
        for dtype, elements in _scales(parameter):
            if elements * dtype_bytes(dtype) >= SMALLEST:
                found[dtype] = found.get(dtype, 0) + elements
    return found


def _scales(parameter: Parameter) -> tuple[tuple[str, int], ...]:
    """(dtype, elements) of each tensor of scales of one parameter."""
    blocks = ceil_div(parameter.numel, BLOCK)
    if parameter.quant == NF4:
        return (("fp32", blocks),)
    if parameter.quant == NF4_DOUBLE:
        return ("uint8", blocks), ("fp32", NESTED_VALUES + ceil_div(blocks, NESTED_BLOCK) + 1)
    if parameter.quant == INT8:
        return (("fp32", parameter.shape[0]),)
    return ()
