"""The closed form of activations against the tensors that autograd really saves, on a real small model."""

from __future__ import annotations

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from orchestrator.config import compose
from orchestrator.data.batch import MicroBatch
from orchestrator.engine.materialize import cast, materialize, without_storage
from orchestrator.model import build, loss_sum
from orchestrator.planner.activations import activations
from orchestrator.spec import RunSpec

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")

SIZE = [
    "model=tiny", "model.hidden_size=256", "model.head_dim=32", "model.num_attention_heads=8", "model.num_key_value_heads=2",
    "model.intermediate_size=704", "model.num_hidden_layers=4", "data.seq_len=512", "batch.micro=2",
]  # fmt: skip


def saved_bytes(spec: RunSpec) -> tuple[int, int]:
    """(bytes that autograd keeps besides parameters and logit-sized tensors, bytes of those) after one forward."""
    model = build(spec, without_storage())
    dtype = torch.bfloat16 if spec.precision.compute == "bf16" else torch.float32
    cast(model, lambda parameter: dtype)
    materialize(model, torch.device("cpu"))
    model.train()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    resting = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    found: dict[int, tuple[int, bool]] = {}
    kept = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)  # alive, so that no storage is used twice
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in resting:
            found[storage.data_ptr()] = (storage.nbytes(), spec.model.shape.vocab_size in tensor.shape)
        return tensor

    ids = torch.randint(0, spec.model.shape.vocab_size, (spec.batch.micro, spec.data.seq_len))
    packed = torch.arange(ids.shape[1]).repeat(len(ids), 1) % 100 if spec.data.packing == "best_fit" else None
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss_sum(model, MicroBatch(ids, ids, packed))
    logits = sum(size for size, is_logits in found.values() if is_logits)
    return sum(size for size, _ in found.values()) - logits, logits


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["precision=bf16"],
        ["recompute=full"],
        ["tuning=lora"],
        ["tuning=lora", "precision=bf16", "tuning.targets=[q_proj,v_proj]"],
        ["precision=bf16", "model.model_type=qwen3"],
        ["precision=bf16", "model.model_type=gemma"],
        ["precision=bf16", "model.num_key_value_heads=8"],
        ["data.packing=best_fit"],
        ["data.packing=best_fit", "recompute=full"],
        ["data.packing=best_fit", "precision=bf16", "tuning=lora"],
        ["loss.kind=plain"],
        ["tuning=lora", "precision=bf16", "loss.kind=plain"],
    ],
    ids=" ".join,
)
def test_what_autograd_keeps_is_what_is_counted(overrides):
    spec = compose([*SIZE, *overrides])
    kept, logits = saved_bytes(spec)
    if spec.data.packing == "best_fit" and spec.recompute == "full":
        kept += spec.batch.micro * spec.data.seq_len**2  # the mask, as an argument of the checkpointed blocks
    counted = activations(spec, spec.model.shape)
    assert counted.saved == pytest.approx(kept, rel=0.025)
    whole = spec.batch.micro * spec.data.seq_len * spec.model.shape.vocab_size * 4
    assert logits == pytest.approx(whole if spec.loss.kind == "plain" else 0, rel=0.01)


def test_recompute_keeps_the_inputs_of_blocks_alone():
    spec = compose([*SIZE, "recompute=full"])
    inputs = 4 * 2 * 512 * 256 * 4
    assert activations(spec, spec.model.shape).blocks == inputs
