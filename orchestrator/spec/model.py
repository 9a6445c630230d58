"""The shape of a causal language model, and the table of its parameters, from dimensions alone."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

KNOWN_FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma")
"""The `model_type`s whose parameter names are written down here; each is tested against transformers' own module."""

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linear layers of a block, as LoRA targets name them; "all-linear" means all of these."""

PLAIN_HEADS = (*KNOWN_FAMILIES, "phi3", "olmo", "olmo2", "olmo3", "smollm3", "starcoder2", "stablelm", "ministral", "seed_oss")
"""The `model_type`s whose forward gives the product with the head back as it is, so that the loss can be made inside the head
(modeling_<family>.py); others may cap or scale their logits."""

HEAD, EMBEDDING = "lm_head", "embed_tokens"

MAGNITUDE = "lora_magnitude_vector"
"""The module of PEFT that holds the lengths of a weight's rows, which DoRA trains (peft/tuners/lora/dora.py)."""

ROOT = -1
"""`Parameter.block` of what lies outside every transformer block (embeddings, final norm, head)."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Dimensions under the names that a Hugging Face `config.json` uses."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    tie_word_embeddings: bool
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    attention_bias: bool = False

    @property
    def known(self) -> bool:
        """Whether `parameters` can be told without building the module."""
        return self.model_type in KNOWN_FAMILIES

    @property
    def qkv_bias(self) -> bool:
        """Qwen2 always biases q, k and v (modeling_qwen2.py); Llama, Mistral, Qwen3 and Gemma as `attention_bias` says."""
        return self.model_type == "qwen2" or self.attention_bias

    @property
    def output_bias(self) -> bool:
        """Whether o_proj has a bias: never in Qwen2, else as `attention_bias` says."""
        return self.attention_bias and self.model_type != "qwen2"


_BLOCK = re.compile(r"\.(?:layers|h|blocks|block)\.(\d+)\.")


def block_of(name: str) -> int:
    """Index of the transformer block that the parameter `name` lies in, else ROOT."""
    match = _BLOCK.search(f".{name}")
    return int(match.group(1)) if match else ROOT


@dataclass(frozen=True, slots=True)
class Parameter:
    """One tensor of the model as `named_parameters()` lists it: global `shape`, and the `block` (layer index) it lies in.

    `quant` is the format that it rests in (see `spec.quant`), "" as it is; `shape` is that of its values all the same.
    """

    name: str
    shape: tuple[int, ...]
    block: int
    trainable: bool = True
    adapter: bool = False
    quant: str = ""

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def _block(shape: ModelShape, layer: int) -> Iterator[Parameter]:
    hidden, inner = shape.hidden_size, shape.intermediate_size
    query, kv = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
    prefix = f"model.layers.{layer}"
    for name, rows, columns, bias in (
        ("self_attn.q_proj", query, hidden, shape.qkv_bias),
        ("self_attn.k_proj", kv, hidden, shape.qkv_bias),
        ("self_attn.v_proj", kv, hidden, shape.qkv_bias),
        ("self_attn.o_proj", hidden, query, shape.output_bias),
    ):
        yield Parameter(f"{prefix}.{name}.weight", (rows, columns), layer)
        if bias:
            yield Parameter(f"{prefix}.{name}.bias", (rows,), layer)
    if shape.model_type == "qwen3":
        for name in ("q_norm", "k_norm"):
            yield Parameter(f"{prefix}.self_attn.{name}.weight", (shape.head_dim,), layer)
    yield Parameter(f"{prefix}.mlp.gate_proj.weight", (inner, hidden), layer)
    yield Parameter(f"{prefix}.mlp.up_proj.weight", (inner, hidden), layer)
    yield Parameter(f"{prefix}.mlp.down_proj.weight", (hidden, inner), layer)
    for name in ("input_layernorm", "post_attention_layernorm"):
        yield Parameter(f"{prefix}.{name}.weight", (hidden,), layer)


def parameters(shape: ModelShape) -> tuple[Parameter, ...]:
    """Every parameter of the base model in `named_parameters()` order; a tied head is not listed twice.

    Raises:
        KeyError: the family is not one of `KNOWN_FAMILIES`.
    """
    if not shape.known:
        raise KeyError(f"{shape.model_type} is not one of {', '.join(KNOWN_FAMILIES)}")
    table = [Parameter("model.embed_tokens.weight", (shape.vocab_size, shape.hidden_size), ROOT)]
    for layer in range(shape.num_hidden_layers):
        table.extend(_block(shape, layer))
    table.append(Parameter("model.norm.weight", (shape.hidden_size,), ROOT))
    if not shape.tie_word_embeddings:
        table.append(Parameter("lm_head.weight", (shape.vocab_size, shape.hidden_size), ROOT))
    return tuple(table)


def owner(name: str) -> str:
    """The last name of the module that holds the parameter called `name`: "q_proj" of "….self_attn.q_proj.weight"."""
    return name.rpartition(".")[0].rpartition(".")[2]


def norms_of(shape: ModelShape) -> tuple[str, ...]:
    """The last names of the norms of a known family."""
    inner = ("q_norm", "k_norm") if shape.model_type == "qwen3" else ()
    return ("input_layernorm", "post_attention_layernorm", *inner, "norm")


def only(table: tuple[Parameter, ...], modules: tuple[str, ...]) -> tuple[Parameter, ...]:
    """The table with the parameters of `modules` trained and all others frozen."""
    return tuple(replace(p, trainable=owner(p.name) in modules) for p in table)


def with_lora(
    table: tuple[Parameter, ...], rank: int, targets: tuple[str, ...], modules: tuple[str, ...] = (), dora: bool = False
) -> tuple[Parameter, ...]:
    """The table after PEFT's injection: the base frozen but for `modules`, and A (rank × in) and B (out × rank) beside each
    target, with `dora` also the lengths of its rows (out).

    Names are those of the wrapped module (peft/tuners/lora/layer.py).
    """
    wrapped: list[Parameter] = []
    for parameter in only(table, modules):
        module, _, leaf = parameter.name.rpartition(".")
        if module.rpartition(".")[2] not in targets:
            wrapped.append(replace(parameter, name=f"base_model.model.{parameter.name}"))
            continue
        prefix = f"base_model.model.{module}"
        wrapped.append(replace(parameter, name=f"{prefix}.base_layer.{leaf}", trainable=False))
        if leaf == "weight":
            rows, columns = parameter.shape
            for name, shape in (("lora_A", (rank, columns)), ("lora_B", (rows, rank))):
                wrapped.append(Parameter(f"{prefix}.{name}.default.weight", shape, parameter.block, adapter=True))
            if dora:
                wrapped.append(Parameter(f"{prefix}.{MAGNITUDE}.default.weight", (rows,), parameter.block, adapter=True))
    return tuple(wrapped)


def expand_targets(targets: tuple[str, ...]) -> tuple[str, ...]:
    """LoRA target names with "all-linear" replaced by every linear layer of a block."""
    return LINEARS if targets == ("all-linear",) else targets
