"""Activations of one micro-batch as a closed form: what autograd keeps of each block and of the head, in bytes.

Counted tensor by tensor from transformers 5.23 (models/llama/modeling_llama.py), peft 0.21 (tuners/lora/layer.py) and the
flash kernels of torch's scaled_dot_product_attention; the loss itself is in losses.py. It is the estimate of a plan whose
`basis` is "layout"; a rehearsal counts the same by running the code.
"""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.spec import EMBEDDING, HEAD, ModelShape, RunSpec, norms_of
from orchestrator.units import ceil_div, dtype_bytes

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

    `blocks` rest from the forward until the backward reaches them (of those that are computed again the inputs alone), `host`
    those of them that wait in host memory. `one_block` is what the block at work holds in full, `again` what computing the
    last one again adds, `transient` the gradients inside it; `head` is what the final norm and the head keep.
    """

    blocks: int
    one_block: int
    again: int
    transient: int
    head: int
    host: int

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
    width, rows = {"o_proj": s.query, "down_proj": s.inner}, _rows(s)
    kept = 0
    for name in targets:
        kept += s.c * spec.tuning.rank
        if spec.tuning.dora:  # both products, for the gradient of the lengths (peft/tuners/lora/dora.py forward)
            kept += 2 * s.c * rows.get(name, 0)
        if spec.tuning.dropout:
            kept += (s.c + 1) * width.get(name, s.hidden)
    return kept


def _rows(s: Sizes) -> dict[str, int]:
    """The width of what each linear layer of a block gives."""
    return {
        "q_proj": s.query, "k_proj": s.key, "v_proj": s.key, "o_proj": s.hidden,
        "gate_proj": s.inner, "up_proj": s.inner, "down_proj": s.hidden,
    }  # fmt: skip


def _block(spec: RunSpec, shape: ModelShape, s: Sizes) -> int:
    """Bytes for each token that autograd keeps of one block."""
    full = spec.tuning.kind == "full"
    targets = frozenset() if full else frozenset(spec.tuning.targets)

    def input_of(*names: str) -> bool:
        """Whether the input of these linears is kept: for a gradient of their weights, or of an adapter's."""
        return full or bool(targets & set(names))

    down = input_of("down_proj")
    norms = full or not set(norms_of(shape)).isdisjoint(spec.tuning.modules)
    kept = _norms(s, norms, shape) + _adapters(spec, s, targets)
    kept += s.c * s.hidden * (input_of("q_proj", "k_proj", "v_proj") + input_of("gate_proj", "up_proj"))
    key = s.key if spec.data.packing == "none" else s.query  # under a mask k and v are repeated for every query head
    scores = spec.data.seq_len * s.heads * (FP32 + (s.c if s.c < FP32 else 0)) if spec.attention == "eager" else 0
    kept += s.c * (2 * s.query + 2 * key) + (scores or FP32 * s.heads)  # q, k, v, the output, and its log-sum-exp
    kept += s.c * s.inner * (3 + down)  # gate, its activation, up, their product
    return kept


def _products(spec: RunSpec, s: Sizes) -> int:
    """Bytes for each token that `recompute=selective` keeps of one block: the results of its matrix products and attention."""
    rows = _rows(s)
    adapters = sum(spec.tuning.rank + rows.get(name, 0) for name in spec.tuning.targets) if spec.tuning.adapters else 0
    scores = 2 * spec.data.seq_len * s.heads * s.c if spec.attention == "eager" else FP32 * s.heads
    return s.c * (sum(rows.values()) + s.query + adapters) + scores


def _inside(spec: RunSpec, s: Sizes) -> int:
    """Bytes for each token that the backward of one block adds to what the block keeps, at its worst.

    In the MLP the gradients of the product and of both its factors live at once, the product itself no more. In attention the
    flash kernel has an fp32 gradient of q, and with grouped heads k and v expanded to all of them (flash_api.cpp, mha_bwd); the
    MLP's tensors are gone by then.
    """
    full, down = spec.tuning.kind == "full", spec.tuning.kind == "full" or "down_proj" in spec.tuning.targets
    mlp = s.c * s.inner * (3 - down) + 2 * s.c * s.hidden
    expanded = 2 * s.c * s.query if s.key != s.query else 0
    flash = FP32 * s.query + expanded if s.c < FP32 else 0
    gone = s.c * s.inner * (3 + down) + s.c * s.hidden * full
    return max(mlp, flash + 4 * s.c * s.hidden + 2 * FP32 * s.hidden - gone)


def recomputed(spec: RunSpec, blocks: int) -> int:
    """How many of `blocks` blocks the backward computes again, in whole or but for their products."""
    if spec.recompute == "every_n":
        return ceil_div(blocks, spec.recompute_every)
    return 0 if spec.recompute == "none" else blocks


def activations(spec: RunSpec, shape: ModelShape) -> Activations:
    """The activations of `spec.batch.micro` rows of `spec.data.seq_len` tokens.

    In packed rows transformers tells the documents apart by an explicit mask, one byte for each pair of positions; each
    attention turns it into a bias in the compute dtype and keeps that (aten/src/ATen/native/transformers/attention.cpp,
    convert_boolean_attn_mask). Recompute keeps the mask itself for the second forward.
    """
    s = sizes(shape, spec.precision.compute, spec.strategy.tp)
    tokens = spec.batch.micro * spec.data.seq_len
    full = spec.tuning.kind == "full"
    if spec.tuning.kind == "head":  # no gradient goes past it: the frozen blocks keep nothing
        kept = tokens * s.c * s.hidden if spec.loss.kind == "plain" else 0
        return Activations(blocks=0, one_block=0, again=0, transient=0, head=kept, host=0)
    pairs = tokens * spec.data.seq_len if spec.data.packing != "none" else 0
    block = tokens * _block(spec, shape, s) + pairs * s.c
    inputs = tokens * s.c * s.hidden
    layers = shape.num_hidden_layers
    again = recomputed(spec, layers)
    recompute = again > 0
    kept = inputs + (tokens * _products(spec, s) if spec.recompute == "selective" else 0)
    on_host = spec.recompute == "offload" and spec.cluster.card.name != "cpu"
    # Without recompute nothing before the first adapters needs a gradient, so the first norm keeps nothing.
    first = 0 if full or recompute or EMBEDDING in spec.tuning.modules else tokens * (FP32 * s.hidden + FP32)
    # The norm's factor, and the input of the head where its whole product is made; a chunked loss has used it already.
    norm = full or "norm" in spec.tuning.modules
    product = (full or HEAD in spec.tuning.modules) and spec.loss.kind == "plain"
    head = tokens * (FP32 * s.hidden + (norm + product) * s.c * s.hidden)
    last = recompute and (spec.recompute != "every_n" or (layers - 1) % spec.recompute_every == 0)
    return Activations(
        blocks=(layers - again) * block + (0 if on_host else again * kept) - first + (pairs if recompute else 0),
        one_block=block,
        again=block - (kept - inputs) if last else 0,
        transient=tokens * _inside(spec, s),
        head=head,
        host=again * kept if on_host else 0,
    )
