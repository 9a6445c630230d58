"""The head that gives the loss instead of the logits, so that no tensor grows with vocabulary × tokens.

The loss is computed inside the forward of the head's own module: the engine's hooks then see an ordinary use of its weight
(FSDP2 has gathered the root group, ZeRO-3 fetches the module's parameter), and nothing is reached around. The gradients are
made in that forward too and only scaled in the backward, so logits are never computed twice for a frozen head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from orchestrator.spec import Loss
from orchestrator.units import ceil_div

SMALL_ERRORS = 10
"""Exponent of two by which the errors p - y, at most 1 each, are raised before they are rounded to half precision, divided by
the number of tokens: fp16 then keeps probabilities down to some 1e-8 and its sums stay far from its largest number. A power of
two changes nothing in fp32 and bf16."""


@dataclass(frozen=True, slots=True)
class Target:
    """The labelled tokens of a micro-batch: `rows`, their positions in the flattened (micro × tokens), and the `labels` that
    are held against the logits there. Both int64 of shape (labelled,)."""

    rows: torch.Tensor
    labels: torch.Tensor

    def to(self, device: torch.device) -> Target:
        """The same on `device`, where the hidden states are: only the head knows (FSDP2 may rest its weights elsewhere)."""
        return Target(self.rows.to(device), self.labels.to(device))


Exchange = Callable[[torch.Tensor, str], None]
"""Makes a tensor the "largest" or the "sum" of its own over the ranks that each hold a part of the vocabulary, in place."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The part of the vocabulary that a head computes: words from `first` on. Alone it is all of it and exchanges nothing."""

    first: int = 0
    exchange: Exchange | None = None

    def join(self, tensor: torch.Tensor, how: str) -> None:
        """Make `tensor`, one value a row, what it is over the whole vocabulary."""
        if self.exchange is not None:
            self.exchange(tensor, how)

    def place(self, labels: torch.Tensor, first: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(where each label lies among `width` words from word `first` of this part on, as a column; whether it does)."""
        place = labels - (self.first + first)
        inside = (place >= 0) & (place < width)
        return place.clamp_(0, width - 1).unsqueeze(1), inside.unsqueeze(1)


WHOLE = Vocabulary()

_TARGET: ContextVar[Target | None] = ContextVar("target", default=None)


@contextmanager
def learning(target: Target) -> Iterator[None]:
    """While it is entered, a `LossHead` gives the loss of `target` in place of logits."""
    token = _TARGET.set(target)
    try:
        yield
    finally:
        _TARGET.reset(token)


class LossHead(nn.Linear):
    """A linear head whose forward gives the summed loss, a scalar in fp32, while `learning` is entered; else the logits.

    A built head becomes one by its class (`use_head`), not by being replaced: its weight may be tied, or already sharded by
    the engine's context.
    """

    loss: Loss
    vocabulary: Vocabulary = WHOLE

    def share(self, first: int, exchange: Exchange) -> None:
        """From here on the weight holds only the words from `first` on; other ranks hold the others, and the loss is that of
        all of them. The gradient of the input is this part's."""
        self.vocabulary = Vocabulary(first, exchange)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        target = _TARGET.get()
        if target is None:
            return super().forward(input)
        target = target.to(input.device)
        hidden = input.flatten(0, -2)
        if self.loss.kind == "liger":
            return _liger(hidden.index_select(0, target.rows), self.weight, target.labels)
        if not torch.is_grad_enabled():
            return _Work(hidden, self.weight, target, self.vocabulary).loss_alone(self.loss.chunk)
        loss: torch.Tensor = _LossSum.apply(hidden, self.weight, target, self.vocabulary, self.loss.chunk)
        return loss


def _one_product(head: object) -> bool:
    return type(head) is nn.Linear and "bias" not in dict(head.named_parameters())


def use_head(model: Any, loss: Loss) -> None:
    """Let the head of `model`, whose family is one of `PLAIN_HEADS`, give the loss as `loss` says; "plain" changes nothing.

    Raises:
        AssertionError: the head is more than one product.
    """
    if loss.kind == "plain":
        return
    head: Any = model.get_output_embeddings()
    assert _one_product(head), f"{model.config.model_type} is in PLAIN_HEADS by mistake"
    head.__class__ = LossHead
    head.loss = loss


class _LossSum(torch.autograd.Function):
    """Cross-entropy summed over the labelled rows of `hidden` (rows × width), in fp32, its gradients made in the forward."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, target: Target, vocabulary: Vocabulary, chunk: int
    ) -> torch.Tensor:
        work = _Work(hidden, weight, target, vocabulary)
        ctx.raised = work.raised
        if ctx.needs_input_grad[1]:
            loss, of_hidden, of_weight = work.with_weight(chunk)
        else:
            (loss, of_hidden), of_weight = work.frozen(chunk), None
        ctx.made = (of_hidden, of_weight)
        return loss

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[torch.Tensor | None, ...]:
        # Taken out of the context: autograd takes a gradient over without a copy only if nobody else holds it.
        made, ctx.made = ctx.made, (None, None)
        factor = gradients[0] / ctx.raised
        return *(None if tensor is None else tensor.mul_(factor) for tensor in made), None, None, None


@dataclass(frozen=True, slots=True)
class _Work:
    """The three ways through the rows: for the loss alone, with the gradient of the hidden rows, and with the weight's too."""

    hidden: torch.Tensor
    weight: torch.Tensor
    target: Target
    vocabulary: Vocabulary = WHOLE

    @property
    def raised(self) -> float:
        """The power of two by which the gradients are multiplied until the backward (`SMALL_ERRORS`)."""
        return float(2.0 ** (SMALL_ERRORS - max(1, self.target.rows.numel()).bit_length()))

    def _chunks(self, chunk: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """(rows, their hidden states, their labels), `chunk` tokens at a time."""
        for start in range(0, self.target.rows.numel(), chunk):
            rows = self.target.rows[start : start + chunk]
            yield rows, self.hidden.index_select(0, rows), self.target.labels[start : start + chunk]

    def _no_loss(self) -> torch.Tensor:
        return torch.zeros((), dtype=torch.float32, device=self.hidden.device)

    def loss_alone(self, chunk: int) -> torch.Tensor:
        """The loss; logits of one chunk are alive at a time."""
        loss = self._no_loss()
        for _, hidden, labels in self._chunks(chunk):
            loss += self._softmax(hidden, labels)[0].sum()
        return loss

    def frozen(self, chunk: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(loss, gradient of all hidden rows)."""
        loss, gradient = self._no_loss(), torch.zeros_like(self.hidden)
        for rows, hidden, labels in self._chunks(chunk):
            losses, errors = self._errors(hidden, labels)
            loss += losses.sum()
            gradient.index_copy_(0, rows, errors @ self.weight)
            del errors  # before the next chunk makes its own
        return loss, gradient

    def with_weight(self, chunk: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(loss, gradient of all hidden rows, gradient of the weight).

        One chunk is done at once. More go through the vocabulary in slices instead, since a sum over chunks of the weight's
        gradient in fp32 would weigh twice the gradient itself: chunks give each token's log-sum-exp, then each slice of the
        vocabulary gives its rows of the weight's gradient whole, for one more product with the head.
        """
        count = self.target.rows.numel()
        if count <= chunk:
            hidden = self.hidden.index_select(0, self.target.rows)
            losses, errors = self._errors(hidden, self.target.labels)
            own, of_weight = errors @ self.weight, errors.t() @ hidden
            del errors
            return losses.sum(), torch.zeros_like(self.hidden).index_copy_(0, self.target.rows, own), of_weight
        pieces = [self._softmax(hidden, labels)[::2] for _, hidden, labels in self._chunks(chunk)]
        loss, totals = torch.cat([losses for losses, _ in pieces]).sum(), torch.cat([total for _, total in pieces])
        del pieces
        return loss, *self._by_slices(totals, ceil_div(self.weight.shape[0], ceil_div(count, chunk)))

    def _by_slices(self, totals: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Both gradients from each row's log-sum-exp, `width` words of the vocabulary at a time."""
        hidden = self.hidden.index_select(0, self.target.rows)
        own = torch.zeros_like(hidden, dtype=torch.float32)
        of_weight = torch.empty_like(self.weight)
        for first in range(0, self.weight.shape[0], width):
            part = self.weight[first : first + width]
            errors = (hidden @ part.t()).float().sub_(totals).exp_()
            place, inside = self.vocabulary.place(self.target.labels, first, part.shape[0])
            errors.scatter_add_(1, place, -inside.float())
            half = errors.mul_(self.raised).to(hidden.dtype)
            del errors
            torch.mm(half.t(), hidden, out=of_weight[first : first + width])
            own += half @ part
            del half
        gradient = torch.zeros_like(self.hidden)
        return gradient.index_copy_(0, self.target.rows, own.to(hidden.dtype)), of_weight

    def _errors(self, hidden: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(loss of each row, raised probabilities minus one at the label, in the compute dtype)."""
        losses, errors, _ = self._softmax(hidden, labels)
        place, inside = self.vocabulary.place(labels, 0, self.weight.shape[0])
        errors.scatter_add_(1, place, -inside.float())
        return losses, errors.mul_(self.raised).to(hidden.dtype)

    def _softmax(self, hidden: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(loss of each row, probabilities of this part's words, log-sum-exp of all words as a column), all in fp32."""
        logits = (hidden @ self.weight.t()).float()
        largest = logits.amax(1, keepdim=True)
        self.vocabulary.join(largest, "largest")
        logits.sub_(largest)
        place, inside = self.vocabulary.place(labels, 0, self.weight.shape[0])
        right = logits.gather(1, place).mul_(inside)
        self.vocabulary.join(right, "sum")
        logits.exp_()
        total = logits.sum(1, keepdim=True)
        self.vocabulary.join(total, "sum")
        logits.div_(total)
        total.log_()
        return (total - right).squeeze(1), logits, total.add_(largest)


def _liger(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The same sum by Liger's fused kernel (liger_kernel/ops/fused_linear_cross_entropy.py), which needs an NVIDIA card."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    fused = LigerFusedLinearCrossEntropyLoss(reduction="sum", accum_dtype=torch.float32)
    loss: torch.Tensor = fused(weight, hidden, labels)
    return loss.float()
