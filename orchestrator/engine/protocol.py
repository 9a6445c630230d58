"""The contract between the training loop and an engine, and the words they share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from torch import nn

from orchestrator.data.batch import MicroBatch
from orchestrator.layout import Row

LossSum = Callable[[nn.Module, MicroBatch], torch.Tensor]
"""Sum (not mean) of the cross-entropy over the labelled tokens of a micro-batch, a scalar in fp32."""


class Weights(Protocol):
    """Where the initial values of parameters come from."""

    def read(self, name: str, start: int, stop: int, columns: tuple[int, int] | None = None) -> torch.Tensor:
        """Elements [start, stop) of the flattened parameter `name`, one-dimensional, on the CPU, in the source's dtype; with
        `columns` [first, last), start and stop are those of whole rows and only these columns of each row are read."""
        ...


@runtime_checkable
class PackedLayer(Protocol):
    """A module whose `weight` is not the values that are read for it but a packed tensor, with scales in buffers."""

    def pack(self, read: Callable[[int, int], torch.Tensor], start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of the packed weight, flat; the scales are set. `read(first, last)` gives the values."""
        ...

    def scales(self) -> list[torch.Tensor]:
        """The buffers beside the weight."""
        ...


@runtime_checkable
class LossGivingHead(Protocol):
    """A head that gives the loss itself, and can do so with a part of the vocabulary on each of several ranks."""

    def share(self, first: int, exchange: Callable[[torch.Tensor, str], None]) -> None:
        """From here on the weight holds the words from `first` on; `exchange` makes a tensor, in place, the "largest" or the
        "sum" over the ranks."""
        ...


@dataclass(frozen=True, slots=True)
class Piece:
    """A contiguous run of one flattened tensor of the training state, or some columns of some of its rows, held by this rank.

    `name` is the parameter's, `kind` "weight" (the master) or a state of the optimizer; `start` is the offset of
    `data[0]` in the flattened parameter; `shape` is the parameter's global shape. `owned` is False where another rank
    holds the same elements and saves them. With `columns` [first, last), `data` holds these of each row, row after row.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    start: int
    data: torch.Tensor
    owned: bool = True
    columns: tuple[int, int] | None = None

    def copied(self, into: torch.Tensor | None = None) -> Piece:
        """The same piece with data of its own in host memory, which the next step does not change; in the memory of `into`
        where that has its shape and dtype."""
        fits = into is not None and into.shape == self.data.shape and into.dtype == self.data.dtype
        target = into if into is not None and fits else torch.empty_like(self.data, device="cpu")
        return replace(self, data=target.copy_(self.data.detach()))


@dataclass(frozen=True, slots=True)
class StepResult:
    """`grad_norm` of the global gradient before clipping; `finite` False: no rank has updated anything."""

    grad_norm: float
    finite: bool


class Engine(Protocol):
    """One strategy at work on this rank. Averaging over ranks and micro-batches hides inside: gradients are those of
    (sum of the losses of all micro-batches of all ranks) ÷ `labelled`."""

    def building(self) -> AbstractContextManager[object]:
        """The context in which the module must be constructed."""
        ...

    def adopt(self, model: nn.Module, weights: Weights) -> None:
        """Shard `model`, fill it from `weights`, and make the optimizer. Once, before anything else."""
        ...

    def forward_backward(self, batch: MicroBatch, labelled: int, *, last: bool, learn: bool = True) -> torch.Tensor:
        """The local loss sum, detached, a scalar. `last`: the micro-batch that ends the step. `learn` False: forward alone."""
        ...

    def step(self, lr: float) -> StepResult:
        """Clip, update, and clear the gradients."""
        ...

    def save(self) -> tuple[Iterator[Piece], dict[str, float]]:
        """This rank's pieces of the training state, and the scalars ("step", "loss_scale") that every rank agrees on."""
        ...

    def load(self, read: Callable[[str, str, int, int], torch.Tensor], scalars: dict[str, float]) -> None:
        """Inverse of `save`: `read(name, kind, start, stop)` gives any run of any saved tensor, whoever wrote it."""
        ...

    def full_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, whole trained tensor on the CPU in the compute dtype), one at a time; every rank must iterate, and only
        rank 0 gets data: on the others the tensor is empty."""
        ...

    def census(self) -> tuple[Row, ...]:
        """The live tensors of this rank as rows, measured from storages, comparable with the Layout's."""
        ...

    def close(self) -> None:
        """Free what the engine holds."""
        ...
