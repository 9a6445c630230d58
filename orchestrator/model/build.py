"""The module to train: the architecture, recompute, and adapters; without weights."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from orchestrator.errors import Fault, ModelError
from orchestrator.model.compiled import compile_blocks
from orchestrator.model.dora import magnitudes_without_values
from orchestrator.model.head import use_head
from orchestrator.model.location import resolve
from orchestrator.model.quantised import QuantisedLinear, quantise_linears
from orchestrator.model.recompute import use_recompute
from orchestrator.spec import ROOT, Parameter, RunSpec, block_of, owner, to_json
from orchestrator.units import TORCH_NAMES

ATTENTION = {"sdpa": "sdpa", "eager": "eager", "flash": "flash_attention_2"}
"""The word of transformers for each choice of the group `attention`."""


def in_block(name: str) -> bool:
    """Whether the module called `name` lies in a transformer block."""
    return block_of(f"{name}.") != ROOT


def architecture(spec: RunSpec) -> Any:
    """The transformers config of the spec's model: read from its folder, or made from its shape for random weights.

    Raises:
        ModelError: the folder's config is not of a causal language model that transformers knows.
    """
    from transformers import AutoConfig

    if spec.model.path is None:
        assert spec.model.shape is not None, "a model without a path has a shape (checked in compose)"
        fields = {name: value for name, value in to_json(spec.model.shape).items() if name != "model_type"}
        fields["rope_parameters"] = {"rope_type": "default", "rope_theta": fields.pop("rope_theta")}
        return AutoConfig.for_model(spec.model.shape.model_type, **fields)
    try:
        config = AutoConfig.from_pretrained(resolve(spec.model), trust_remote_code=spec.model.trust_remote_code)
        if spec.tuning.untie:
            config.tie_word_embeddings = False
        return config
    except (ValueError, OSError) as error:
        raise ModelError(
            Fault("model.path", f"{spec.model.path}: {str(error).splitlines()[0]}", "give a causal model")
        ) from error


def build(spec: RunSpec, building: AbstractContextManager[object]) -> nn.Module:
    """The module, made inside `building` (the engine's context), adapters included; its parameters hold no values yet.

    Raises:
        ModelError: transformers has no causal language model of this kind, or a LoRA target is not in it.
    """
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    config = architecture(spec)
    with building, no_init_weights():
        model = AutoModelForCausalLM.from_config(
            config,
            attn_implementation=ATTENTION[spec.attention],
            dtype=getattr(torch, TORCH_NAMES[spec.precision.compute]),
            trust_remote_code=spec.model.trust_remote_code,
        )
    model.tie_weights()
    use_head(model, spec.loss)
    model.config.use_cache = False
    use_recompute(model, spec)
    if spec.tuning.form:
        quantise_linears(model, in_block, spec)
    if spec.tuning.adapters:
        model = _with_adapters(model, spec)
        _train_whole(model, spec.tuning.modules)
    if spec.tuning.kind == "head":
        _train_head_alone(model)
    compile_blocks(model, spec)
    return model


def _train_whole(model: nn.Module, modules: tuple[str, ...]) -> None:
    """Let the parameters of `modules` learn beside the adapters.

    They are not wrapped by PEFT's ModulesToSaveWrapper, which would keep a frozen copy of each; the export is the same.

    Raises:
        ModelError: the model has no such module.
    """
    found = {owner(name) for name, _ in model.named_parameters()}
    missing = [module for module in modules if module not in found]
    if missing:
        problem = f"{type(model).__name__} has no module {', '.join(missing)} with weights of its own"
        raise ModelError(Fault("tuning.modules", problem, f"modules with weights: {', '.join(sorted(found))}"))
    for name, parameter in model.named_parameters():
        if owner(name) in modules:
            parameter.requires_grad_(True)


def _train_head_alone(model: Any) -> None:
    """Freeze everything but the output head.

    Raises:
        ModelError: it is the embedding.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head.weight is embedding.weight:
        problem = f"the head of {type(model).__name__} is its embedding: training the one trains the other"
        raise ModelError(Fault("tuning", problem, "add tuning.untie=true to train a copy of it, or use tuning=lora"))
    model.requires_grad_(False)
    head.requires_grad_(True)


def _with_adapters(model: Any, spec: RunSpec) -> Any:
    """The model wrapped by PEFT, adapters in the compute dtype; they are made outside the engine's context."""
    from peft import LoraConfig, get_peft_model

    tuning = spec.tuning
    lora = LoraConfig(
        r=tuning.rank,
        lora_alpha=tuning.alpha,
        lora_dropout=tuning.dropout,
        target_modules=list(tuning.targets),
        task_type="CAUSAL_LM",
        base_model_name_or_path=spec.model.path,
        use_rslora=tuning.rslora,
        use_dora=tuning.dora,
    )
    if spec.recompute != "none":
        model.enable_input_require_grads()
    try:
        with magnitudes_without_values():
            return get_peft_model(model, lora, autocast_adapter_dtype=False)
    except ValueError as error:
        modules = sorted({name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, nn.Linear)})
        raise ModelError(
            Fault(
                "tuning.targets", f"{', '.join(tuning.targets)}: {str(error).splitlines()[0]}", f"linear: {', '.join(modules)}"
            )
        ) from error


def table_of(model: nn.Module) -> tuple[Parameter, ...]:
    """The parameters of a built module, with global shapes whatever the engine did to them; a quantised weight has that of its
    values."""
    table = []
    packed = {f"{name}.weight": layer for name, layer in model.named_modules() if isinstance(layer, QuantisedLinear)}
    for name, parameter in model.named_parameters():
        if name in packed:
            table.append(replace(packed[name].values, name=name, block=block_of(name)))
            continue
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
        table.append(Parameter(name, shape, block_of(name), parameter.requires_grad, "lora_" in name))
    return tuple(table)
