"""Tokenised samples on disk, as they are used: memory-mapped columns, a split, and a report of what became of the rows."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from orchestrator.errors import DataError, Fault
from orchestrator.spec import Data

Ids = npt.NDArray[np.int32]
Counts = npt.NDArray[np.int64]

ROWS_FILE, REPORT_FILE = "rows.arrow", "report.json"
BATCH_ROWS = 1024
"""Rows of every record batch but the last of `rows.arrow`: row i lies in batch i // BATCH_ROWS."""


@dataclass(frozen=True, slots=True)
class Report:
    """What became of the rows of the file.

    `rows` were read = `malformed` + `unlabelled` + `dropped` + `kept`. `malformed` could not be understood, `unlabelled`
    had no learned token left, `dropped` were longer than seq_len; `truncated` are among the kept. `tokens` and `labelled`
    count those of the kept rows; `longest` is the longest row before truncation, in tokens, and `highest_id` the largest
    token id kept.
    """

    format: str
    rows: int
    kept: int
    malformed: int
    unlabelled: int
    truncated: int
    dropped: int
    tokens: int
    labelled: int
    longest: int
    highest_id: int

    def sentence(self) -> str:
        """One line for the log."""
        parts = [f"{self.rows} rows ({self.format}), {self.kept} kept"]
        for count, word in (
            (self.truncated, "truncated"),
            (self.dropped, "dropped as too long"),
            (self.malformed, "skipped as malformed"),
            (self.unlabelled, "left out as their answer begins after seq_len"),
        ):
            if count:
                parts.append(f"{count} {word}")
        return ", ".join(parts) + f"; {self.tokens} tokens, {self.labelled} learned"


class Column:
    """One list column of `rows.arrow`: `column[i]` is row i as a read-only int32 array that maps the file."""

    def __init__(self, batches: Sequence[Any], name: str) -> None:
        arrays = [batch.column(name) for batch in batches]
        self._values: list[Ids] = [array.flatten().to_numpy(zero_copy_only=True) for array in arrays]
        self._starts: list[Ids] = [array.offsets.to_numpy(zero_copy_only=True) for array in arrays]
        self._length = sum(len(array) for array in arrays)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, row: int) -> Ids:
        if not 0 <= row < self._length:
            raise IndexError(f"row {row} of {self._length}")
        batch, place = divmod(int(row), BATCH_ROWS)
        starts = self._starts[batch]
        return self._values[batch][starts[place] : starts[place + 1]]

    def __iter__(self) -> Iterator[Ids]:
        return (self[row] for row in range(self._length))


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """All kept samples in file order. `labels[i][t]` is `input_ids[i][t]` where position t is learned, else -100.

    `lengths` counts the tokens of each sample, `labelled` its learned ones from position 1 on (nothing predicts position
    0). `train` and `eval` are the ascending indices of the two splits. `digest` names the data, the tokenizer and how
    they were put together, but not the split. `packing` and `seq_len` say how they become rows.
    """

    input_ids: Column
    labels: Column
    lengths: Counts
    labelled: Counts
    train: Counts
    eval: Counts
    digest: str
    report: Report
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
    import pyarrow as pa

    try:
        report = Report(**json.loads((folder / REPORT_FILE).read_text(encoding="utf-8")))
        reader = pa.ipc.open_file(pa.memory_map(str(folder / ROWS_FILE)))
        batches = [reader.get_batch(index) for index in range(reader.num_record_batches)]
        lengths, labelled = (
            np.concatenate([batch.column(name).to_numpy() for batch in batches]).astype(np.int64)
            for name in ("length", "labelled")
        )
    except (OSError, ValueError, TypeError, KeyError) as error:  # pyarrow's own errors derive from these
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        problem = f"{folder} is damaged: {reason[:200]}"
        raise DataError(Fault("data.cache_dir", problem, "delete that folder; it is made anew")) from error
    train, held_out = split(len(lengths), data.eval_fraction, seed)
    columns = Column(batches, "input_ids"), Column(batches, "labels")
    return Prepared(
        *columns, lengths, labelled, train, held_out, digest=folder.name, report=report, packing=data.packing,
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
        raise DataError(Fault("data.tokenizer", problem, "use the tokenizer that belongs to the model"))
