"""Activations of one micro-batch as a closed form: what autograd keeps of each block and of the head, in bytes.

Counted tensor by tensor from transformers 5.23 (models/llama/modeling_llama.py), peft 0.21 (tuners/lora/layer.py) and the
flash kernels of torch's scaled_dot_product_attention; the loss itself is in losses.py. It is the estimate of a plan whose
`basis` is "layout"; a rehearsal counts the same by running the code.
"""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.spec import ModelShape, RunSpec
from orchestrator.units import dtype_bytes

FP32 = 4


@dataclass(frozen=True, slots=True)
class Sizes:
    """Widths on one rank, `c` bytes to an element in the compute dtype. Tensor parallelism divides heads, MLP and
    vocabulary; what flows from block to block is whole on every rank."""

    hidden: int
    inner: int
    query: int
    key: int
    heads: int
    vocabulary: int
    c: int


def sizes(shape: ModelShape, compute: str, tp: int = 1) -> Sizes:
    """The widths of `shape` on one of `tp` ranks."""
    return Sizes(
        hidden=shape.hidden_size,
        inner=shape.intermediate_size // tp,
        query=shape.num_attention_heads * shape.head_dim // tp,
        key=shape.num_key_value_heads * shape.head_dim // tp,
        heads=max(1, shape.num_attention_heads // tp),
        vocabulary=shape.vocab_size // tp,
        c=dtype_bytes(compute),
    )


@dataclass(frozen=True, slots=True)
class Activations:
    """Bytes of one micro-batch on one rank.

    `blocks` rest from the forward until the backward reaches them (with recompute: the inputs of the blocks alone).
    `one_block` is what the block at work holds in full, `transient` the gradients inside it, `attention` the flash
    backward's own buffers; `head` is what the final norm and the head keep.
    """

    blocks: int
    one_block: int
    transient: int
    attention: int
    head: int

    @property
    def saved(self) -> int:
        """What is kept when the forward has ended, the loss apart."""
        return self.blocks + self.head


def _norms(s: Sizes, full: bool, shape: ModelShape) -> int:
    """Two norms: the fp32 copy that the square and the product share, and its root; trained weights keep their factor."""
    factor = FP32 if shape.model_type == "gemma" else s.c
    kept = 2 * (FP32 * s.hidden + FP32 + (factor * s.hidden if full else 0))
    if shape.model_type == "qwen3":
        kept += (FP32 + (s.c if full else 0)) * (s.query + s.key)
    return kept


def _adapters(spec: RunSpec, s: Sizes, targets: frozenset[str]) -> int:
    """The narrow product of each adapter and, with dropout, its own dropped input and mask."""
    width = {"o_proj": s.query, "down_proj": s.inner}
    kept = 0
    for name in targets:
        kept += s.c * spec.tuning.rank
        if spec.tuning.dropout:
            kept += (s.c + 1) * width.get(name, s.hidden)
    return kept


def _block(spec: RunSpec, shape: ModelShape, s: Sizes) -> int:
    """Bytes for each token that autograd keeps of one block."""
    full = spec.tuning.kind == "full"
    targets = frozenset() if full else frozenset(spec.tuning.targets)

    def input_of(*names: str) -> bool:
        """Whether the input of these linears is kept: for a gradient of their weights, or of an adapter's."""
        return full or bool(targets & set(names))

    kept = _norms(s, full, shape) + _adapters(spec, s, targets)
    kept += s.c * s.hidden * (input_of("q_proj", "k_proj", "v_proj") + input_of("gate_proj", "up_proj"))
    key = s.key if spec.data.packing == "none" else s.query  # under a mask k and v are repeated for every query head
    kept += s.c * (2 * s.query + 2 * key) + FP32 * s.heads  # q, k, v, the output, and its log-sum-exp
    kept += s.c * s.inner * (3 + input_of("down_proj"))  # gate, its activation, up, their product
    return kept


def activations(spec: RunSpec, shape: ModelShape) -> Activations:
    """The activations of `spec.batch.micro` rows of `spec.data.seq_len` tokens.

    In packed rows transformers tells the documents apart by an explicit mask, one byte for each pair of positions; each
    attention turns it into a bias in the compute dtype and keeps that (aten/src/ATen/native/transformers/attention.cpp,
    convert_boolean_attn_mask). Recompute keeps the mask itself for the second forward.
    """
    s = sizes(shape, spec.precision.compute, spec.strategy.tp)
    tokens = spec.batch.micro * spec.data.seq_len
    full = spec.tuning.kind == "full"
    pairs = tokens * spec.data.seq_len if spec.data.packing != "none" else 0
    block = tokens * _block(spec, shape, s) + pairs * s.c
    inputs = tokens * s.c * s.hidden
    recompute = spec.recompute != "none"
    # Without recompute nothing before the first adapters needs a gradient, so the first norm keeps nothing.
    first = 0 if full or recompute else tokens * (FP32 * s.hidden + FP32)
    # Gradients of the product, of both its factors and of the residual stream live at once; the norms work in fp32.
    transient = tokens * (3 * s.c * s.inner + 2 * s.c * s.hidden + 2 * FP32 * s.hidden)
    # fp32 gradient of q, and with grouped heads k and v expanded to all of them (flash_api.cpp, mha_bwd).
    expanded = 2 * s.c * s.query if s.key != s.query else 0
    attention = tokens * (FP32 * s.query + expanded) if s.c < FP32 else 0
    # The norm's factor, and the input of the head where its whole product is made; a chunked loss has used it already.
    head = tokens * (FP32 * s.hidden + ((1 + (spec.loss.kind == "plain")) * s.c * s.hidden if full else 0))
    return Activations(
        blocks=shape.num_hidden_layers * (inputs if recompute else block) - first + (pairs if recompute else 0),
        one_block=block,
        transient=transient,
        attention=attention,
        head=head,
    )
