"""Samples on disk: an Arrow file that is written shard by shard and read through a memory map."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from orchestrator.data.encode import Shard

Ids = npt.NDArray[np.int32]

ROWS_FILE, LENGTHS_FILE = "rows.arrow", "lengths.int32"

BATCH_TOKENS = 1 << 21
"""Tokens from which on a record batch is written: 10 MB."""

UNLEARNED = -100
"""Label of a token that is not learned, as `batch.IGNORED`."""


def _arrow(values: npt.NDArray[Any]) -> Any:
    """An Arrow array over the memory of `values`, numbers of one dimension. `pyarrow.array` and `to_numpy` would import pandas
    to ask whether they were given some of it: 0.3 s of each rank's start."""
    import pyarrow as pa

    return pa.Array.from_buffers(pa.from_numpy_dtype(values.dtype), len(values), [None, pa.py_buffer(values)])


class Writer:
    """Writes shards into `folder`; everything is safe on the disk when the context ends."""

    def __init__(self, folder: Path) -> None:
        import pyarrow as pa

        ids, learned = pa.list_(pa.int32()), pa.list_(pa.uint8())
        columns = {"input_ids": ids, "learned": learned, "length": pa.int32(), "labelled": pa.int32()}
        self._schema = pa.schema([*columns.items(), ("source", pa.int16()), ("continued", pa.bool_())])
        self._rows = (folder / ROWS_FILE).open("wb")
        self._lengths = (folder / LENGTHS_FILE).open("wb")
        self._writer = pa.ipc.new_file(self._rows, self._schema)
        self._held: list[tuple[Shard, int]] = []
        self._tokens = 0

    def add(self, shard: Shard, source: int) -> None:
        """Take in the samples of `shard`, which belong to the source of that number."""
        shard.whole.astype("<i4").tofile(self._lengths)
        self._held.append((shard, source))
        self._tokens += len(shard.ids)
        if self._tokens >= BATCH_TOKENS:
            self._flush()

    def _flush(self) -> None:
        import pyarrow as pa

        def whole(name: str) -> Any:
            return np.concatenate([getattr(shard, name) for shard, _ in self._held])

        lengths = whole("lengths")
        if len(lengths):
            starts = _arrow(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
            sources = np.concatenate([np.full(len(shard.lengths), source, np.int16) for shard, source in self._held])
            arrays = [
                pa.ListArray.from_arrays(starts, _arrow(whole("ids"))),
                pa.ListArray.from_arrays(starts, _arrow(whole("learned"))),
                *map(_arrow, (lengths, whole("labelled"), sources)),
                _arrow(whole("continued").astype(np.uint8)).cast(pa.bool_()),
            ]
            self._writer.write_batch(pa.record_batch(arrays, schema=self._schema))
        self._held, self._tokens = [], 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._rows, self._lengths:
            if kind is None:
                if self._held:
                    self._flush()
                self._writer.close()
                for file in (self._rows, self._lengths):
                    file.flush()
                    os.fsync(file.fileno())


class Column:
    """One list column: `column[i]` is sample i as a read-only array that maps the file."""

    def __init__(self, batches: Sequence[Any], name: str) -> None:
        arrays = [batch.column(name) for batch in batches]
        self._values = [np.from_dlpack(array.flatten()) for array in arrays]
        self._starts = [np.from_dlpack(array.offsets) for array in arrays]
        self._firsts = np.cumsum([0, *map(len, arrays)]).tolist()

    def __len__(self) -> int:
        return int(self._firsts[-1])

    def __getitem__(self, row: int) -> npt.NDArray[Any]:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        batch = bisect_right(self._firsts, row) - 1
        place = int(row) - self._firsts[batch]
        starts = self._starts[batch]
        sample: npt.NDArray[Any] = self._values[batch][starts[place] : starts[place + 1]]
        return sample

    def __iter__(self) -> Iterator[npt.NDArray[Any]]:
        return (self[row] for row in range(len(self)))


class Labels:
    """The labels of each sample: its ids where they are learned, else -100."""

    def __init__(self, ids: Column, learned: Column) -> None:
        self._ids, self._learned = ids, learned

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, row: int) -> Ids:
        return np.where(self._learned[row], self._ids[row], np.int32(UNLEARNED))

    def __iter__(self) -> Iterator[Ids]:
        return (self[row] for row in range(len(self)))


class Reader:
    """The columns of a folder that `Writer` has filled."""

    def __init__(self, folder: Path) -> None:
        import pyarrow as pa

        file = pa.ipc.open_file(pa.memory_map(str(folder / ROWS_FILE)))
        self._batches = [file.get_batch(index) for index in range(file.num_record_batches)]
        self.input_ids, learned = Column(self._batches, "input_ids"), Column(self._batches, "learned")
        self.labels = Labels(self.input_ids, learned)

    def numbers(self, name: str) -> npt.NDArray[np.int64]:
        """The column `name`, of one number for each sample, in memory."""
        arrays = [np.from_dlpack(batch.column(name).cast("int64")) for batch in self._batches]
        return np.concatenate(arrays) if arrays else np.zeros(0, np.int64)


def whole_lengths(folder: Path) -> npt.NDArray[np.int32]:
    """Tokens of every row that was understood, before anything was cut, in the order of the files."""
    return np.fromfile(folder / LENGTHS_FILE, dtype="<i4")
