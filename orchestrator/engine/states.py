"""An optimizer's states as runs of flattened parameters: what a checkpoint keeps, whoever wrote it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from orchestrator.engine.census import local

Read = Callable[[str, str, int, int], torch.Tensor]
"""(name, kind, start, stop) to elements [start, stop) of the flattened state `kind` of parameter `name`."""

READ_AT_ONCE = 2**22
"""Elements of a saved tensor that are read at once: 16 MiB in fp32, whatever a rank holds of it."""

State = dict[str, Any]
"""What `Optimizer.state` holds for one tensor."""


@dataclass(frozen=True, slots=True)
class Fragment:
    """`count` elements of the parameter `name` inside a tensor that the optimizer updates on this rank: from `offset` of the
    flattened tensor, from `start` of the flattened parameter, whose global shape is `shape`."""

    name: str
    shape: tuple[int, ...]
    tensor: torch.Tensor
    offset: int
    start: int
    count: int

    @property
    def width(self) -> int:
        """Elements in a row of the parameter."""
        return math.prod(self.shape[1:])


def fill_run(run: torch.Tensor, read: Read, name: str, kind: str, start: int, width: int = 1) -> None:
    """Copy the elements from `start` on of a saved tensor, whose rows have `width`, into `run`, some whole rows at a time."""
    at_once = max(1, READ_AT_ONCE // width) * width
    for first in range(0, run.numel(), at_once):
        part = run[first : first + at_once]
        part.copy_(read(name, kind, start + first, start + first + part.numel()))


class Codec(Protocol):
    """How the states of one optimizer become runs, and back."""

    def saved(self, state: State, fragment: Fragment) -> Iterator[tuple[str, int, torch.Tensor]]:
        """(kind, start in the flattened state, one-dimensional data) of what this rank holds for `fragment`."""
        ...

    def restore(self, state: State, fragments: Sequence[Fragment], read: Read, same_blocks: bool) -> None:
        """Fill a fresh `state` of one tensor, which consists of `fragments`. `same_blocks`: it was saved by the same strategy,
        so what depends on how tensors were cut can be read too."""
        ...


@dataclass(frozen=True, slots=True)
class Elementwise:
    """States that are shaped like the tensor itself, each under its own name."""

    kinds: tuple[str, ...]

    def saved(self, state: State, fragment: Fragment) -> Iterator[tuple[str, int, torch.Tensor]]:
        for kind in self.kinds:
            if kind in state:
                flat = local(state[kind]).reshape(-1)
                yield kind, fragment.start, flat.narrow(0, fragment.offset, fragment.count)

    def restore(self, state: State, fragments: Sequence[Fragment], read: Read, same_blocks: bool) -> None:
        for fragment in fragments:
            for kind, start, run in self.saved(state, fragment):
                fill_run(run, read, fragment.name, kind, start, fragment.width)
