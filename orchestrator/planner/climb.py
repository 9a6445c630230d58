"""The ladder that people climb by hand until a run fits: one change on top of the other, from the cheapest to the dearest."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from orchestrator.planner.candidates import candidates
from orchestrator.planner.device import CPU
from orchestrator.planner.fixes import SHORTEST, smaller_batches
from orchestrator.planner.plan import FITS, Plan
from orchestrator.planner.predict import by_layout
from orchestrator.spec import LINEARS, Engine, RunSpec, Shard, Tuning


@dataclass(frozen=True, slots=True)
class Step:
    """One rung. `adds` is what to type on top of the rungs before it, `saves` the bytes that it saves on each card (negative:
    it costs some), `slowdown` the length of a step as a factor of the rung before (None: not known), `host` the host memory of
    one rank where something rests there, else 0."""

    name: str
    adds: str
    used: int
    limit: int
    saves: int
    slowdown: float | None
    host: int
    verdict: str


Rung = tuple[str, str, RunSpec]
"""(name, what to type, the run then)."""


def _half(spec: RunSpec) -> Iterator[Rung]:
    card = spec.cluster.card
    if spec.precision.compute == "fp32" and card.name != CPU:
        word = "bf16" if card.bf16 else "fp16"
        yield "mixed precision", f"precision={word}", replace(spec, precision=replace(spec.precision, compute=word))


def _smaller(spec: RunSpec) -> Iterator[Rung]:
    for words, other in list(smaller_batches(spec))[-1:]:
        yield "smaller micro-batch", words, other


def _recompute(spec: RunSpec) -> Iterator[Rung]:
    if spec.recompute == "none":
        yield "recompute", "recompute=full", replace(spec, recompute="full")


def _low_bits(spec: RunSpec) -> Iterator[Rung]:
    if spec.optimizer.name == "adamw":
        smaller = replace(spec.optimizer, name="adamw_8bit")
        yield "low-bit optimizer", "optimizer=adamw_8bit", replace(spec, optimizer=smaller)


def _four_bits(spec: RunSpec) -> Iterator[Rung]:
    shape, kind = spec.model.shape, spec.tuning.kind
    if kind in ("full", "lora") and spec.strategy.tp == 1 and shape is not None and shape.known:
        base = spec.tuning if spec.tuning.adapters else Tuning("lora", targets=LINEARS)
        tuning = replace(base, kind="qlora", quant="nf4", double_quant=True, dora=False)
        yield "QLoRA (trains adapters alone)", "tuning=qlora", replace(spec, tuning=tuning)


def _shorter(spec: RunSpec) -> Iterator[Rung]:
    length = spec.data.seq_len // 2
    if length >= SHORTEST:
        yield (
            "shorter sequence (cuts samples)",
            f"data.seq_len={length}",
            replace(spec, data=replace(spec.data, seq_len=length)),
        )


def _moved(spec: RunSpec, name: str, words: str) -> Iterator[Rung]:
    """`spec` under the strategy that `words` name, unless it is that already or nothing like it can run."""
    found = {candidate.words: candidate.spec for candidate in candidates(replace(spec, recompute="none"), ("none",))}
    other = found.get(words)
    if other is not None and other.strategy.label != spec.strategy.label:
        yield name, words, replace(other, recompute=spec.recompute)


def _shard(spec: RunSpec) -> Iterator[Rung]:
    if spec.strategy.ranks > 1 and spec.strategy.shard is not Shard.PARAMETERS:
        yield from _moved(spec, "shard", "zero=stage3")


def _offload(spec: RunSpec) -> Iterator[Rung]:
    yield from _moved(spec, "offload to the host", "zero=stage3 offload=cpu")


def _disk(spec: RunSpec) -> Iterator[Rung]:
    yield from _moved(spec, "offload to a disk", "zero=stage3 offload=nvme")


RUNGS = (_half, _smaller, _recompute, _low_bits, _four_bits, _shorter, _shard, _offload, _disk)
"""From the cheapest to the dearest, in the order in which people try them."""


ASKED, UNDIVIDED = "as asked", "nothing divided"


def _foot(spec: RunSpec) -> Rung:
    """Where the climb begins: the run itself, or where several ranks name no strategy the one that divides least."""
    if spec.strategy.engine is Engine.PLAIN and spec.strategy.ranks > 1:
        least = candidates(spec, (spec.recompute,))[0]
        return UNDIVIDED, least.words, least.spec
    return ASKED, "", spec


WORTH = 0.005
"""Share of what is used that a rung must save to be climbed: a low-bit optimizer does nothing for adapters."""


def climb(spec: RunSpec) -> tuple[Step, ...]:
    """Every rung from `spec` upwards that saves something, by the Layout, each on top of those before it. Neither 8-bit states
    nor a base in 4 bits can rest on a disk: that rung goes without them."""
    name, words, before = _foot(spec)
    plan = by_layout(before)
    steps = [_step(name, words, plan, None)]
    for rung in RUNGS:
        start = before
        if rung is _disk:
            start = replace(before, optimizer=spec.optimizer, tuning=spec.tuning)
        for name, words, other in rung(start):
            dropped = [f"optimizer={spec.optimizer.name}"] if start.optimizer != before.optimizer else []
            dropped += [f"tuning={spec.tuning.kind}"] if start.tuning != before.tuning else []
            made = by_layout(other)
            if rung is not _disk and plan.memory.used - made.memory.used < WORTH * plan.memory.used:
                continue
            steps.append(_step(name, " ".join([words, *dropped]), made, plan))
            before, plan = other, made
    return tuple(steps)


def _step(name: str, adds: str, made: Plan, before: Plan | None) -> Step:
    slowdown = made.seconds / before.seconds if before is not None and made.seconds and before.seconds else None
    saves = before.memory.used - made.memory.used if before is not None else 0
    host = made.host.need if made.offloads else 0
    return Step(name, adds, made.memory.used, made.memory.limit, saves, slowdown, host, made.verdict)


def first_that_fits(steps: tuple[Step, ...]) -> int | None:
    """Index of the first rung on which the run fits with its margin; None: no rung is high enough."""
    return next((index for index, step in enumerate(steps) if step.verdict == FITS), None)
