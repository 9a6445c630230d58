"""What a performance goes through beside its spec: the lengths of its micro-batches and the code of its loss.

A run of real data has micro-batches of many lengths. Each length asks torch's allocator for blocks of other sizes, and a block
of a gibibyte that was kept for one sample is split, or of no use, for a longer one: what is reserved grows with every length,
while what is allocated does not. A rehearsal of the longest sample alone cannot show it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from statistics import NormalDist
from typing import Any

from orchestrator.spec import RunSpec

STEPS = 2
"""Optimizer state appears in the first step, and ZeRO-3 knows its order of use from the second on."""

DRAWN = 16
"""Micro-batches of different lengths in a rehearsed mixture: they double the time of a rehearsal."""

OWN, EARLIER, KEPT, CHUNKED = "own", "earlier", "kept", "chunked"
"""Loss code: the project's; that of transformers before 4.45, which published runs had; the same in a loop that keeps the
model's output until it has the next one; torchtune's (`planner.earlier`)."""


@dataclass(frozen=True, slots=True)
class Programme:
    """`lengths` of the micro-batches in their order; empty: `STEPS` optimizer steps of full ones. `loss`: `OWN`, `EARLIER`,
    `KEPT` or `CHUNKED`. `masters`: whether what is trained has masters in fp32; `foreach`: whether AdamW goes through lists of
    tensors (`planner.habits`). The project's runs have masters and no lists."""

    lengths: tuple[int, ...] = ()
    loss: str = OWN
    masters: bool = True
    foreach: bool = False

    def steps(self, spec: RunSpec) -> list[tuple[int, ...]]:
        """The lengths of each optimizer step's micro-batches."""
        each = spec.batch.accumulation
        if not self.lengths:
            return [(spec.data.seq_len,) * each] * STEPS
        return [self.lengths[at : at + each] for at in range(0, len(self.lengths), each)]

    def fitted(self, spec: RunSpec) -> tuple[RunSpec, Programme]:
        """The spec with no more micro-batches to a step than there are lengths for `STEPS` steps, and the programme cut at its
        beginning to whole steps."""
        if not self.lengths:
            return spec, self
        each = min(spec.batch.accumulation, len(self.lengths) // STEPS)
        size = spec.strategy.dp * spec.batch.micro * each
        batch = replace(spec.batch, global_size=size, accumulation=each)
        return replace(spec, batch=batch), replace(self, lengths=self.lengths[len(self.lengths) % each :])

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Programme:
        """Inverse of `to_json`."""
        return cls(**{**data, "lengths": tuple(data["lengths"])})


FULL = Programme()


def mixture(lengths: Sequence[int], micro: int, count: int = DRAWN) -> tuple[int, ...]:
    """The lengths of `count` micro-batches of `micro` samples each, drawn from samples of `lengths` tokens, in no order but for
    the longest, which comes last, when the allocator's cache is cut into most pieces.

    A micro-batch is as long as its longest sample, so that its length has the distribution of the samples to the power of
    `micro`; one is taken from the middle of each of `count` parts of it that are equally likely.
    """
    ordered = sorted(lengths)
    shares = [((place + 0.5) / count) ** (1 / micro) for place in range(count)]
    drawn = [ordered[min(len(ordered) - 1, math.floor(share * len(ordered)))] for share in shares[:-1]]
    random.Random(0).shuffle(drawn)
    return (*drawn, ordered[-1])


def spread(mean: float, deviation: float, longest: int, *, dropped: bool, count: int = 1024) -> list[int]:
    """Lengths of `count` samples of which only mean and standard deviation are known, none above `longest`: longer ones were
    `dropped`, else cut. Taken to be log-normal: lengths are positive and many small factors make them."""
    variance = math.log1p((deviation / mean) ** 2)
    normal = NormalDist(math.log(mean) - variance / 2, math.sqrt(variance))
    found = [max(2, round(math.exp(normal.inv_cdf((place + 0.5) / count)))) for place in range(count)]
    kept = [length for length in found if length <= longest] if dropped else found
    return [min(length, longest) for length in kept] or [longest]
