"""Engines behind one contract (`protocol.Engine`); the training loop knows none of them."""

from __future__ import annotations

import torch

from orchestrator.engine.optimizers import prepare
from orchestrator.engine.protocol import Engine, LossSum, Piece, StepResult, Weights
from orchestrator.spec import Engine as Kind
from orchestrator.spec import RunSpec

__all__ = ["Engine", "LossSum", "Piece", "StepResult", "Weights", "make", "prepare"]


def make(spec: RunSpec, device: torch.device, loss_sum: LossSum) -> Engine:
    """The engine of `spec.strategy` on `device`; its library is imported now and no other. A process group must exist
    for every engine but the plain one."""
    prepare(spec.optimizer)
    if spec.strategy.engine is Kind.DEEPSPEED:
        from orchestrator.engine.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(spec, device, loss_sum)
    if spec.strategy.engine is Kind.FSDP:
        from orchestrator.engine.fsdp import FsdpEngine

        return FsdpEngine(spec, device, loss_sum)
    from orchestrator.engine.plain import PlainEngine

    return PlainEngine(spec, device, loss_sum)
