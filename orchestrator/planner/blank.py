"""Weights without values: what reading a model's files costs the host, for a run that reads none."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch

from orchestrator.model.dora import is_magnitude, lengths, rows_of
from orchestrator.model.weights import AdapterWeights
from orchestrator.spec import Parameter, RunSpec
from orchestrator.units import TORCH_NAMES


class BlankWeights:
    """Answers as `model.weights.SafetensorsWeights` would, with zeros: whole rows in the checkpoint's dtype, which is taken to
    be half precision, as published checkpoints are."""

    def __init__(self, spec: RunSpec, table: Sequence[Parameter]) -> None:
        compute = spec.precision.compute if spec.precision.compute != "fp32" else "bf16"
        self._compute = getattr(torch, TORCH_NAMES[spec.precision.compute])
        self._dtype = getattr(torch, TORCH_NAMES[compute])
        self._widths = {p.name: math.prod(p.shape[1:]) for p in table}
        self._adapters = AdapterWeights(table, spec.seed)

    def read(self, name: str, start: int, stop: int, columns: tuple[int, int] | None = None) -> torch.Tensor:
        """Elements [start, stop) of the flattened parameter, or `columns` of its rows."""
        if ".lora_A." in name or ".lora_B." in name:
            return self._adapters.read(name, start, stop, columns)
        if is_magnitude(name):
            weight = rows_of(name)
            return lengths(partial(self.read, weight), self._widths[weight], start, stop, self._compute)
        width = self._widths[name]
        first, last = start // width, -(-stop // width)
        if columns is not None:
            return torch.zeros((last - first) * (columns[1] - columns[0]), dtype=self._dtype)
        rows = torch.zeros((last - first) * width, dtype=self._dtype)
        return rows[start - first * width : stop - first * width]
