"""The parameter table told from dimensions equals that of the module that transformers and PEFT really build."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest
from contract.cases import SHAPE, Case, run_spec

from orchestrator import model as models
from orchestrator.engine.materialize import without_storage
from orchestrator.errors import ModelError
from orchestrator.layout import parameter_table
from orchestrator.spec import KNOWN_FAMILIES, RunSpec, Tuning, expand_targets


def spec_of(family: str, tied: bool, tuning: str) -> RunSpec:
    spec = run_spec(Case("zero1", tuning, "fp32", 1), 2)
    shape = replace(SHAPE, model_type=family, tie_word_embeddings=tied, attention_bias=family == "llama")
    return replace(spec, model=replace(spec.model, shape=shape))


@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", KNOWN_FAMILIES)
def test_told_equals_built(family: str, tied: bool, tuning: str) -> None:
    spec = spec_of(family, tied, tuning)
    built = models.table_of(models.build(spec, without_storage()))
    told = parameter_table(spec)
    assert told is not None
    assert sorted(told, key=lambda p: p.name) == sorted(built, key=lambda p: p.name)


def test_full_tables_keep_the_modules_order() -> None:
    """ZeRO's flat buffer follows it, and so do the accumulated gradients of stage 2."""
    spec = spec_of("qwen3", tied=False, tuning="full")
    told = parameter_table(spec)
    assert told is not None
    assert [p.name for p in told] == [p.name for p in models.table_of(models.build(spec, nullcontext()))]


def test_all_linear_adapts_every_linear_layer_of_a_block() -> None:
    spec = spec_of("llama", tied=False, tuning="lora")
    spec = replace(spec, tuning=Tuning("lora", rank=2, alpha=4, targets=expand_targets(("all-linear",))))
    table = models.table_of(models.build(spec, without_storage()))
    assert sum(p.adapter for p in table) == 2 * 7 * SHAPE.num_hidden_layers
    assert all(p.trainable == p.adapter for p in table)


def test_a_target_that_is_not_there_lists_those_that_are() -> None:
    spec = spec_of("llama", tied=False, tuning="lora")
    spec = replace(spec, tuning=replace(spec.tuning, targets=("c_attn",)))
    with pytest.raises(ModelError, match=r"(?s)tuning.targets: c_attn.*linear: .*down_proj.*q_proj"):
        models.build(spec, without_storage())


def test_recompute_is_not_reentrant() -> None:
    """Reentrant checkpointing leaves lora_B at zero."""
    spec = replace(spec_of("llama", tied=False, tuning="lora"), recompute="full")
    module = models.build(spec, without_storage())
    layer = next(m for m in module.modules() if type(m).__name__ == "LlamaDecoderLayer")
    assert layer.gradient_checkpointing
    assert layer._gradient_checkpointing_func.keywords["use_reentrant"] is False
