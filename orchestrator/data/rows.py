"""Rows: what the batches are made of. A row is one document, or several packed together."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from orchestrator.data.packing import best_fit
from orchestrator.data.prepared import Counts, Prepared


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Row r holds the documents members[starts[r] : starts[r + 1]]; `lengths` and `labelled` count its tokens.

    `shares` has (first row, row behind the last, weight) of each run of rows of one weight: no row mixes weights.
    """

    starts: Counts
    members: Counts
    lengths: Counts
    labelled: Counts
    shares: tuple[tuple[int, int, float], ...]

    def __len__(self) -> int:
        return len(self.lengths)

    def documents(self, row: int) -> Counts:
        """The documents of `row`, in the order in which they stand in it."""
        return self.members[self.starts[row] : self.starts[row + 1]]

    def fill(self, seq_len: int) -> float:
        """The share of rows of `seq_len` tokens that holds documents; the rest is padding. 1 where there is no row."""
        return float(self.lengths.sum()) / (len(self) * seq_len) if len(self) else 1.0


@lru_cache(maxsize=8)
def rows_of(prepared: Prepared, split: str = "train") -> Rows:
    """The rows of the "train" or the "eval" split: one for each document, or packed as `prepared.packing` says."""
    documents = prepared.train if split == "train" else prepared.eval
    weight = np.array(prepared.weights)[prepared.source[documents]] if split == "train" else np.ones(len(documents))
    members, sizes, shares = [documents[:0]], [np.zeros(0, np.int64)], []
    made = 0
    for each in dict.fromkeys(weight.tolist()):
        chosen = documents[weight == each]
        starts, order = _arranged(prepared.lengths[chosen], prepared)
        members.append(chosen[order])
        sizes.append(np.diff(starts))
        shares.append((made, made + len(starts) - 1, each))
        made += len(starts) - 1
    together = np.concatenate(members)
    starts = np.concatenate([[0], np.cumsum(np.concatenate(sizes))]).astype(np.int64)
    lengths, labelled = (_sums(counts[together], starts) for counts in (prepared.lengths, prepared.labelled))
    return Rows(starts, together, lengths, labelled, tuple(shares))


def _arranged(lengths: Counts, prepared: Prepared) -> tuple[Counts, Counts]:
    """(where each row starts, the documents in that order)."""
    if prepared.packing == "none":
        return np.arange(len(lengths) + 1), np.arange(len(lengths))
    return best_fit(lengths, prepared.seq_len)


def _sums(values: Counts, starts: Counts) -> Counts:
    """The sum of `values` over each row; no row is empty."""
    return np.add.reduceat(values, starts[:-1]) if len(values) else values
