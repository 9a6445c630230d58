"""The training loop. It knows batches, losses and steps, and nothing of how an engine spreads them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from orchestrator.data.batch import IGNORED, MicroBatch, StepBatch
from orchestrator.engine.protocol import Engine
from orchestrator.errors import OrchestratorError
from orchestrator.spec import RunSpec
from orchestrator.train.display import Display
from orchestrator.train.health import Watch, ran_out
from orchestrator.train.memory import Memory, measure
from orchestrator.train.metrics import Metrics
from orchestrator.train.schedule import learning_rate
from orchestrator.train.shortage import COMPUTING, UPDATE, Before
from orchestrator.train.spikes import Spike, Spikes
from orchestrator.train.stop import StopRequest
from orchestrator.train.watch import EVALUATE, SAVE
from orchestrator.train.world import World

EvalBatches = Callable[[], Iterable[MicroBatch]]
"""This rank's micro-batches of the held-out samples; as many on every rank."""


@dataclass(frozen=True, slots=True)
class Ending:
    """How a loop ended: the last finished step, its epoch, and whether a signal stopped it before the last step, or a `spike`
    of the loss, which is not saved."""

    step: int
    epoch: int
    stopped: bool
    spike: Spike | None = None


def _sum_over_ranks(values: list[torch.Tensor | float], world: World) -> list[float]:
    """Each value summed over all ranks, in float64, in one message."""
    packed = torch.stack([torch.as_tensor(value, dtype=torch.float64, device=world.device) for value in values])
    dist.all_reduce(packed)
    summed: list[float] = packed.tolist()
    return summed


def evaluate(engine: Engine, batches: EvalBatches, world: World) -> float:
    """Mean loss per labelled token over the held-out samples of all ranks; nan where they hold no labelled token.

    Ranks that see the same samples (tensor parallelism) count alike in both sums, so the mean is the same.
    """
    total: torch.Tensor | float = 0.0
    labelled = 0
    for batch in batches():
        count = int((batch.labels[:, 1:] != IGNORED).sum())  # position 0 has nothing before it to be learned from
        total = total + engine.forward_backward(batch, max(count, 1), last=True, learn=False).double()
        labelled += count
    loss, tokens = _sum_over_ranks([total, float(labelled)], world)
    return loss / tokens if tokens else math.nan


class Loop:
    """Optimizer steps from `StepBatch`es, with their metrics, evaluations and checkpoints.

    `at(step, phase)` is called wherever the loop moves on, for whoever watches that it does.
    """

    def __init__(
        self,
        engine: Engine,
        spec: RunSpec,
        world: World,
        total: int,
        metrics: Metrics | None,
        display: Display,
        *,
        spikes: Spikes | None = None,
        eval_batches: EvalBatches | None = None,
        on_memory: Callable[[int, list[Memory]], None] | None = None,
        on_memory_end: Callable[[int, str, BaseException, Before | None], OrchestratorError] | None = None,
        at: Callable[[int, str], None] = lambda step, phase: None,
    ) -> None:
        self._engine, self._spec, self._world, self._total = engine, spec, world, total
        self._metrics, self._display = metrics, display
        self._eval_batches, self._on_memory, self._at = eval_batches, on_memory, at
        self._copies = spec.strategy.tp
        self._watch, self._on_memory_end = Watch(spec), on_memory_end
        self._spikes = Spikes(spec.health, {}) if spikes is None else spikes

    def run(
        self,
        steps: Iterator[StepBatch],
        stop: StopRequest,
        save: Callable[[int, int], None],
        after_first: Callable[[], None],
    ) -> Ending | None:
        """Take every step of `steps`, or those up to a spike of the loss; None where there was none.

        `save(step, epoch)` is called every `checkpoint.every` steps and at the end, `after_first` once after the first that
        updated something.

        Raises:
            Diverged: a step was not finite, or too many in a row (`spec.health`).
            OrchestratorError: from `on_memory_end`, where this rank could not allocate.
        """
        ending: Ending | None = None
        saved, updated = 0, False
        clock = time.perf_counter()
        for batch in steps:
            waited = time.perf_counter() - clock
            number = batch.step + 1
            line, asked = self._step(batch, number, stop)
            line["step_seconds"] = seconds = time.perf_counter() - clock
            line["data_wait_seconds"] = waited
            line["tokens_per_second"] = batch.tokens / seconds
            line["labelled_tokens_per_second"] = batch.labelled / seconds
            if line["finite"] and not updated:
                updated = True
                after_first()
            ending = Ending(number, batch.epoch, asked and number < self._total)
            self._note(line, number)
            note = self._watch.step(number, bool(line["finite"]))
            if note is not None:
                self._display.note(note)
            self._watch.refuse(number, line["loss"])
            spike = self._spikes.judge(number, line["loss"]) if line["finite"] else None
            if spike is not None:
                return replace(ending, stopped=False, spike=spike)
            every = self._spec.checkpoint.every
            if every and number % every == 0:
                self._at(number, SAVE)
                save(number, batch.epoch)
                saved = number
            if ending.stopped:
                break
            self._at(number, "waiting for the next samples")
            clock = time.perf_counter()
        if ending is not None:
            self._at(ending.step, SAVE)
        if ending is not None and saved != ending.step:
            save(ending.step, ending.epoch)
        return ending

    def _step(self, batch: StepBatch, number: int, stop: StopRequest) -> tuple[dict[str, Any], bool]:
        """(the metrics of optimizer step `number`, counted from 1; whether any rank was asked to stop)."""
        rate = learning_rate(number, self._total, self._spec.schedule, self._spec.optimizer.lr)
        total: torch.Tensor | float = 0.0
        last, phase = len(batch.micro_batches) - 1, COMPUTING
        before = self._whole(number - 1, batch.epoch)
        try:
            for index, micro in enumerate(batch.micro_batches):
                self._at(number, f"forward and backward {index + 1} of {last + 1}")
                total = total + self._engine.forward_backward(micro, batch.labelled, last=index == last).double()
            phase, before = UPDATE, None
            self._at(number, "the optimizer's step")
            result = self._engine.step(rate)
        except (RuntimeError, MemoryError) as error:
            self._look(number, phase, error, before)
            raise
        self._at(number, "the sum of the losses")
        loss_sum, asked = _sum_over_ranks([total, float(bool(stop))], self._world)
        loss = loss_sum / (batch.labelled * self._copies)
        finite = result.finite and math.isfinite(loss)
        return {
            "step": number, "epoch": batch.epoch, "loss": loss, "lr": rate, "grad_norm": result.grad_norm,
            "tokens": batch.tokens, "labelled_tokens": batch.labelled, "padded_tokens": batch.positions, "finite": finite,
        }, asked > 0  # fmt: skip

    def _whole(self, step: int, epoch: int) -> Before | None:
        """Where the state stands after `step`; None on one of several ranks, which cannot save it by itself."""
        return Before.now(step, epoch, self._world.device) if self._world.size == 1 else None

    def _look(self, number: int, phase: str, error: BaseException, before: Before | None) -> None:
        """Return unless `error` says that memory has ended.

        Raises:
            OrchestratorError: it has; what `on_memory_end` says of it.
        """
        if self._on_memory_end is not None and ran_out(error):
            raise self._on_memory_end(number, phase, error, before) from error

    def _evaluate(self, line: dict[str, Any], step: int) -> None:
        """Add the loss over the held-out samples to the line of `step`, which is kept also where there is none."""
        assert self._eval_batches is not None, "it is asked for where samples are held out"
        self._at(step, EVALUATE)
        try:
            line["eval_loss"] = evaluate(self._engine, self._eval_batches, self._world)
        except (RuntimeError, MemoryError) as error:
            if self._metrics is not None:
                self._metrics.write(line)
            self._look(step, EVALUATE, error, self._whole(step, line["epoch"]))
            raise

    def _note(self, line: dict[str, Any], step: int) -> None:
        """Add evaluation and memory where they are due, write the line, and show it."""
        spec = self._spec
        if self._eval_batches is not None and spec.eval.every and (step % spec.eval.every == 0 or step == self._total):
            self._evaluate(line, step)
        due = step % max(1, spec.logging.every) == 0 or step in (1, self._total)
        ranks: list[Memory] = []
        if due:
            ranks = self._world.gather(measure(self._world.rank, self._world.device))
            line["memory"] = [memory.to_json() for memory in ranks]
            if self._on_memory is not None:
                self._on_memory(step, ranks)
        if self._metrics is not None:
            self._metrics.write(line)
        self._display.step(line, due or "eval_loss" in line)
        if due:
            self._display.memory(ranks)
