"""The peak from the layout against the engine's own code on fake tensors: four blocks of Llama 3 8B on four A10s."""

from __future__ import annotations

from dataclasses import replace

import pytest

from orchestrator.config import compose
from orchestrator.planner.predict import by_layout
from orchestrator.planner.rehearsal import rehearse

FIXED = ["model=llama3_8b", "cluster=4xa10", "data.seq_len=2048", "batch.micro=1"]

SWEPT = (
    "zero=stage0", "zero=stage1", "zero=stage2", "zero=stage3", "zero=stage3 offload=cpu", "zero=stage2 loss.kind=plain",
    "zero=stage3 tuning=lora", "zero=stage2 recompute=selective", "zero=stage3 recompute=selective",
    "zero=stage3 tuning=lora recompute=selective", "fsdp=full_shard", "fsdp=full_shard tuning=lora",
    "fsdp=full_shard tuning=qlora", "fsdp=full_shard loss.kind=plain", "fsdp=full_shard recompute=full",
    "fsdp=shard_grad_op tuning=lora", "fsdp=hybrid_shard", "tensor=2", "tensor=2 tuning=lora",
    "zero=stage1 batch.global_size=16", "zero=stage2 recompute=full batch.global_size=16",
    "zero=stage2 tuning=lora batch.global_size=8", "fsdp=full_shard tensor=2 batch.global_size=16",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("words", SWEPT)
def test_the_layouts_peak_is_the_rehearsals(words):
    stated = [] if "global_size" in words else ["batch.global_size=4"]
    spec = compose([*FIXED, *stated, *words.split()], strict=False)
    shape = spec.model.shape
    assert shape is not None
    spec = replace(spec, model=replace(spec.model, shape=replace(shape, num_hidden_layers=4)))
    plan = by_layout(spec)
    workspace = sum(
        entry.bytes for entry in plan.ledger.entries if entry.line == "workspace" and entry.phase == plan.peak.phase
    )
    assert plan.memory.allocated - workspace == pytest.approx(rehearse(spec).peak_bytes, rel=0.02)
