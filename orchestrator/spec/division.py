"""Which part of a parameter a rank of a tensor-parallel group holds (Shoeybi et al., arXiv:1909.08053, section 3).

The first matrices of attention and MLP are cut by rows (each rank makes its own heads and inner columns), the last ones by
columns (each rank's product is a part of a sum), embedding and head by rows of the vocabulary. What is left is whole on every
rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from enum import StrEnum
from functools import lru_cache

from orchestrator.spec.model import ModelShape, Parameter


class Division(StrEnum):
    """ROWS and COLUMNS: divided along dim 0 or 1. WHOLE: on every rank, its gradient too. SUMMED: on every rank, but each rank
    computes a part of its gradient, and the parts add up."""

    ROWS = "rows"
    COLUMNS = "columns"
    WHOLE = "whole"
    SUMMED = "summed"


VOCABULARY = ("embed_tokens", "lm_head")
INPUTS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
"""Linear layers cut by rows of their weight; with them go their biases and the B of their adapters, while A is whole."""

OUTPUTS = ("o_proj", "down_proj")
"""Linear layers cut by columns of their weight; with them goes the A of their adapters, while biases and B are whole."""

HEAD_NORMS = ("q_norm", "k_norm")
"""Norms inside attention (Qwen3): one weight for all heads, of which a rank sees its own."""


@lru_cache(maxsize=2**16)
def division(name: str) -> Division:
    """How the parameter `name` is divided; names are those of the module, PEFT's included."""
    *path, leaf = name.replace(".base_layer.", ".").split(".")
    modules = set(path)
    low, high = "lora_A" in modules, "lora_B" in modules
    if modules.intersection((*INPUTS, *VOCABULARY)):
        return Division.SUMMED if low else Division.ROWS
    if modules.intersection(OUTPUTS):
        return Division.SUMMED if high or leaf == "bias" else Division.COLUMNS
    return Division.SUMMED if modules.intersection(HEAD_NORMS) else Division.WHOLE


def divided(parameter: Parameter, size: int) -> Parameter:
    """The part of `parameter` that one of `size` ranks holds; every rank's is of the same shape."""
    kind, shape = division(parameter.name), parameter.shape
    if size == 1 or kind not in (Division.ROWS, Division.COLUMNS):
        return parameter
    dim = 0 if kind is Division.ROWS else 1
    assert shape[dim] % size == 0, f"{parameter.name} {shape} is not divided by {size} (checked in compose)"
    return replace(parameter, shape=(*shape[:dim], shape[dim] // size, *shape[dim + 1 :]))


def divided_table(table: Sequence[Parameter], size: int) -> tuple[Parameter, ...]:
    """What one of `size` ranks holds of each parameter of `table`."""
    if size == 1:
        return tuple(table)
    return tuple(divided(parameter, size) for parameter in table)


def widths(shape: ModelShape) -> dict[str, int]:
    """What a tensor-parallel size must divide, by the name of its config key."""
    return {
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_key_value_heads,
        "intermediate_size": shape.intermediate_size,
        "vocab_size": shape.vocab_size,
    }


def sizes_that_divide(shape: ModelShape) -> tuple[int, ...]:
    """Every tensor-parallel size above 1 that divides the model."""
    common = math.gcd(*widths(shape).values())
    return tuple(size for size in range(2, common + 1) if common % size == 0)
