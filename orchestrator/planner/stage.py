"""Playing a spec on fake tensors in this process."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from orchestrator import model as models
from orchestrator.engine.deepspeed_alone import agree_with_peers
from orchestrator.engine.protocol import Engine
from orchestrator.planner import fake
from orchestrator.planner.performance import Performance
from orchestrator.planner.trace import Trace
from orchestrator.planner.tracer import Tracer
from orchestrator.spec import Engine as Kind
from orchestrator.spec import RunSpec, Shard


class FakePerformance(Performance):
    """A performance on fake tensors."""

    def make(self) -> Engine:
        with unset_fake_temporarily():  # a device mesh looks into its tensor of ranks
            engine = super().make()
        if self.spec.strategy.engine is Kind.DEEPSPEED:
            agree_with_peers()
        return engine

    def build(self, engine: Engine) -> nn.Module:
        if self.spec.strategy.engine is Kind.DEEPSPEED and self.spec.strategy.shard is Shard.PARAMETERS:
            return super().build(engine)  # zero.Init shards each parameter as it is made: it must be fake from the start
        with unset_fake_temporarily():
            module = models.build(self.spec, engine.building())
        fake.pretend(module)
        return module


def play(spec: RunSpec, rank: int) -> Trace:
    """The trace of rank `rank` of `spec`."""
    if spec.strategy.engine is not Kind.PLAIN and not dist.is_initialized():
        fake.join(rank, spec.strategy.ranks)
    tracer = Tracer({"cpu": "gpu"})
    with fake.fake_tensors():
        FakePerformance(spec, torch.device("cpu"), tracer).run(rank)
    return tracer.trace()
