"""DoRA (arXiv:2402.09353): the lengths of a weight's rows beside its adapters, as PEFT computes with them.

PEFT finds the initial lengths in the module's weight when the adapter is made. Here that has no values yet, or is divided
already; they are read from the run's weights instead, like everything else that a rank starts from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from orchestrator.spec import MAGNITUDE

AT_ONCE = 2**24
"""Weights whose rows are measured at once."""

INFIX = f".{MAGNITUDE}.default."


def is_magnitude(name: str) -> bool:
    """Whether the parameter called `name` holds the lengths of rows."""
    return INFIX in name


def rows_of(name: str) -> str:
    """The name of the base weight whose rows the magnitude called `name` measures."""
    return name.replace(INFIX, ".base_layer.")


@contextmanager
def magnitudes_without_values() -> Iterator[None]:
    """While it is entered, PEFT makes the lengths of a layer's rows without looking at its weight."""
    from peft.tuners.lora.dora import DoraLinearLayer

    measure = DoraLinearLayer.update_layer

    def update_layer(self: Any, *, base_layer: Any, lora_A: torch.Tensor, **further: Any) -> None:
        self.weight = nn.Parameter(torch.ones(base_layer.out_features, dtype=lora_A.dtype, device=lora_A.device))

    DoraLinearLayer.update_layer = update_layer
    try:
        yield
    finally:
        DoraLinearLayer.update_layer = measure


def lengths(read: Callable[[int, int], torch.Tensor], width: int, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
    """The lengths in fp32 of rows [start, stop) of a weight with rows of `width`, as they are once rounded to `dtype`;
    `read(first, last)` gives values of the flattened weight."""
    span = max(1, AT_ONCE // width)
    found = [
        torch.linalg.vector_norm(read(first * width, min(first + span, stop) * width).to(dtype).view(-1, width).float(), dim=1)
        for first in range(start, stop, span)
    ]
    return torch.cat(found) if found else torch.empty(0)
