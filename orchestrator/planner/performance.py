"""One short performance of a run: everything that decides its memory, done a few times by the real engine code.

The rehearsal performs on fake tensors, the dry run on one real card, the truth test on real ranks: the same lines here.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from orchestrator import engine as engines
from orchestrator import model as models
from orchestrator.data.batch import MicroBatch
from orchestrator.engine.census import watched
from orchestrator.engine.protocol import Engine, LossSum, Weights
from orchestrator.layout import LOADED, STEPPED, check_census, lay_out
from orchestrator.model import formats
from orchestrator.planner import earlier
from orchestrator.planner.programme import CHUNKED, EARLIER, FULL, KEPT, OWN, Programme
from orchestrator.planner.tracer import Tracer
from orchestrator.spec import Export, Parameter, RunSpec

HARMLESS = 64
"""How often each label is counted: the gradients of a model that has learned nothing, times the first loss scale (2¹⁶), are
more than fp16 holds, and a step that updates nothing makes no states."""

OpenWeights = Callable[[RunSpec, tuple[Parameter, ...]], Weights]


LOSSES: dict[str, Callable[[], LossSum]] = {
    OWN: lambda: models.loss_sum,
    EARLIER: lambda: earlier.loss_sum,
    KEPT: earlier.Keeping,
    CHUNKED: lambda: earlier.chunked,
}


@contextmanager
def _garbage_kept() -> Iterator[None]:
    """Collect garbage at the end and, unless a library asks, not before: what dies in cycles dies at the same place in every
    performance. What is there already is not looked at again."""
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.collect()


class Performance:
    """`run()` performs `spec` on `device` under `tracer`, as the rank that the process group says, with samples and loss as
    `programme` has them."""

    def __init__(
        self,
        spec: RunSpec,
        device: torch.device,
        tracer: Tracer,
        open_weights: OpenWeights = models.open_weights,
        programme: Programme = FULL,
    ) -> None:
        self.spec, self.device, self.tracer, self.open_weights = spec, device, tracer, open_weights
        self.programme, self._loss = programme, LOSSES[programme.loss]()

    def run(self, rank: int = 0) -> None:
        """Load, the optimizer steps of the programme, save.

        Raises:
            LayoutDrift: what is live is not what the Layout says.
        """
        import peft  # noqa: F401  (its import makes tensors that live as long as the process; they are not the run's)

        tracer, spec = self.tracer, self.spec
        formats.prepare(spec.tuning.form)
        engines.prepare(spec.optimizer)  # again in make, where the tensors of its tables would be counted as the run's
        with tracer:
            tracer.enter_phase("load")
            with _garbage_kept():
                engine = self.make()
                module = self.build(engine)
                table = models.table_of(module)
                engine.adopt(module, self.weights(table))
            layout = lay_out(spec, table, rank)
            self._census(engine)
            check_census(layout, engine.census(), LOADED)
            for step, lengths in enumerate(self.programme.steps(spec)):
                self._step(engine, lengths)
                if step == 0:
                    self._census(engine)
                    check_census(layout, engine.census(), STEPPED)
            tracer.enter_phase("save")
            self._save(engine)
        engine.close()

    def make(self) -> Engine:
        """The engine of the spec."""
        return engines.make(self.spec, self.device, self._loss_sum)

    def build(self, engine: Engine) -> nn.Module:
        """The module without values, made in the engine's context."""
        return models.build(self.spec, engine.building())

    def weights(self, table: tuple[Parameter, ...]) -> Weights:
        return self.open_weights(self.spec, table)

    def _census(self, engine: Engine) -> None:
        with watched(self.tracer.name):
            engine.census()

    def _loss_sum(self, model: nn.Module, batch: MicroBatch) -> torch.Tensor:
        """The project's loss, which marks where forward ends and backward begins."""
        loss = self._loss(model, batch)
        self.tracer.enter_phase("backward")
        return loss

    def _step(self, engine: Engine, lengths: tuple[int, ...]) -> None:
        size = self.spec.batch.micro
        labelled = HARMLESS * self.spec.batch.global_size * max(lengths)
        for index, length in enumerate(lengths):
            self.tracer.enter_phase("forward")
            ids = torch.zeros(size, length, dtype=torch.int64)
            batch = MicroBatch(ids, torch.zeros_like(ids), self._positions(size, length))
            engine.forward_backward(batch, labelled, last=index == len(lengths) - 1)
            del ids, batch
        self.tracer.enter_phase("step")
        engine.step(self.spec.optimizer.lr)

    def _positions(self, size: int, length: int) -> torch.Tensor | None:
        """Rows of two documents where samples are packed: how many there are changes no tensor's size."""
        if self.spec.data.packing == "none":
            return None
        return (torch.arange(length) % (length // 2 + 1)).repeat(size, 1)

    def _save(self, engine: Engine) -> None:
        """What a checkpoint and, where asked for, an export move to the host, each piece by itself; that the writer gathers
        pieces before it writes them is added by `rehearsal.with_chunk`."""
        pieces, _ = engine.save()
        held = []
        for piece in pieces:
            if piece.owned and self.spec.checkpoint.background:
                held.append(piece.copied())
            elif piece.owned:
                piece.data.detach().to("cpu").contiguous()
        del held
        if self.spec.export != Export("none", False):
            self.tracer.enter_phase("save")
            for _ in engine.full_tensors():
                pass
