"""The one loss of every engine."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from orchestrator.data.batch import IGNORED, MicroBatch
from orchestrator.model.head import Target, learning


def loss_sum(model: nn.Module, batch: MicroBatch) -> torch.Tensor:
    """Cross-entropy summed (not averaged) over the labelled tokens, a scalar in fp32.

    No attention mask is passed: rows are filled up on the right, and under causal attention no real token sees what comes
    after it; so the fast causal kernels apply, and the fill never changes a real token's logits. In packed rows the positions
    keep the documents apart, and they do so only where no mask is passed. Position t's logits are held against the label at
    t + 1. A model whose head gives the loss (`model.head`) makes no logits at all.
    """
    device = next(model.parameters()).device
    packed = {} if batch.position_ids is None else {"position_ids": batch.position_ids.to(device)}
    with learning(target_of(batch.labels)):
        answer: torch.Tensor = model(input_ids=batch.input_ids.to(device), use_cache=False, **packed).logits
    if answer.ndim == 0:
        return answer
    labels = batch.labels[:, 1:].to(answer.device)
    return functional.cross_entropy(
        answer[:, :-1].flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="sum"
    )


def target_of(labels: torch.Tensor) -> Target:
    """The labelled tokens of `labels` (micro × tokens), on the CPU like them, so that no card is waited for."""
    width = labels.shape[1] - 1
    following = labels[:, 1:].flatten()
    found = (following != IGNORED).nonzero().squeeze(1)
    rows = found + found // width  # each row of hidden states ends with one more position, which predicts nothing
    return Target(rows, following.index_select(0, found))
