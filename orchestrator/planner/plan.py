"""Plan: what a run will hold on each card, in host memory and on NVMe, and how long a step takes. A frozen value."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from orchestrator.ledger import Ledger
from orchestrator.planner.roofline import StepTime
from orchestrator.units import format_bytes

LAYOUT, REHEARSAL = "layout", "rehearsal"

MARGIN = {LAYOUT: 0.05, REHEARSAL: 0.01}
"""Share of the card that a prediction must leave free to be called safe, by its basis: the careful closed form erred by 5 %
in the median over 23 traced configurations (docs/planning.md), the rehearsal by less than 1 %."""

FITS, TIGHT, SHORT = "fits", "tight", "short"


@dataclass(frozen=True, slots=True)
class Room:
    """Bytes needed of one kind of memory by one rank, and what there is for it; `limit` 0: not stated."""

    need: int
    limit: int

    @property
    def short(self) -> int:
        """Bytes that are missing; 0 where it fits or the limit is not stated."""
        return max(0, self.need - self.limit) if self.limit else 0


@dataclass(frozen=True, slots=True)
class Peak:
    """The instant at which the card holds most: its phase, what happens there, what is alive (bytes by line, largest first)."""

    phase: str
    what: str
    alive: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class CardUse:
    """Bytes on one card. `allocated` and `reserved` are torch's peaks; `context` and `communication` lie outside torch.

    `used` is what the driver would show, `limit` what it shows as the card's memory.
    """

    allocated: int
    reserved: int
    context: int
    communication: int
    limit: int

    @property
    def used(self) -> int:
        return self.reserved + self.context + self.communication

    @property
    def short(self) -> int:
        """Bytes that are missing; 0 where it fits."""
        return max(0, self.used - self.limit)


@dataclass(frozen=True, slots=True)
class Fix:
    """A change that makes the run fit: what to type, the bytes it saves on the card (negative: it costs some), the step's
    length as a factor of the present one (None: not known), and the host bytes of one rank where it offloads, else 0."""

    words: str
    saves: int
    slowdown: float | None
    host: int = 0

    @property
    def sentence(self) -> str:
        """The fix for a person: "recompute=full saves 5.10 GiB for 33 % more time"."""
        change = f"saves {format_bytes(self.saves)}" if self.saves > 0 else "moves the load"
        if self.host:
            change += f" ({format_bytes(self.host)} of host memory for each rank)"
        if self.slowdown is None:
            return f"{self.words} {change}"
        percent = round(100 * (self.slowdown - 1))
        if percent < 0:
            return f"{self.words} {change} and takes {-percent} % less time"
        return f"{self.words} {change} {f'for {percent} % more time' if percent else 'at no cost in time'}"


@dataclass(frozen=True, slots=True)
class Plan:
    """The prediction for one strategy of one run; all cards hold alike but for padding, and rank 0 is described.

    Attributes:
        label: short name of the strategy with its recompute, for tables and pictures.
        words: what to type for it.
        model, tuning, cluster, card, ranks, micro, accumulation, seq_len, compute: the run it is for.
        basis: "rehearsal" (the engine's code was run on fake tensors) or "layout" (the Layout and an activation estimate).
        ledger: bytes by phase and line; each phase lists all that its fullest instant holds.
        memory: the card in sum.
        peak: when the card holds most, and what.
        host, nvme: the memory of one rank outside the card.
        time: the parts of an optimizer step; None where the card's rates are not known.
        tokens_per_second: of the whole cluster, sequences full.
        fixes: cheapest first, where the run does not fit.
        notes: what was assumed.
        optimizer: which; plans of before it was written down are AdamW's.
    """

    label: str
    words: str
    model: str
    tuning: str
    cluster: str
    card: str
    ranks: int
    micro: int
    accumulation: int
    seq_len: int
    compute: str
    basis: str
    ledger: Ledger
    memory: CardUse
    peak: Peak
    host: Room
    nvme: Room
    time: StepTime | None
    tokens_per_second: float | None
    fixes: tuple[Fix, ...] = ()
    notes: tuple[str, ...] = ()
    optimizer: str = "adamw"

    @property
    def fits(self) -> bool:
        """Whether nothing is short, on the card, in the host or on NVMe."""
        return not (self.memory.short or self.host.short or self.nvme.short)

    @property
    def verdict(self) -> str:
        """ "fits", "tight" (it fits by less than the margin of its basis) or "short"."""
        if not self.fits:
            return SHORT
        margin = MARGIN[self.basis]
        pairs = [(self.memory.used, self.memory.limit), (self.host.need, self.host.limit)]
        return TIGHT if any(limit and need > limit * (1 - margin) for need, limit in pairs) else FITS

    @property
    def offloads(self) -> bool:
        """Whether tensors rest outside the card."""
        return "offload=" in self.words

    @property
    def seconds(self) -> float | None:
        """Length of one optimizer step."""
        return self.time.total if self.time is not None else None

    @property
    def shortfall(self) -> str:
        """What is missing, for a person; empty where it fits."""
        if self.memory.short:
            where = "on each card" if self.card != "cpu" else "of memory for each rank"
            return f"short {format_bytes(self.memory.short)} {where} in {self.peak.phase}"
        if self.host.short:
            return f"short {format_bytes(self.host.short)} of host memory for each rank"
        return f"short {format_bytes(self.nvme.short)} of NVMe for each rank" if self.nvme.short else ""

    def to_json(self) -> dict[str, Any]:
        """Plain data, with the derived figures that a script asks for."""
        plain = dataclasses.asdict(self) | {"ledger": self.ledger.to_json()}
        plain["derived"] = {
            "fits": self.fits,
            "verdict": self.verdict,
            "shortfall": self.shortfall,
            "device_used": self.memory.used,
            "step_seconds": self.seconds,
        }
        return json.loads(json.dumps(plain))

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Plan:
        """Inverse of `to_json`. Raises KeyError or TypeError for anything else."""
        values = {name: value for name, value in data.items() if name != "derived"}
        peak = values["peak"]
        values |= {
            "ledger": Ledger.from_json(values["ledger"]),
            "memory": CardUse(**values["memory"]),
            "peak": Peak(peak["phase"], peak["what"], tuple((line, count) for line, count in peak["alive"])),
            "host": Room(**values["host"]),
            "nvme": Room(**values["nvme"]),
            "time": StepTime(**values["time"]) if values["time"] is not None else None,
            "fixes": tuple(Fix(**fix) for fix in values["fixes"]),
            "notes": tuple(values["notes"]),
        }
        return cls(**values)
