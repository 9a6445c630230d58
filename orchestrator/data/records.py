"""Rows of a data file, one at a time, whatever the file's format; memory does not grow with the file."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

from orchestrator.errors import DataError, Fault

CHUNK = 1 << 20
"""Characters that are read at once from a JSON list."""

ROWS_AT_ONCE = 256
"""Rows of a table that are decoded at once."""

LONGEST_WORD = 32
"""A decoding error this near to the end of what was read may vanish when more is read (a literal, number or escape cut)."""


@dataclass(frozen=True, slots=True)
class Record:
    """One row: where it stands (line of a text file, row of a table, from 1), and its value or why it cannot be decoded.

    A `line` that is not None is still to be decoded. `share` is how much of the file is read, from 0 to 1.
    """

    place: int
    value: Any
    problem: str = ""
    share: float = 0.0
    line: bytes | None = None


def decoded(record: Record) -> Record:
    """`record` with its line read as JSON; another one as it is."""
    if record.line is None:
        return record
    try:
        return Record(record.place, json.loads(record.line))
    except (ValueError, RecursionError):
        return Record(record.place, None, "not one whole JSON object on the line")


def check_file(path: Path) -> None:
    """Refuse what is not a non-empty file of a known extension.

    Raises:
        DataError: missing, empty, unreadable or unknown.
    """
    known = ", ".join(READERS)
    if not path.exists():
        remedy = "check the spelling, or use data=sample for the built-in set"
        raise DataError(Fault("data.path", f"{path} does not exist", remedy))
    if path.suffix not in READERS:
        raise DataError(Fault("data.path", f"{path.name} has the unknown extension {path.suffix!r}", f"known are {known}"))
    if path.stat().st_size == 0:
        raise DataError(Fault("data.path", f"{path} is empty (0 bytes)", "write it again, or name another file"))
    if not os.access(path, os.R_OK):
        raise DataError(Fault("data.path", f"{path} may not be read by this user", "change its permissions"))


def read_records(path: Path) -> Iterator[Record]:
    """The rows of `path` in file order.

    A line of JSON Lines that is no JSON is a `Record` with a `problem`, because the lines after it can still be read.

    Raises:
        DataError: the file as a whole cannot be read further: truncated, not JSON, not UTF-8, or a corrupt table.
    """
    return map(decoded, read_raw(path))


def read_raw(path: Path) -> Iterator[Record]:
    """As `read_records`, but lines of JSON Lines are left to be decoded, by another process perhaps."""
    check_file(path)
    try:
        yield from READERS[path.suffix](path)
    except UnicodeDecodeError as error:
        problem = f"{path} is not UTF-8 text: byte {error.object[error.start]:#04x} cannot be decoded"
        raise DataError(Fault("data.path", problem, "save it as UTF-8")) from error
    except OSError as error:
        problem = f"{path} cannot be read to its end: {error.strerror or error}"
        raise DataError(Fault("data.path", problem, "check the disk and the file's permissions")) from error


def _read_json(path: Path) -> Iterator[Record]:
    """A `.json` file holds either one list of objects, or one object on each line."""
    with path.open(encoding="utf-8-sig") as text:
        first = next((char for char in iter(lambda: text.read(1), "") if not char.isspace()), "")
    if first == "[":
        with path.open(encoding="utf-8-sig") as text:
            size = max(1, path.stat().st_size)
            for record in _ListReader(path, text).records():
                yield replace(record, share=min(1.0, record.share / size))
    elif first == "{":
        yield from _read_lines(path)
    elif not first:
        raise DataError(Fault("data.path", f"{path} is empty (only white space)", "write it again, or name another file"))
    else:
        remedy = "a .json file is a list of objects, or one object on each line"
        raise DataError(Fault("data.path", f"{path} is not JSON data: it begins with {first!r}", remedy))


def _read_lines(path: Path) -> Iterator[Record]:
    """JSON Lines; blank lines are passed over."""
    for place, line, share in _lines(path):
        yield Record(place, None, share=share, line=line)


def _read_text(path: Path) -> Iterator[Record]:
    """A text file: each line that is not blank is one document."""
    for place, line, share in _lines(path):
        try:
            yield Record(place, {"text": line.decode().rstrip("\r\n")}, share=share)
        except UnicodeDecodeError as error:
            yield Record(place, None, f"not UTF-8 text: byte {line[error.start]:#04x} cannot be decoded", share)


def _lines(path: Path) -> Iterator[tuple[int, bytes, float]]:
    """(number from 1, line, share of the file read) of each line that is not blank."""
    size, read = max(1, path.stat().st_size), 0
    with path.open("rb") as lines:
        for place, line in enumerate(lines, start=1):
            read += len(line)
            if place == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                yield place, line, read / size


class _ListReader:
    """Decodes a JSON list element by element from a text stream, holding one chunk and one element at a time."""

    def __init__(self, path: Path, text: TextIO) -> None:
        self.path, self.text = path, text
        self.buffer, self.position, self.line, self.finished = "", 0, 1, False
        self.decoder = json.JSONDecoder()
        self.consumed = 0

    def records(self) -> Iterator[Record]:
        self._expect("[")
        if self._peek() != "]":
            while True:
                value, line = self._value()
                yield Record(line, value, share=float(self.consumed + self.position))
                if self._peek() != ",":
                    break
                self._expect(",")
        self._expect("]")
        if trailing := self._peek():
            raise self._broken(f"{trailing!r} follows the end of the list on line {self.line}")

    def _refill(self) -> None:
        """Drop what was consumed and read on; each refill reads at least as much as is held, so that a long element
        costs time in proportion to its length."""
        rest = self.buffer[self.position :]
        more = self.text.read(max(CHUNK, len(rest)))
        self.consumed += self.position
        self.buffer, self.position, self.finished = rest + more, 0, not more

    def _peek(self) -> str:
        """The next character that is not white space, or "" at the end of the file."""
        while True:
            while self.position < len(self.buffer):
                char = self.buffer[self.position]
                if char not in " \t\r\n":
                    return char
                self.line += char == "\n"
                self.position += 1
            if self.finished:
                return ""
            self._refill()

    def _expect(self, wanted: str) -> None:
        found = self._peek()
        if found != wanted:
            what = f"{found!r} was found" if found else "the file ends"
            hint = "; the file is truncated" if not found else ""
            raise self._broken(f"{what} on line {self.line} where {wanted!r} or ',' should be{hint}")
        self.position += 1

    def _value(self) -> tuple[Any, int]:
        """The next element and the line that it begins on."""
        if not self._peek():
            raise self._broken(f"the file ends on line {self.line} where an element should begin; it is truncated")
        while True:
            try:
                value, end = self.decoder.raw_decode(self.buffer, self.position)
            except json.JSONDecodeError as error:
                inside_string = error.msg.startswith("Unterminated string")
                if not self.finished and (inside_string or error.pos + LONGEST_WORD >= len(self.buffer)):
                    self._refill()
                    continue
                if inside_string or error.pos >= len(self.buffer.rstrip()):
                    text = f"the file ends inside the element that begins on line {self.line}; it is truncated"
                    raise self._broken(text) from error
                line = self.line + self.buffer.count("\n", self.position, error.pos)
                raise self._broken(f"line {line}: {error.msg[:1].lower()}{error.msg[1:]}") from error
            except RecursionError as error:
                raise self._broken(f"line {self.line}: an element is nested too deeply") from error
            if end == len(self.buffer) and not self.finished:
                self._refill()
                continue
            line = self.line
            self.line += self.buffer.count("\n", self.position, end)
            self.position = end
            return value, line

    def _broken(self, problem: str) -> DataError:
        return DataError(Fault("data.path", f"{self.path} is not valid JSON: {problem}", "mend the file or write it again"))


def _read_parquet(path: Path) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            yield from _table_rows(file.iter_batches(batch_size=ROWS_AT_ONCE), file.metadata.num_rows)
    except (pa.ArrowException, OSError) as error:
        raise _corrupt(path, "Parquet", error) from error


def _read_arrow(path: Path) -> Iterator[Record]:
    """Both Arrow layouts: the file format, and the stream format that `datasets` writes."""
    import pyarrow as pa

    try:
        with pa.memory_map(str(path)) as source:
            if source.read(6) == b"ARROW1":
                file = pa.ipc.open_file(source)
                rows = sum(file.get_batch(index).num_rows for index in range(file.num_record_batches))
                yield from _table_rows((file.get_batch(index) for index in range(file.num_record_batches)), rows)
            else:
                source.seek(0)
                yield from _table_rows(pa.ipc.open_stream(source), 0)
    except (pa.ArrowException, OSError) as error:
        raise _corrupt(path, "Arrow", error) from error


def _table_rows(batches: Any, rows: int) -> Iterator[Record]:
    """The rows of all `batches`; `rows` how many there are, 0 where that is not known."""
    place = 0
    for batch in batches:
        for start in range(0, batch.num_rows, ROWS_AT_ONCE):
            for row in batch.slice(start, ROWS_AT_ONCE).to_pylist():
                place += 1
                yield Record(place, row, share=place / rows if rows else 0.0)


def _corrupt(path: Path, kind: str, error: Exception) -> DataError:
    reason = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
    return DataError(Fault("data.path", f"{path} is not a whole {kind} file: {reason[:200]}", "write the file again"))


READERS: dict[str, Callable[[Path], Iterator[Record]]] = {
    ".json": _read_json,
    ".jsonl": _read_lines,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
    ".txt": _read_text,
}
"""The reader of each file extension."""
