"""The losses that published runs had, on whole logits.

Most were made as in transformers before 4.45 (modeling_llama.py, LlamaForCausalLM.forward): the logits are cast where they are,
and the shifted ones are a copy if there is more than one row.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from orchestrator.data.batch import IGNORED, MicroBatch


def _logits(model: nn.Module, batch: MicroBatch) -> torch.Tensor:
    device = next(model.parameters()).device
    packed = {} if batch.position_ids is None else {"position_ids": batch.position_ids.to(device)}
    logits: torch.Tensor = model(input_ids=batch.input_ids.to(device), use_cache=False, **packed).logits
    return logits


def _answer(model: nn.Module, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss, logits)."""
    logits = _logits(model, batch).float()
    shifted = logits[..., :-1, :].contiguous()
    labels = batch.labels[:, 1:].to(logits.device)
    loss = functional.cross_entropy(shifted.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")
    return loss, logits


def loss_sum(model: nn.Module, batch: MicroBatch) -> torch.Tensor:
    """Cross-entropy summed over the labelled tokens, the model's output let go at once, as transformers' Trainer does."""
    return _answer(model, batch)[0]


class Keeping:
    """The same in a loop that says `output = model(…)` and keeps it through the backward, until the next forward is done."""

    def __init__(self) -> None:
        self.output: torch.Tensor | None = None

    def __call__(self, model: nn.Module, batch: MicroBatch) -> torch.Tensor:
        loss, self.output = _answer(model, batch)
        return loss


CHUNKS = 8
"""Pieces in which torchtune casts the logits (torchtune/modules/loss/ce_chunked_output_loss.py, num_output_chunks)."""


def chunked(model: nn.Module, batch: MicroBatch) -> torch.Tensor:
    """Cross-entropy of logits in the compute dtype that are cast chunk by chunk (torchtune's CEWithChunkedOutputLoss)."""
    logits = _logits(model, batch)
    labels = batch.labels.to(logits.device)
    pieces = zip(logits.chunk(CHUNKS, dim=1), labels.chunk(CHUNKS, dim=1), strict=True)
    parts = [functional.cross_entropy(rows.flatten(0, 1).float(), told.flatten(), reduction="sum") for rows, told in pieces]
    return torch.stack(parts).sum()
