"""What the words of published rows mean: models, cards and adapted layers, each by a pattern that the first match decides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from orchestrator.spec import LINEARS, Card, ModelShape
from orchestrator.units import MIB


def _llama(hidden: int, inner: int, layers: int, heads: int, kv: int, vocabulary: int, kind: str = "llama") -> ModelShape:
    return ModelShape(kind, vocabulary, hidden, inner, layers, heads, kv, hidden // heads, 1 << 20, tie_word_embeddings=False)


def _tied(shape: ModelShape) -> ModelShape:
    return replace(shape, tie_word_embeddings=True)


def _qwen3(hidden: int, inner: int, layers: int, heads: int) -> ModelShape:
    return replace(_llama(hidden, inner, layers, heads, 8, 151936, "qwen3"), head_dim=128)


def _gemma(hidden: int, inner: int, layers: int, heads: int, kv: int) -> ModelShape:
    return ModelShape("gemma", 256000, hidden, inner, layers, heads, kv, 256, 1 << 20, tie_word_embeddings=True)


MODELS: tuple[tuple[str, ModelShape], ...] = (
    (r"codellama-7b", _llama(4096, 11008, 32, 32, 32, 32016)),
    (r"codellama-13b", _llama(5120, 13824, 40, 40, 40, 32016)),
    (r"codellama-34b", _llama(8192, 22016, 48, 64, 8, 32000)),
    (r"tinyllama(-1\.1b)?", _llama(2048, 5632, 22, 32, 4, 32000)),
    (r"open-?llama-3b", _llama(3200, 8640, 26, 32, 32, 32000)),
    (r"distill-qwen-1\.5b", _llama(1536, 8960, 28, 12, 2, 151936, "qwen2")),
    (r"distill-qwen-7b", _llama(3584, 18944, 28, 28, 4, 152064, "qwen2")),
    (r"distill-qwen-14b", _llama(5120, 13824, 48, 40, 8, 152064, "qwen2")),
    (r"distill-qwen-32b", _llama(5120, 27648, 64, 40, 8, 152064, "qwen2")),
    (r"llama-?2-70b", _llama(8192, 28672, 80, 64, 8, 32000)),
    (r"llama-?3[.-]2-1b", _tied(_llama(2048, 8192, 16, 32, 8, 128256))),
    (r"llama-?3[.-]2-3b", _tied(_llama(3072, 8192, 28, 24, 8, 128256))),
    (r"llama-?3([.-][012])?-8b|distill-llama-8b", _llama(4096, 14336, 32, 32, 8, 128256)),
    (r"llama-?3([.-][0-3])?-70b|distill-llama-70b", _llama(8192, 28672, 80, 64, 8, 128256)),
    (r"llama-?3([.-][01])?-405b", _llama(16384, 53248, 126, 128, 8, 128256)),
    (r"(llama(-?2)?|vicuna(-v1\.[35])?|alpaca)-7b", _llama(4096, 11008, 32, 32, 32, 32000)),
    (r"(llama(-?2)?|vicuna(-v1\.[35])?|alpaca)-13b", _llama(5120, 13824, 40, 40, 40, 32000)),
    (r"llama-3[03]b", _llama(6656, 17920, 60, 52, 52, 32000)),
    (r"llama-65b", _llama(8192, 22016, 80, 64, 64, 32000)),
    (r"yi-(1\.5-)?6b", _llama(4096, 11008, 32, 32, 4, 64000)),
    (r"yi-(1\.5-)?9b", _llama(4096, 11008, 48, 32, 4, 64000)),
    (r"yi-(1\.5-)?34b", _llama(7168, 20480, 60, 56, 8, 64000)),
    (r"zephyr-7b|mistral-7b", _llama(4096, 14336, 32, 32, 8, 32000, "mistral")),
    (r"mistral-nemo", replace(_llama(5120, 14336, 40, 32, 8, 131072, "mistral"), head_dim=128)),
    (r"solar-10\.7b", _llama(4096, 14336, 48, 32, 8, 32000)),
    (r"deepseek-(llm-)?7b", _llama(4096, 11008, 30, 32, 32, 102400)),
    (r"deepseek-coder-6\.7b", _llama(4096, 11008, 32, 32, 32, 32256)),
    (r"internlm2(\.5)?-7b", _llama(4096, 14336, 32, 32, 8, 92544)),
    (r"internlm-7b", _llama(4096, 11008, 32, 32, 32, 103168)),
    (r"baichuan-7b", _llama(4096, 11008, 32, 32, 32, 64000)),
    (r"baichuan-?2-7b", _llama(4096, 11008, 32, 32, 32, 125696)),
    (r"chatglm[23]-6b", replace(_llama(4096, 13696, 28, 32, 2, 65024), attention_bias=True)),
    (r"smollm2?-135m", _tied(_llama(576, 1536, 30, 9, 3, 49152))),
    (r"smollm2?-360m", _tied(_llama(960, 2560, 32, 15, 5, 49152))),
    (r"smollm2?-1\.7b", _tied(_llama(2048, 8192, 24, 32, 32, 49152))),
    (r"qwen-?1\.5-0\.5b", _tied(_llama(1024, 2816, 24, 16, 16, 151936, "qwen2"))),
    (r"qwen-?1\.5-1\.8b", _llama(2048, 5504, 24, 16, 16, 151936, "qwen2")),
    (r"qwen-?1\.5-4b", _llama(2560, 6912, 40, 20, 20, 151936, "qwen2")),
    (r"qwen-?1\.5-7b", _llama(4096, 11008, 32, 32, 32, 151936, "qwen2")),
    (r"qwen-?1\.5-14b", _llama(5120, 13696, 40, 40, 40, 152064, "qwen2")),
    (r"qwen-?1\.5-32b", _llama(5120, 27392, 64, 40, 8, 152064, "qwen2")),
    (r"qwen-?1\.5-72b", _llama(8192, 24576, 80, 64, 64, 152064, "qwen2")),
    (r"(^|-)qwen-1[-.]8b", _llama(2048, 5504, 24, 16, 16, 151936, "qwen2")),
    (r"(^|-)qwen-7b", _llama(4096, 11008, 32, 32, 32, 151936, "qwen2")),
    (r"(^|-)qwen-14b", _llama(5120, 13696, 40, 40, 40, 152064, "qwen2")),
    (r"(^|-)qwen-72b", _llama(8192, 24576, 80, 64, 64, 152064, "qwen2")),
    (r"qwen-?2(\.5)?-(coder-)?0\.5b", _tied(_llama(896, 4864, 24, 14, 2, 151936, "qwen2"))),
    (r"qwen-?2(\.5)?-((coder|math)-)?1\.5b", _tied(_llama(1536, 8960, 28, 12, 2, 151936, "qwen2"))),
    (r"qwen-?2\.5-(coder-)?3b", _tied(_llama(2048, 11008, 36, 16, 2, 151936, "qwen2"))),
    (r"qwen-?2(\.5)?-((coder|math)-)?7b", _llama(3584, 18944, 28, 28, 4, 152064, "qwen2")),
    (r"qwen-?2\.5-(coder-)?14b", _llama(5120, 13824, 48, 40, 8, 152064, "qwen2")),
    (r"qwen-?2\.5-(coder-)?32b", _llama(5120, 27648, 64, 40, 8, 152064, "qwen2")),
    (r"qwen-?2(\.5)?-((coder|math)-)?72b", _llama(8192, 29568, 80, 64, 8, 152064, "qwen2")),
    (r"qwen-?3-0\.6b", _tied(_qwen3(1024, 3072, 28, 16))),
    (r"qwen-?3-1\.7b", _tied(_qwen3(2048, 6144, 28, 16))),
    (r"qwen-?3-4b", _tied(_qwen3(2560, 9728, 36, 32))),
    (r"qwen-?3-8b", _qwen3(4096, 12288, 36, 32)),
    (r"qwen-?3-14b", _qwen3(5120, 17408, 40, 40)),
    (r"qwen-?3-32b", _qwen3(5120, 25600, 64, 64)),
    (r"h2048-l24-heads16-kv16-ffn4096-vocab32000", _llama(2048, 4096, 24, 16, 16, 32000)),
    (r"gemma-2b", _gemma(2048, 16384, 18, 8, 1)),
    (r"gemma-7b", _gemma(3072, 24576, 28, 16, 16)),
)
"""Dimensions from each model's config.json, by a pattern of its name, spaces, underscores and slashes as hyphens. The first
Qwen, Baichuan and ChatGLM have the shape of a family that is known here: their q, k and v, or gate and up, are one matrix."""

Config = Mapping[str, Any]


def _config(kind: str, **fields: Any) -> Config:
    return MappingProxyType({"model_type": kind, **fields})


def _neox(hidden: int, layers: int, heads: int, vocabulary: int = 50304) -> Config:
    return _config(
        "gpt_neox", hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers, num_attention_heads=heads,
        vocab_size=vocabulary, tie_word_embeddings=False,
    )  # fmt: skip


def _phi(hidden: int, layers: int) -> Config:
    return _config(
        "phi", hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers, num_attention_heads=32,
        vocab_size=51200, tie_word_embeddings=False,
    )  # fmt: skip


def _opt(hidden: int, layers: int, heads: int) -> Config:
    return _config(
        "opt", hidden_size=hidden, ffn_dim=4 * hidden, word_embed_proj_dim=hidden, num_hidden_layers=layers,
        num_attention_heads=heads, vocab_size=50272,
    )  # fmt: skip


def _bloom(hidden: int, layers: int, heads: int) -> Config:
    return _config("bloom", hidden_size=hidden, n_layer=layers, n_head=heads, vocab_size=250880)


def _gpt2(hidden: int, layers: int, heads: int) -> Config:
    return _config("gpt2", n_embd=hidden, n_layer=layers, n_head=heads, vocab_size=50257)


def _gemma2(hidden: int, inner: int, layers: int, heads: int, kv: int, width: int) -> Config:
    return _config(
        "gemma2", hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv, head_dim=width, vocab_size=256000,
    )  # fmt: skip


_FALCON = {"vocab_size": 65024, "bias": False, "alibi": False}

CONFIGS: tuple[tuple[str, Config], ...] = (
    (r"phi-1([-._]5)?\b", _phi(2048, 24)),
    (r"phi-2\b", _phi(2560, 32)),
    (r"phi-3(\.5)?-mini|phi-3(\.5)?-3\.8b", _config(
        "phi3", hidden_size=3072, intermediate_size=8192, num_hidden_layers=32, num_attention_heads=32, vocab_size=32064,
        pad_token_id=32000,
    )),
    (r"stablelm-base-alpha-3b", _neox(4096, 16, 32, 50688)),
    (r"stablelm-(3b|zephyr-3b)", _config(
        "stablelm", hidden_size=2560, intermediate_size=6912, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=32, vocab_size=50304,
    )),
    (r"falcon-7b", _config(
        "falcon", hidden_size=4544, num_hidden_layers=32, num_attention_heads=71, multi_query=True, parallel_attn=True,
        new_decoder_architecture=False, **_FALCON,
    )),
    (r"falcon-40b", _config(
        "falcon", hidden_size=8192, num_hidden_layers=60, num_attention_heads=128, num_kv_heads=8,
        new_decoder_architecture=True, **_FALCON,
    )),
    (r"pythia-160m", _neox(768, 12, 12)),
    (r"pythia-410m", _neox(1024, 24, 16)),
    (r"pythia-1b", _neox(2048, 16, 8)),
    (r"pythia-1\.4b", _neox(2048, 24, 16)),
    (r"pythia-2\.8b", _neox(2560, 32, 32)),
    (r"pythia-6\.9b", _neox(4096, 32, 32, 50432)),
    (r"pythia-12b", _neox(5120, 36, 40, 50688)),
    (r"gpt-neox-20b", _neox(6144, 44, 64, 50432)),
    (r"gpt-?j(-6b)?", _config("gptj", n_embd=4096, n_layer=28, n_head=16, vocab_size=50400, tie_word_embeddings=False)),
    (r"gpt-?2-?xl", _gpt2(1600, 48, 25)),
    (r"gpt-?2-?large", _gpt2(1280, 36, 20)),
    (r"gpt-?2-?medium", _gpt2(1024, 24, 16)),
    (r"gpt-?2\b", _gpt2(768, 12, 12)),
    (r"opt-125m", _opt(768, 12, 12)),
    (r"opt-1\.3b", _opt(2048, 24, 32)),
    (r"opt-2\.7b", _opt(2560, 32, 32)),
    (r"opt-6\.7b", _opt(4096, 32, 32)),
    (r"opt-13b", _opt(5120, 40, 40)),
    (r"opt-30b", _opt(7168, 48, 56)),
    (r"opt-66b", _opt(9216, 64, 72)),
    (r"bloomz?-560m", _bloom(1024, 24, 16)),
    (r"bloomz?-1b1", _bloom(1536, 24, 16)),
    (r"bloomz?-1b7", _bloom(2048, 24, 16)),
    (r"bloomz?-3b", _bloom(2560, 30, 32)),
    (r"bloomz?-7b", _bloom(4096, 30, 32)),
    (r"mpt-7b", _config("mpt", d_model=4096, n_heads=32, n_layers=32, vocab_size=50432)),
    (r"gemma-?2-2b", _gemma2(2304, 9216, 26, 8, 4, 256)),
    (r"gemma-?2-9b", _gemma2(3584, 14336, 42, 16, 8, 256)),
    (r"gemma-?2-27b", _gemma2(4608, 36864, 46, 32, 16, 128)),
    (r"gemma-?3-1b", _config(
        "gemma3_text", hidden_size=1152, intermediate_size=6912, num_hidden_layers=26, num_attention_heads=4,
        num_key_value_heads=1, head_dim=256, vocab_size=262144, tie_word_embeddings=True,
    )),
)  # fmt: skip
"""config.json, as far as it decides memory, of models whose family transformers knows and this project has no table for."""


def _card(name: str, mebibytes: int, tflops: float, gigabytes: float, link: float = 32.0, *, bf16: bool = True) -> Card:
    return Card(name, mebibytes * MIB, tflops, gigabytes, link, bf16=bf16)


CARDS: tuple[tuple[str, Card], ...] = (
    (r"H200", _card("H200", 143771, 989.0, 4800.0, 450.0)),
    (r"B200", _card("B200", 183359, 2250.0, 7930.0, 900.0)),
    (r"H100|H800", _card("H100", 81559, 989.0, 3350.0, 450.0)),
    (r"L40", _card("L40S", 46068, 362.0, 864.0)),
    (r"A100.*40|40 ?GB", _card("A100-40", 40448, 312.0, 1555.0, 300.0)),
    (r"A100|A800|80 ?GB", _card("A100-80", 81100, 312.0, 2039.0, 300.0)),
    (r"4090", _card("RTX4090", 24166, 165.0, 1008.0)),
    (r"A6000|RTX ?6000 ?Ada|A40\b|\b48 ?GB", _card("48GB", 49140, 150.0, 768.0)),
    (r"V100.*32", _card("32GB", 32768, 125.0, 900.0, bf16=False)),
    (r"V100", _card("V100-16", 16384, 125.0, 900.0, bf16=False)),
    (r"5090|\b32 ?GB", _card("32GB", 32607, 210.0, 1792.0)),
    (r"\bL4\b|\bA10G?\b", _card("A10", 23028, 125.0, 600.0)),
    (r"\bT4\b", _card("T4", 15360, 65.0, 320.0, 16.0, bf16=False)),
    (r"2080 ?Ti|\b11 ?GB", _card("11GB", 11264, 54.0, 616.0, 16.0, bf16=False)),
    (r"\b12 ?GB|30[68]0|4070", _card("12GB", 12288, 71.0, 360.0)),
    (r"\b16 ?GB|4080", _card("16GB", 16384, 71.0, 448.0)),
    (r"3090|A5000|RTX ?6000|7900|\b24 ?GB", _card("RTX3090", 24576, 71.0, 936.0)),
    (r"\b8 ?GB", _card("8GB", 8192, 40.0, 256.0)),
    (r"\b6 ?GB", _card("6GB", 6144, 25.0, 192.0)),
)
"""The card by a pattern of the row's; it decides the limit, the workspace, the attention kernel and nothing else."""

DEFAULT_CARD = dict(CARDS)[r"A100|A800|80 ?GB"]
"""For a card that no pattern knows, where only torch's own meters are asked: they do not depend on it."""

LAYERS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("q", "query", "wq", "q_proj"), ("q_proj",)),
    **dict.fromkeys(("k", "key", "wk", "k_proj"), ("k_proj",)),
    **dict.fromkeys(("v", "value", "wv", "v_proj"), ("v_proj",)),
    **dict.fromkeys(("o", "wo", "o_proj", "output_proj", "out_proj", "output", "dense"), ("o_proj",)),
    **dict.fromkeys(("gate", "gate_proj"), ("gate_proj",)),
    **dict.fromkeys(("up", "up_proj", "dense_h_to_4h", "fc1"), ("up_proj",)),
    **dict.fromkeys(("down", "down_proj", "dense_4h_to_h", "fc2"), ("down_proj",)),
    **dict.fromkeys(("c_attn", "qkv", "qkv_proj", "wqkv", "query_key_value", "w_pack"), ("q_proj", "k_proj", "v_proj")),
    **dict.fromkeys(("attn", "attention"), ("q_proj", "k_proj", "v_proj", "o_proj")),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
    **dict.fromkeys(("all", "all-linear"), LINEARS),
}
"""Layers with adapters, by a word of the row's."""

SAID_BESIDE = frozenset(("", "default", "peft", "linear", "layers", "layer", "and", "modules", "only", "proj"))
"""Words of a row that stand beside those."""

_FUSED = {
    "q_proj": "query_key_value", "k_proj": "query_key_value", "v_proj": "query_key_value", "o_proj": "dense",
    "up_proj": "dense_h_to_4h", "down_proj": "dense_4h_to_h",
}  # fmt: skip

SPELLED: dict[str, dict[str, str]] = {
    "gpt_neox": _FUSED,
    "falcon": _FUSED,
    "bloom": _FUSED,
    "phi": {"o_proj": "dense", "up_proj": "fc1", "down_proj": "fc2"},
    "phi3": {
        **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv_proj"),
        **dict.fromkeys(("gate_proj", "up_proj"), "gate_up_proj"),
    },
    "opt": {"o_proj": "out_proj", "up_proj": "fc1", "down_proj": "fc2"},
    "gptj": {"o_proj": "out_proj", "up_proj": "fc_in", "down_proj": "fc_out"},
    "mpt": {**dict.fromkeys(("q_proj", "k_proj", "v_proj"), "Wqkv"), "o_proj": "out_proj"},
    "gpt2": {
        **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "c_attn"),
        "o_proj": "c_proj",
        "up_proj": "c_fc",
        "down_proj": "c_proj",
    },
}
"""How a family calls a layer where it does not call it as Llama does (modeling_<family>.py of transformers 5.23)."""

UNGATED = frozenset(("gpt_neox", "falcon", "bloom", "phi", "opt", "gptj", "mpt", "gpt2"))
"""Families whose MLP has no gate."""

EAGER = frozenset(("bloom", "gptj", "mpt", "gemma2"))
"""Families without fused attention (`_supports_sdpa` in modeling_<family>.py)."""

OPTIMIZERS: tuple[tuple[str, str], ...] = (
    (r"4.?bit|fp8|sgd|galore|lomo|came|sophia|shampoo", ""),
    (r"paged.*8|8.?bit.*paged", "paged_adamw_8bit"),
    (r"8.?bit", "adamw_8bit"),
    (r"adafactor", "adafactor"),
    (r"lion", "lion"),
    (r"muon", "muon"),
    (r"adam|^$|none|unknown|default", "adamw"),
)
"""`optimizer` by a pattern of the row's; "": the project has none like it."""

KEEPING = (r"fsdp_qlora",)
"""Sources whose training loop keeps the model's output through the backward (fsdp_qlora's train.py: `output = model(…)`)."""
