"""Playing a spec on fake tensors in this process."""

from __future__ import annotations

import contextlib
import tempfile
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from orchestrator import model as models
from orchestrator.engine import deepspeed_alone
from orchestrator.engine.protocol import Engine
from orchestrator.planner import card, fake
from orchestrator.planner.blank import BlankWeights
from orchestrator.planner.buckets import Marks
from orchestrator.planner.performance import Performance
from orchestrator.planner.programme import FULL, Programme
from orchestrator.planner.trace import Trace
from orchestrator.planner.tracer import Tracer
from orchestrator.spec import Engine as Kind
from orchestrator.spec import RunSpec, Shard


class FakePerformance(Performance):
    """A performance on fake tensors."""

    @property
    def zero(self) -> bool:
        return self.spec.strategy.engine is Kind.DEEPSPEED

    def make(self) -> Engine:
        if self.zero and self.device.type == card.DEVICE:
            deepspeed_alone.use_device(card.DEVICE)
        if self.spec.strategy.nvme is not None:
            deepspeed_alone.without_disk()
        with unset_fake_temporarily():  # a device mesh looks into its tensor of ranks
            engine = super().make()
        if self.zero:
            deepspeed_alone.agree_with_peers()
        return engine

    def build(self, engine: Engine) -> nn.Module:
        if self.zero and self.spec.strategy.shard is Shard.PARAMETERS and not self.spec.tuning.form:
            return super().build(engine)  # zero.Init shards each parameter as it is made: it must be fake from the start
        with unset_fake_temporarily():
            module = models.build(self.spec, engine.building())
        fake.pretend(module, self.device)
        return module


def device_for(spec: RunSpec) -> tuple[torch.device, Tracer]:
    """Where the spec's cluster computes, and a tracer that tells its memory from the host's."""
    target = spec.cluster.card
    if target.name == "cpu":
        return torch.device("cpu"), Tracer({"cpu": "gpu"})
    device = card.install()
    card.forget_streams()
    card.choose_attention(spec.precision.compute, target.bf16)
    return device, Tracer({card.DEVICE: "gpu", "cpu": "cpu"}, card.current_stream_number)


def without_files(spec: RunSpec) -> RunSpec:
    """The spec with its model made from the shape, where that says all, so that no file of the model is looked for."""
    shape = spec.model.shape
    return replace(spec, model=replace(spec.model, path=None)) if shape is not None and shape.known else spec


def swapping_to(spec: RunSpec, folder: str) -> RunSpec:
    """The spec with its swap in `folder`, where it has one."""
    nvme = spec.strategy.nvme
    if nvme is None:
        return spec
    return replace(spec, strategy=replace(spec.strategy, nvme=replace(nvme, path=folder)))


def play(spec: RunSpec, rank: int, programme: Programme = FULL, *, marked: bool = False) -> Trace:
    """The trace of rank `rank` of `spec` through `programme`; `marked`: with what is in ZeRO-3's bucket (`buckets`)."""
    if spec.strategy.engine is not Kind.PLAIN and not dist.is_initialized():
        fake.join(rank, spec.strategy.ranks)
    device, tracer = device_for(spec)
    listening = deepspeed_alone.listening_to_buckets(Marks(tracer)) if marked else contextlib.nullcontext()
    with listening, tempfile.TemporaryDirectory() as folder, fake.fake_tensors(packed=spec.data.packing != "none"):
        spec = swapping_to(spec, folder)
        weights = models.open_weights if spec.model.path is None else BlankWeights
        FakePerformance(without_files(replace(spec, compile="none")), device, tracer, weights, programme).run(rank)
    return tracer.trace().settled()
