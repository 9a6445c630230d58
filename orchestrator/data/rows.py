"""Rows: what the batches are made of. A row is one document, or several packed together."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from orchestrator.data.packing import best_fit
from orchestrator.data.prepared import Counts, Prepared


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Row r holds the documents members[starts[r] : starts[r + 1]]; `lengths` and `labelled` count its tokens."""

    starts: Counts
    members: Counts
    lengths: Counts
    labelled: Counts

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
    lengths, labelled = prepared.lengths[documents], prepared.labelled[documents]
    if prepared.packing == "none":
        return Rows(np.arange(len(documents) + 1), documents, lengths, labelled)
    starts, members = best_fit(lengths, prepared.seq_len)
    return Rows(starts, documents[members], _sums(lengths[members], starts), _sums(labelled[members], starts))


def _sums(values: Counts, starts: Counts) -> Counts:
    """The sum of `values` over each row; no row is empty."""
    return np.add.reduceat(values, starts[:-1]) if len(values) else values
