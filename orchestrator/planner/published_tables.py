"""What the words of published rows mean: models, cards and adapted layers, each by a pattern that the first match decides."""

from __future__ import annotations

from dataclasses import replace

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
    (r"codellama-34b", _llama(8192, 22016, 48, 64, 8, 32000)),
    (r"tinyllama-1\.1b", _llama(2048, 5632, 22, 32, 4, 32000)),
    (r"llama-?2-70b", _llama(8192, 28672, 80, 64, 8, 32000)),
    (r"llama-?3\.2-1b", _tied(_llama(2048, 8192, 16, 32, 8, 128256))),
    (r"llama-?3\.2-3b", _tied(_llama(3072, 8192, 28, 24, 8, 128256))),
    (r"llama-?3(\.1)?-8b", _llama(4096, 14336, 32, 32, 8, 128256)),
    (r"llama-?3(\.[13])?-70b", _llama(8192, 28672, 80, 64, 8, 128256)),
    (r"(llama(-?2)?|vicuna(-v1\.[35])?|alpaca)-7b", _llama(4096, 11008, 32, 32, 32, 32000)),
    (r"(llama(-?2)?|vicuna(-v1\.[35])?|alpaca)-13b", _llama(5120, 13824, 40, 40, 40, 32000)),
    (r"llama-3[03]b", _llama(6656, 17920, 60, 52, 52, 32000)),
    (r"llama-65b", _llama(8192, 22016, 80, 64, 64, 32000)),
    (r"yi-6b", _llama(4096, 11008, 32, 32, 4, 64000)),
    (r"yi-34b", _llama(7168, 20480, 60, 56, 8, 64000)),
    (r"zephyr-7b|mistral-7b", _llama(4096, 14336, 32, 32, 8, 32000, "mistral")),
    (r"^qwen-1[-.]8b", _llama(2048, 5504, 24, 16, 16, 151936, "qwen2")),
    (r"^qwen-7b", _llama(4096, 11008, 32, 32, 32, 151936, "qwen2")),
    (r"^qwen-14b", _llama(5120, 13696, 40, 40, 40, 152064, "qwen2")),
    (r"^qwen-72b", _llama(8192, 24576, 80, 64, 64, 152064, "qwen2")),
    (r"qwen-?2(\.5)?-0\.5b", _tied(_llama(896, 4864, 24, 14, 2, 151936, "qwen2"))),
    (r"qwen-?2(\.5)?-1\.5b", _tied(_llama(1536, 8960, 28, 12, 2, 151936, "qwen2"))),
    (r"qwen-?2\.5-3b", _tied(_llama(2048, 11008, 36, 16, 2, 151936, "qwen2"))),
    (r"qwen-?2(\.5)?-7b", _llama(3584, 18944, 28, 28, 4, 152064, "qwen2")),
    (r"qwen-?2\.5-14b", _llama(5120, 13824, 48, 40, 8, 152064, "qwen2")),
    (r"qwen-?2\.5-32b", _llama(5120, 27648, 64, 40, 8, 152064, "qwen2")),
    (r"qwen-?2(\.5)?-72b", _llama(8192, 29568, 80, 64, 8, 152064, "qwen2")),
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
"""Dimensions from each model's config.json, by a pattern of its name, spaces and underscores as hyphens. The first Qwen has
Qwen2's shape: its c_attn is q, k and v in one matrix, its MLP's stated width is that of both halves."""


def _card(name: str, mebibytes: int, tflops: float, gigabytes: float, link: float = 32.0) -> Card:
    return Card(name, mebibytes * MIB, tflops, gigabytes, link, bf16=True)


CARDS: tuple[tuple[str, Card], ...] = (
    (r"H200", _card("H200", 143771, 989.0, 4800.0, 450.0)),
    (r"B200", _card("B200", 183359, 2250.0, 7930.0, 900.0)),
    (r"H100", _card("H100", 81559, 989.0, 3350.0, 450.0)),
    (r"L40", _card("L40S", 46068, 362.0, 864.0)),
    (r"A100.*40|40 ?GB", _card("A100-40", 40448, 312.0, 1555.0, 300.0)),
    (r"A100|80 ?GB", _card("A100-80", 81100, 312.0, 2039.0, 300.0)),
    (r"4090", _card("RTX4090", 24166, 165.0, 1008.0)),
    (r"A6000|A40\b|\b48 ?GB", _card("48GB", 49140, 150.0, 768.0)),
    (r"V100.*32|\b32 ?GB", _card("32GB", 32768, 125.0, 900.0)),
    (r"\bL4\b|\bA10G?\b", _card("A10", 23028, 125.0, 600.0)),
    (r"\bT4\b", _card("T4", 15360, 65.0, 320.0, 16.0)),
    (r"\b12 ?GB", _card("12GB", 12288, 71.0, 360.0)),
    (r"\b16 ?GB", _card("16GB", 16384, 71.0, 448.0)),
    (r"3090|A5000|RTX6000|24 ?GB", _card("RTX3090", 24576, 71.0, 936.0)),
)
"""The card by a pattern of the row's; it decides the limit, the workspace and nothing else."""

DEFAULT_CARD = dict(CARDS)[r"A100|80 ?GB"]
"""For a card that no pattern knows, where only torch's own meters are asked: they do not depend on it."""

TARGETS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r"all", LINEARS),
    (r"c_attn|\(q,k,v\)", ("q_proj", "k_proj", "v_proj")),
    (r"^query,value$|(^|\()q(_proj)?,v(_proj)?\)?$", ("q_proj", "v_proj")),
    (r"^q(_proj)?,k(_proj)?,v(_proj)?,o(_proj)?$", ("q_proj", "k_proj", "v_proj", "o_proj")),
    (r"^k,q,v,up,down,gate", ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj")),
    (r"^q(_proj)?,k(_proj)?,v(_proj)?,o(_proj)?,gate(_proj)?,up(_proj)?,down(_proj)?", LINEARS),
)
"""Layers with adapters, by a pattern of the row's words without spaces."""
