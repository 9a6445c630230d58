"""The one loss of every engine."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from orchestrator.data.batch import IGNORED, MicroBatch


def loss_sum(model: nn.Module, batch: MicroBatch) -> torch.Tensor:
    """Cross-entropy summed (not averaged) over the labelled tokens, a scalar in fp32.

    No attention mask is passed: rows are filled up on the right, and under causal attention no real token sees what comes
    after it; so the fast causal kernels apply, and the fill never changes a real token's logits. In packed rows the positions
    keep the documents apart, and they do so only where no mask is passed. Position t's logits are held against the label at
    t + 1.
    """
    device = next(model.parameters()).device
    packed = {} if batch.position_ids is None else {"position_ids": batch.position_ids.to(device)}
    logits = model(input_ids=batch.input_ids.to(device), use_cache=False, **packed).logits
    labels = batch.labels[:, 1:].to(logits.device)
    return functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="sum"
    )
