"""What a run does when a step goes wrong: numbers that are not finite, and memory that ends."""

from __future__ import annotations

import math

import torch

from orchestrator.errors import Fault, OrchestratorError
from orchestrator.spec import RunSpec

NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""What torch says where it has no memory but raises no error of that name (c10/core/impl/alloc_cpu.cpp, CUDA libraries)."""


class Diverged(OrchestratorError):
    """The loss or its gradient was not finite for too many steps in a row."""

    title = "The training has diverged"


class MemoryEnded(OrchestratorError):
    """A rank could not allocate."""

    exit_code = 3
    title = "A rank ran out of memory"


def ran_out(error: BaseException) -> bool:
    """Whether `error` says that memory could not be had."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in NO_MEMORY)


class Watch:
    """Counts steps that were not finite. Every rank sees the same losses and norms, so every rank comes to the same end."""

    def __init__(self, spec: RunSpec) -> None:
        self._spec = spec
        self._skipped = 0

    def step(self, number: int, finite: bool) -> str | None:
        """What to say about step `number`, if anything."""
        self._skipped = 0 if finite else self._skipped + 1
        if finite:
            return None
        return f"step {number}: loss or gradient is not finite, nothing was updated ({self._skipped} in a row)"

    def refuse(self, number: int, loss: float) -> None:
        """End the run after step `number` where its health asks for it.

        Raises:
            Diverged: it was not finite, and one or too many in a row end the run.
        """
        health = self._spec.health
        # The scaled gradients of fp16 may overflow while the loss is well; the scale is halved and the next step is good.
        scaling = self._spec.precision.compute == "fp16" and math.isfinite(loss)
        limit = 1 if health.on_nonfinite == "stop" and not scaling else health.nonfinite_limit
        if self._skipped >= limit:
            raise Diverged(Fault("loss", self._problem(number), self._remedy()))

    def _problem(self, number: int) -> str:
        what = "had a loss or gradient that is not finite; nothing was updated"
        if self._skipped == 1:
            return f"step {number} {what}"
        return f"{self._skipped} steps in a row, up to step {number}, {what}"

    def _remedy(self) -> str:
        health = self._spec.health
        more = "health.on_nonfinite=skip, " if health.on_nonfinite == "stop" else ""
        return (
            f"lower optimizer.lr (now {self._spec.optimizer.lr:g}), lengthen schedule.warmup, {more}or use precision=bf16; "
            "the last checkpoint of the run is from before or during this"
        )
