"""Layout: every tensor class that rests on a rank between steps, and every buffer that comes and goes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from orchestrator.errors import Fault, LayoutDrift
from orchestrator.ledger import Entry, Ledger
from orchestrator.spec import Home, RunSpec
from orchestrator.units import dtype_bytes, format_bytes

LOADED = "load"
STEPPED = "step"


@dataclass(frozen=True, slots=True)
class Row:
    """One tensor class at rest on one rank.

    `line` is its name in every table: frozen, scales, weights, adapters, master, gradients, moments, bucket, staging.
    `elements` are those of the storages on this rank, of which `padding` belong to no parameter. `shards` is the number
    of ranks that hold different parts (1 = every rank holds all). `since` "load": from adoption on; "step": from the
    first optimizer step on.
    """

    line: str
    dtype: str
    home: Home
    elements: int
    shards: int = 1
    padding: int = 0
    since: str = LOADED

    @property
    def bytes(self) -> int:
        return self.elements * dtype_bytes(self.dtype)


@dataclass(frozen=True, slots=True)
class Buffer:
    """Bytes that live only during `phases`: gathered weights, gradients before they are reduced, communication buckets.

    An upper bound from the library's source, named in `source`; activations are not among them.
    """

    line: str
    home: Home
    bytes: int
    phases: tuple[str, ...]
    source: str


@dataclass(frozen=True, slots=True)
class Layout:
    """What rank `rank` of `ranks` holds under one strategy."""

    rank: int
    ranks: int
    rows: tuple[Row, ...]
    buffers: tuple[Buffer, ...] = ()

    def at(self, point: str) -> tuple[Row, ...]:
        """Rows that exist once `point` ("load" or "step") has been reached; empty ones are left out."""
        return tuple(row for row in self.rows if row.elements and (row.since == LOADED or point == STEPPED))

    def rest_bytes(self, home: Home) -> int:
        """Bytes at rest in `home` from the first step on."""
        return sum(row.bytes for row in self.at(STEPPED) if row.home is home)

    def peak_bytes(self, home: Home) -> int:
        """Lower bound of the peak in `home`, over the phases: what rests plus the buffers of the phase; no activations."""
        phases = {phase for buffer in self.buffers for phase in buffer.phases}
        transient = (sum(b.bytes for b in self.buffers if b.home is home and phase in b.phases) for phase in phases)
        return self.rest_bytes(home) + max(transient, default=0)

    def ledger(self) -> Ledger:
        """The rows and buffers as a Ledger."""
        rest = [Entry(row.since, row.line, str(row.home), row.bytes) for row in self.rows if row.elements]
        moving = [Entry(phase, b.line, str(b.home), b.bytes) for b in self.buffers for phase in b.phases if b.bytes]
        return Ledger(self.rank, tuple(rest + moving))


def quantisation(spec: RunSpec) -> dict[str, Any]:
    """What a policy says of a quantised base, nothing of another: its format, and the dtype that its packed weights pass for.
    That is the compute dtype, so that no engine has anything to cast."""
    if not spec.tuning.form:
        return {}
    return {"quantised": {"format": spec.tuning.form, "storage_dtype": spec.precision.compute}}


def merge(rows: Iterable[Row]) -> dict[tuple[str, str, Home], int]:
    """Elements by (line, dtype, home); empty classes are left out."""
    totals: dict[tuple[str, str, Home], int] = {}
    for row in rows:
        if row.elements:
            key = (row.line, row.dtype, row.home)
            totals[key] = totals.get(key, 0) + row.elements
    return totals


def check_census(layout: Layout, measured: Iterable[Row], point: str) -> None:
    """Hold the live tensors of a rank to the layout, to the element.

    Args:
        layout: what the strategy says.
        measured: what `Engine.census()` found.
        point: "load" (after adoption) or "step" (after the first step).

    Raises:
        LayoutDrift: naming each line, dtype and home that differs, with both figures.
    """
    expected, found = merge(layout.at(point)), merge(measured)
    faults = []
    for key in sorted(expected.keys() | found.keys()):
        line, dtype, home = key
        live, told = found.get(key, 0), expected.get(key, 0)
        if live != told:
            apart = format_bytes((live - told) * dtype_bytes(dtype))
            problem = f"{live:,} elements live, {told:,} expected ({apart} apart, after {point})"
            faults.append(Fault(f"rank {layout.rank}, {line} ({dtype}, {home})", problem))
    if faults:
        remedy = "a library version may have changed its tensors: compare with the versions in constraints.txt"
        raise LayoutDrift([*faults[:-1], replace(faults[-1], remedy=remedy)])
