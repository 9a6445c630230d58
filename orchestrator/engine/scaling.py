"""Dynamic loss scaling for fp16 (Micikevicius et al., arXiv:1710.03740, §3.2), decided by the global gradient norm.

The norm is the same on every rank, so every rank takes the same decision without another collective.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class LossScale:
    """`value` multiplies the loss. It halves when a gradient overflows and doubles after `window` good steps in a row."""

    value: float = 1.0
    dynamic: bool = False
    window: int = 1000
    good_steps: int = 0

    @classmethod
    def for_dtype(cls, compute: str) -> LossScale:
        """65,536 and dynamic for fp16, 1 for every other dtype."""
        return cls(2.0**16, dynamic=True) if compute == "fp16" else cls()

    def update(self, finite: bool) -> None:
        """Tell the outcome of a step."""
        if not self.dynamic:
            return
        if not finite:
            self.value, self.good_steps = max(self.value / 2, 1.0), 0
            return
        self.good_steps += 1
        if self.good_steps >= self.window:
            self.value, self.good_steps = self.value * 2, 0
