"""An optimizer's states as runs of flattened parameters: what a checkpoint keeps, whoever wrote it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from orchestrator.engine.census import local

Read = Callable[[str, str, int, int], torch.Tensor]
"""(name, kind, start, stop) to elements [start, stop) of the flattened state `kind` of parameter `name`."""

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
                run.copy_(read(fragment.name, kind, start, start + fragment.count))
