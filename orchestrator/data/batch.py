"""The unit that travels from the data to an engine."""

from __future__ import annotations

from dataclasses import dataclass

import torch

IGNORED = -100
"""Label of a position that is not learned (the convention of transformers)."""


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """One forward of one rank. All tensors are int64 of shape (micro, longest row of this micro-batch), on the CPU.

    `labels` are not shifted: position t is learned from positions before t. Rows are filled up on the right, where causal
    attention lets no real token see, so there is no mask. A row that only fills up the batch has every label `IGNORED`, so
    that its gradient is exactly zero.

    `position_ids` is None where each row is one document. In packed rows it begins again at 0 with each document, which is
    how transformers knows them apart (masking_utils.find_packed_sequence_indices); the first position of each has no label.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class StepBatch:
    """One optimizer step of one rank: `accumulation` micro-batches.

    `labelled` counts the learned tokens of the *global* batch, over all ranks and micro-batches; `tokens` counts all its
    tokens without padding, `positions` with it. All are equal on every rank, without communication.
    """

    step: int
    epoch: int
    micro_batches: tuple[MicroBatch, ...]
    labelled: int
    tokens: int
    positions: int
