"""Tokenised samples on disk, as they are used: memory-mapped columns, a split, and a report of what became of the rows."""

from __future__ import annotations

import functools
import json
import operator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from orchestrator.data.report import Report
from orchestrator.data.store import Column, Labels, Reader
from orchestrator.errors import DataError, Fault
from orchestrator.spec import Data

Counts = npt.NDArray[np.int64]

REPORT_FILE = "report.json"


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """All kept samples in the order of the sources and their files. `labels[i][t]` is `input_ids[i][t]` where position t is
    learned, else -100.

    `lengths` counts the tokens of each sample, `labelled` its learned ones from position 1 on (nothing predicts position
    0). `train` and `eval` are the ascending indices of the two splits. `digest` names the data, the tokenizer and how
    they were put together, but not the split. `packing` and `seq_len` say how they become rows. Sample i is of the source
    `source[i]`, which has `weights[source[i]]`; `parts` has a report for each source.
    """

    input_ids: Column
    labels: Labels
    lengths: Counts
    labelled: Counts
    train: Counts
    eval: Counts
    digest: str
    report: Report
    source: Counts
    weights: tuple[float, ...] = (1.0,)
    parts: tuple[Report, ...] = ()
    packing: str = "none"
    seq_len: int = 0

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def eval_labelled(self) -> int:
        """Learned tokens of the whole held-out split: what its loss sum is divided by."""
        return int(self.labelled[self.eval].sum())


def open_prepared(folder: Path, data: Data, seed: int) -> Prepared:
    """The prepared samples of `data` in `folder`, split by `seed`.

    Raises:
        DataError: the folder is damaged, or the split would leave no sample on one side.
    """
    try:
        parts = tuple(Report(**part) for part in json.loads((folder / REPORT_FILE).read_text(encoding="utf-8")))
        reader = Reader(folder)
        lengths, labelled, source, continued = map(reader.numbers, ("length", "labelled", "source", "continued"))
    except (OSError, ValueError, TypeError, KeyError) as error:  # pyarrow's own errors derive from these
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        problem = f"{folder} is damaged: {reason[:200]}"
        raise DataError(Fault("data.cache_dir", problem, "delete that folder; it is made anew")) from error
    row = np.cumsum(continued == 0) - 1  # the pieces of one row stay on one side
    on_train = np.zeros(int(row[-1]) + 1, dtype=np.bool_)
    on_train[split(len(on_train), data.eval_fraction, seed)[0]] = True
    train, held_out = np.flatnonzero(on_train[row]), np.flatnonzero(~on_train[row])
    return Prepared(
        reader.input_ids, reader.labels, lengths, labelled, train, held_out, digest=folder.name,
        report=functools.reduce(operator.add, parts), source=source,
        weights=tuple(each.weight for each in data.sources) or (1.0,), parts=parts, packing=data.packing,
        seq_len=data.seq_len,
    )  # fmt: skip


def split(samples: int, eval_fraction: float, seed: int) -> tuple[Counts, Counts]:
    """Ascending indices (train, held out); a fraction above 0 holds out at least one sample.

    Raises:
        DataError: no sample would be left to learn from.
    """
    held_out = max(1, round(samples * eval_fraction)) if eval_fraction > 0 else 0
    if held_out >= samples:
        problem = f"holding out {eval_fraction:g} of {samples} samples leaves none to learn from"
        raise DataError(Fault("data.eval_fraction", problem, "lower it, or set it to 0"))
    order = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, 0x5E1D]))).permutation(samples)
    return np.sort(order[held_out:]).astype(np.int64), np.sort(order[:held_out]).astype(np.int64)


def check_vocabulary(prepared: Prepared, vocab_size: int) -> None:
    """Pass if every token id is a row of an embedding of `vocab_size` rows.

    Raises:
        DataError: an id lies outside.
    """
    highest = prepared.report.highest_id
    if highest >= vocab_size:
        problem = f"the data holds token id {highest}, but the model has vocab_size {vocab_size} (ids 0 to {vocab_size - 1})"
        raise DataError(
            Fault(
                "data.tokenizer",
                problem,
                f"use the tokenizer that belongs to the model, or for random weights model.vocab_size={highest + 1}",
            )
        )
