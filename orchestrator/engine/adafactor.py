"""Adafactor on whole matrices and on shards of their rows (arXiv:1804.04235, algorithm 4 without momentum).

The update is that of transformers' Adafactor (transformers/optimization.py) as its Trainer uses it: the learning rate is the
run's, neither relative to the weights nor to the step. No library's version works on shards: the factors of the columns, the
mean of the rows and the size of the update are sums over all rows, so ranks that hold different rows add them up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch

from orchestrator.engine.census import local
from orchestrator.engine.states import Elementwise, Fragment, Read, State
from orchestrator.engine.updates import chunks, like
from orchestrator.layout.moments import CHUNK
from orchestrator.spec import Optimizer

ROWS, COLUMNS, WHOLE = "exp_avg_sq_row", "exp_avg_sq_col", "exp_avg_sq"
SMALLEST = 1e-30
"""Added to every squared gradient (transformers/optimization.py, eps[0])."""

Sum = Callable[[torch.Tensor], torch.Tensor]
"""A tensor to its sum over the ranks that hold other rows of the same matrix, on the device it came from."""


class Adafactor:
    """The rule; `total` adds up over the ranks that share a matrix."""

    def __init__(self, spec: Optimizer, total: Sum) -> None:
        self.spec, self.total, self.codec = spec, total, Factors()

    def fresh(self, tensor: torch.Tensor) -> State:
        own = local(tensor.detach())
        if own.dim() != 2:
            return {WHOLE: like(tensor)}
        both = own.new_zeros(own.shape[0] + own.shape[1])
        return {ROWS: both[: own.shape[0]], COLUMNS: both[own.shape[0] :]}

    def update(self, tensor: torch.Tensor, gradient: torch.Tensor | None, state: State, lr: float) -> None:
        own = local(tensor.detach())
        slopes = own.new_empty(own.shape) if gradient is None else gradient
        forgets = 1.0 if gradient is None else state["step"] ** -self.spec.forgetting
        if own.dim() == 2:
            steps = self._matrix(slopes, state, forgets, tensor.shape[0])
        else:
            steps = self._vector(slopes, state, forgets)
        size = self.total(torch.stack([step.square().sum() for _, step in steps()] or [own.new_zeros(())]).sum())
        rms = math.sqrt(float(size) / tensor.numel())
        rate = lr / max(1.0, rms / self.spec.update_clip)
        own.mul_(1 - lr * self.spec.weight_decay)
        for part, step in steps():
            own[part].add_(step, alpha=-rate)

    def _vector(self, slopes: torch.Tensor, state: State, forgets: float) -> Callable[[], Iterator[tuple[slice, torch.Tensor]]]:
        if slopes.numel():
            state[WHOLE].lerp_(slopes.square().add_(SMALLEST), forgets)

        def steps() -> Iterator[tuple[slice, torch.Tensor]]:
            for part in chunks(slopes.numel()):
                yield part, slopes[part] * state[WHOLE][part].rsqrt()

        return steps

    def _matrix(
        self, slopes: torch.Tensor, state: State, forgets: float, every_row: int
    ) -> Callable[[], Iterator[tuple[slice, torch.Tensor]]]:
        """A function that gives the update of some rows at a time, before its size is bounded."""
        rows, columns = slopes.shape
        at_once = max(1, CHUNK // columns)
        sums = slopes.new_zeros(columns + 1, dtype=torch.float32)
        for part in chunks(rows, at_once):
            squares = slopes[part].square()
            state[ROWS][part].lerp_(squares.mean(dim=1).add_(SMALLEST), forgets)
            sums[:columns].add_(squares.sum(dim=0))
        if rows:
            sums[columns] = state[ROWS].sum()
        sums = self.total(sums)
        if rows:
            state[COLUMNS].lerp_(sums[:columns].div(every_row).add_(SMALLEST), forgets)
        mean = sums[columns] / every_row

        def steps() -> Iterator[tuple[slice, torch.Tensor]]:
            for part in chunks(rows, at_once):
                scale = (state[ROWS][part] / mean).rsqrt_()
                yield part, (slopes[part] * state[COLUMNS].rsqrt()).mul_(scale[:, None])

        return steps


class Factors:
    """The factors of rows lie with their rows; those of columns are alike on every rank and kept by the first."""

    def __init__(self) -> None:
        self._vector = Elementwise((WHOLE,))

    def saved(self, state: State, fragment: Fragment) -> Iterator[tuple[str, int, torch.Tensor]]:
        if WHOLE in state:
            yield from self._vector.saved(state, fragment)
            return
        yield ROWS, fragment.start // fragment.shape[1], state[ROWS]
        if fragment.start == 0:
            yield COLUMNS, 0, state[COLUMNS]

    def restore(self, state: State, fragments: Sequence[Fragment], read: Read, same_blocks: bool) -> None:
        if WHOLE in state:
            self._vector.restore(state, fragments, read, same_blocks)
            return
        (fragment,) = fragments
        first = fragment.start // fragment.shape[1]
        state[ROWS].copy_(read(fragment.name, ROWS, first, first + state[ROWS].numel()))
        state[COLUMNS].copy_(read(fragment.name, COLUMNS, 0, state[COLUMNS].numel()))
