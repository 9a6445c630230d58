"""A look at the logits of a model that an engine holds, through the one door that every engine has: its forward."""

from __future__ import annotations

import torch
from torch import nn

from orchestrator.data.batch import MicroBatch
from orchestrator.engine.protocol import Engine, LossSum

TOKENS = 64


def probe_ids(vocabulary: int, seed: int) -> torch.Tensor:
    """One row of TOKENS token ids drawn by `seed`: text that no model has learned."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocabulary, (1, TOKENS), generator=generator)


class Probe:
    """The loss `inner`, which instead shows the logits while `logits` asks for them."""

    def __init__(self, inner: LossSum) -> None:
        self._inner = inner
        self._asked = False
        self._seen: torch.Tensor | None = None

    def __call__(self, model: nn.Module, batch: MicroBatch) -> torch.Tensor:
        if not self._asked:
            return self._inner(model, batch)
        logits = model(input_ids=batch.input_ids.to(next(model.parameters()).device), use_cache=False).logits
        self._seen = logits.detach().float().cpu()
        return logits.sum()

    def logits(self, engine: Engine, ids: torch.Tensor) -> torch.Tensor:
        """Logits in fp32 on the CPU, 1 × tokens × vocabulary, of the model in `engine`, which was made with this loss; every
        rank must ask."""
        self._asked = True
        try:
            engine.forward_backward(MicroBatch(ids, ids), 1, last=True, learn=False)
        finally:
            self._asked = False
        assert self._seen is not None, "the engine has called its loss"
        return self._seen
