"""The learning rate as a pure function of the optimizer step."""

from __future__ import annotations

import math

from orchestrator.spec import Schedule


def warmup_steps(schedule: Schedule, total: int) -> int:
    """Number of warmup steps: `schedule.warmup` itself, or that share of `total` where it is below 1; never above `total`."""
    steps = round(schedule.warmup * total) if schedule.warmup < 1 else int(schedule.warmup)
    return min(steps, total)


def learning_rate(step: int, total: int, schedule: Schedule, base: float) -> float:
    """The learning rate of optimizer step `step`, counted from 1 to `total` over the whole run (never ÷ ranks).

    Warmup rises linearly and its first step is already above zero; the step after it has the full `base`. Linear and
    cosine then fall towards `min_ratio` × `base`, which is reached only after the last step, so that no step is wasted on
    a rate of zero.
    """
    warmup = warmup_steps(schedule, total)
    if step <= warmup:
        return base * step / (warmup + 1)
    if schedule.kind == "constant":
        return base
    progress = min(1.0, (step - warmup - 1) / max(1, total - warmup))
    if schedule.kind == "linear":
        share = 1.0 - progress
    elif schedule.kind == "cosine":
        share = 0.5 * (1.0 + math.cos(math.pi * progress))
    else:
        raise ValueError(f"schedule {schedule.kind!r} is not one of constant, linear, cosine")
    return base * (schedule.min_ratio + (1.0 - schedule.min_ratio) * share)
