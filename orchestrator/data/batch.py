"""The unit that travels from the data to an engine."""

from __future__ import annotations

from dataclasses import dataclass

import torch

IGNORED = -100
"""Label of a position that is not learned (the convention of transformers)."""


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """One forward of one rank. All tensors are int64 of shape (micro, longest sample of this micro-batch), on the CPU.

    `labels` are not shifted: position t is learned from positions before t. A row that only fills up the batch has
    every label `IGNORED` and a mask of ones, so that attention stays finite and its gradient is exactly zero.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor


@dataclass(frozen=True, slots=True)
class StepBatch:
    """One optimizer step of one rank: `accumulation` micro-batches.

    `labelled` counts the learned tokens of the *global* batch, over all ranks and micro-batches; `tokens` counts all its
    tokens without padding. Both are equal on every rank, without communication.
    """

    step: int
    epoch: int
    micro_batches: tuple[MicroBatch, ...]
    labelled: int
    tokens: int
