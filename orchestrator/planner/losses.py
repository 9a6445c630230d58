"""What the loss holds at its instants, as a closed form: bytes by line beside what the blocks keep.

Counted from the project's own code (model/head.py, model/loss.py), with every token labelled: a micro-batch in which fewer are
holds less.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from orchestrator.planner.activations import FP32, sizes
from orchestrator.spec import ModelShape, Parameter, RunSpec
from orchestrator.units import ceil_div, dtype_bytes


@dataclass(frozen=True, slots=True)
class LossCode:
    """Logit-sized fp32 tensors that a loss of whole logits keeps at its two peaks: the end of the forward and the start of the
    backward. `half`: the logits in the compute dtype are still there at the first of them; rows beyond the first make the
    shifted logits a copy, in that dtype, or one more in fp32 where it is not `half`, if the code is one that is `shifted`."""

    forward: int
    backward: int
    half: bool = True
    shifted: bool = True


OURS = LossCode(forward=2, backward=3)
"""model/loss.py: the cast logits and log_softmax's result; then that result and the gradients of nll_loss and log_softmax."""


@dataclass(frozen=True, slots=True)
class LossPeaks:
    """Bytes by line. `product` is there when the head has made its product, `forward` at the end of the loss, `backward` when
    its gradient is made, `between` after that, until the head's own backward. `inside`: the loss is made in the head's
    forward, where its weight is gathered."""

    product: Mapping[str, int]
    forward: Mapping[str, int]
    backward: Mapping[str, int]
    between: Mapping[str, int]
    inside: bool


def head_trained(table: Sequence[Parameter]) -> bool:
    """Whether the head's weight gets a gradient; a tied head is the embedding."""
    names = {p.name.removeprefix("base_model.model."): p.trainable for p in table}
    return names.get("lm_head.weight", names.get("model.embed_tokens.weight", False))


def loss_peaks(spec: RunSpec, shape: ModelShape, table: Sequence[Parameter], code: LossCode | None = None) -> LossPeaks:
    """The loss that `spec` asks for; `code`: another one of whole logits, as published runs had."""
    if spec.loss.kind == "plain" or code is not None:
        return _whole(spec, shape, code or OURS)
    return _chunked(spec, shape, head_trained(table))


def _whole(spec: RunSpec, shape: ModelShape, code: LossCode) -> LossPeaks:
    c = dtype_bytes(spec.precision.compute)
    logits = spec.batch.micro * spec.data.seq_len * (shape.vocab_size // spec.strategy.tp)
    copy = (c if code.half else FP32) if code.shifted and spec.batch.micro > 1 else 0
    low = c if code.half and c < FP32 else 0
    return LossPeaks(
        product={"logits": logits * c},
        forward={"logits": logits * (low + copy + code.forward * FP32)},
        backward={"logits": logits * code.backward * FP32},
        between={"logits": logits * c},
        inside=False,
    )


def _chunked(spec: RunSpec, shape: ModelShape, trained: bool) -> LossPeaks:
    """One chunk's logits in fp32 and, in half precision, its logits or their errors; the gradients that are made beside it."""
    s = sizes(shape, spec.precision.compute, spec.strategy.tp)
    tokens = spec.batch.micro * (spec.data.seq_len - 1)
    chunks = ceil_div(tokens, spec.loss.chunk)
    at_once = min(tokens, spec.loss.chunk)
    logits = at_once * s.vocabulary * (FP32 + (s.c if s.c < FP32 else 0))
    made = spec.batch.micro * spec.data.seq_len * s.c * s.hidden
    kept = {"activations": made}
    picked = at_once * s.c * s.hidden  # the hidden states of the chunk
    whole = spec.batch.micro * spec.data.seq_len * s.c * s.hidden  # all of them, the head's input
    product = {"logits": logits, "activations": made + whole + 2 * picked}
    forward = product
    if trained:
        weight = s.vocabulary * s.hidden * s.c
        kept = {"activations": made, "gradients": weight}
        if chunks == 1:
            errors = at_once * s.vocabulary * s.c
            forward = {"logits": errors, "activations": whole + 2 * picked, "gradients": weight}
            product = {"logits": logits, "activations": whole + picked}
        else:  # slices of the vocabulary: all picked rows, and their gradient in fp32
            forward = {
                "logits": ceil_div(s.vocabulary, chunks) * tokens * (FP32 + (s.c if s.c < FP32 else 0)),
                "activations": whole + tokens * s.hidden * (s.c + FP32),
                "gradients": weight,
            }
    return LossPeaks(product=product, forward=forward, backward=kept, between=kept, inside=True)
