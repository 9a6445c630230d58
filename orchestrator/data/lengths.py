"""How long the samples are, and what a limit on their length costs: what is cut, what is padded, what packing saves."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from orchestrator.data.order import drawn, padded
from orchestrator.data.packing import best_fit
from orchestrator.data.prepared import Prepared
from orchestrator.data.rows import rows_of
from orchestrator.data.store import whole_lengths
from orchestrator.spec import Batch
from orchestrator.units import ceil_div

Counts = npt.NDArray[np.int64]

PERCENTILES = (50, 90, 99)


@dataclass(frozen=True, slots=True)
class Limit:
    """What rows cut at `seq_len` come to: `longer` rows are longer, and `lost` tokens of them lie beyond it. `padding` is the
    share of padding in an epoch of unpacked batches; packed, they are `rows` rows that are full to the share `fill`."""

    seq_len: int
    longer: int
    lost: int
    padding: float
    rows: int
    fill: float

    def sentence(self) -> str:
        """One line for a plan."""
        cut = f"{self.longer} rows are longer, {self.lost} of their tokens are cut" if self.longer else "no row is longer"
        saved = f"unpacked {self.padding:.1%} is padding, packed into {self.rows} rows {1 - self.fill:.1%}"
        return f"at seq_len {self.seq_len} {cut}; {saved}"


@dataclass(frozen=True, slots=True)
class Lengths:
    """The lengths of all understood rows before anything was cut, in tokens, with some percentiles and limits."""

    rows: int
    tokens: int
    percentiles: tuple[tuple[int, int], ...]
    longest: int
    limits: tuple[Limit, ...]

    def own(self, seq_len: int) -> Limit:
        """The limit of that seq_len."""
        return next(limit for limit in self.limits if limit.seq_len == seq_len)

    def sentence(self) -> str:
        """One line for a plan."""
        told = ", ".join(f"{share} % up to {length}" for share, length in self.percentiles)
        return f"{self.rows} rows: {told}, longest {self.longest} tokens"


def measure(folder: Path, prepared: Prepared, batch: Batch, seed: int) -> Lengths:
    """The lengths of the prepared data in `folder`, with the limits around its seq_len and that limit itself."""
    whole = whole_lengths(folder).astype(np.int64)
    limits = [
        _limit(whole, size, batch, seed) for size in candidates(prepared.seq_len, int(whole.max())) if size != prepared.seq_len
    ]
    limits.append(_chosen(whole, prepared, batch, seed))
    percentiles = tuple((share, int(np.percentile(whole, share, method="higher"))) for share in PERCENTILES)
    ordered = tuple(sorted(limits, key=lambda limit: limit.seq_len))
    return Lengths(len(whole), int(whole.sum()), percentiles, int(whole.max()), ordered)


def candidates(seq_len: int, longest: int) -> list[int]:
    """Limits worth a look: powers of two from an eighth of `seq_len` to the first that cuts nothing, and itself."""
    powers = [1 << power for power in range(5, 20)]
    enough = next((power for power in powers if power >= longest), powers[-1])
    found = {power for power in powers if seq_len // 8 <= power <= max(enough, seq_len)}
    return sorted({*found, seq_len})


def _limit(whole: Counts, seq_len: int, batch: Batch, seed: int) -> Limit:
    """Rows cut off at `seq_len`."""
    cut = np.minimum(whole, seq_len)
    order = np.random.Generator(np.random.PCG64(seed)).permutation(len(cut))
    starts, _ = best_fit(cut, seq_len)
    rows = len(starts) - 1
    return Limit(
        seq_len, int((whole > seq_len).sum()), int((whole - cut).sum()), _padding(cut[order], batch), rows,
        float(cut.sum()) / (rows * seq_len),
    )  # fmt: skip


def _chosen(whole: Counts, prepared: Prepared, batch: Batch, seed: int) -> Limit:
    """The limit of the run, from the samples that it trains on: they may be split, dropped or weighted."""
    seq_len = prepared.seq_len
    starts, _ = best_fit(prepared.lengths, seq_len)
    rows = rows_of(prepared)
    unpacked = prepared.lengths[np.random.Generator(np.random.PCG64(seed)).permutation(len(prepared))]
    if prepared.packing == "none":
        unpacked = rows.lengths[drawn(rows, seed, 0)]
    continued = int(whole.sum()) - prepared.report.tokens  # pieces repeat one token each, so a split row loses none
    return Limit(
        seq_len, int((whole > seq_len).sum()), max(0, continued), _padding(unpacked, batch), len(starts) - 1,
        float(prepared.lengths.sum()) / ((len(starts) - 1) * seq_len),
    )  # fmt: skip


def _padding(lengths: Counts, batch: Batch) -> float:
    """The share of padding in one epoch of rows of `lengths`, in this order."""
    groups = batch.global_size // batch.micro
    size = batch.global_size
    positions = sum(
        padded(lengths[at * size : (at + 1) * size], batch.micro, groups) for at in range(ceil_div(len(lengths), size))
    )
    return 1 - float(lengths.sum()) / positions


def histogram(folder: Path, bars: int) -> list[tuple[int, int, int]]:
    """(first length, last length, rows) of at most `bars` runs of lengths of one round width; the last may be wider."""
    whole = whole_lengths(folder).astype(np.int64)
    wide = max(1, ceil_div(int(np.percentile(whole, 99)), bars - 1))
    width = next(step for power in range(8) for step in (10**power, 2 * 10**power, 5 * 10**power) if step >= wide)
    counts = np.bincount(np.minimum(whole // width, bars - 1))
    return [
        (place * width, (place + 1) * width - 1 if place < bars - 1 else int(whole.max()), int(count))
        for place, count in enumerate(counts)
    ]
