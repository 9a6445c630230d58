"""From a data file to tokenised samples on disk: once, in one pass, in memory that does not grow with the file."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.data.batch import IGNORED
from orchestrator.data.chat import Chat, open_chat, resolve_template
from orchestrator.data.conversation import EXPECTED, Malformed, detect_format, read_conversation
from orchestrator.data.prepared import BATCH_ROWS, REPORT_FILE, ROWS_FILE, Prepared, open_prepared
from orchestrator.data.records import Record, check_file, read_records
from orchestrator.data.tally import Tally
from orchestrator.data.tokenizer import SAMPLE, tokenizer_digest
from orchestrator.errors import DataError, Fault
from orchestrator.spec import Data

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VERSION = 1
"""Raise it when the same inputs come to give other rows, so that old caches are not taken for new ones."""

SNIFFED_ROWS = 32
"""Rows whose columns decide the format under data.format=auto."""


def prepare(data: Data, tokenizer: PreTrainedTokenizerBase, seed: int, cache_dir: Path) -> Prepared:
    """The tokenised samples of `data`, from `cache_dir` if they were made before, else made and written there.

    Any rank may call it at any time: the folder appears whole or not at all. A second call costs a look at the file's size
    and time, and a memory map. `data.cache_dir`, where set, goes before `cache_dir`.

    Raises:
        DataError: the file, its rows, the tokenizer or the template cannot be used; nothing is written then.
    """
    path = Path(data.path).expanduser() if data.path else SAMPLE / "train.jsonl"
    check_file(path)
    cache_dir = Path(data.cache_dir).expanduser() if data.cache_dir else cache_dir
    template = resolve_template(data.chat_template, tokenizer)
    try:
        content = _fingerprint(path, cache_dir)
        digest = _digest(content, tokenizer_digest(tokenizer), template, data)
        if not (cache_dir / digest).is_dir():
            _build(path, data, open_chat(tokenizer, template), cache_dir / digest)
    except OSError as error:
        problem = f"{error.filename or cache_dir}: {error.strerror or error}"
        remedy = "set data.cache_dir to a folder that can be written and has room"
        raise DataError(Fault("data.cache_dir", problem, remedy)) from error
    return open_prepared(cache_dir / digest, data, seed)


def _digest(content: str, tokenizer: str, template: str, data: Data) -> str:
    parts = [VERSION, content, tokenizer, template, data.seq_len, data.format, data.on_long, data.on_malformed]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _fingerprint(path: Path, cache_dir: Path) -> str:
    """SHA-256 of the file's contents, remembered under its name, size and time so that large files are hashed once."""
    stat = path.stat()
    key = json.dumps([str(path.resolve()), stat.st_size, stat.st_mtime_ns])
    note = cache_dir / "fingerprints" / hashlib.sha256(key.encode()).hexdigest()[:32]
    if note.is_file() and len(known := note.read_text()) == 64:
        return known
    with path.open("rb") as file:
        content = hashlib.file_digest(file, "sha256").hexdigest()
    note.parent.mkdir(parents=True, exist_ok=True)
    draft = note.with_name(f"{note.name}.{uuid.uuid4().hex}")
    draft.write_text(content)
    draft.replace(note)
    return content


def _build(path: Path, data: Data, chat: Chat, target: Path) -> None:
    """Tokenise `path` into the new folder `target`, which appears by a rename when it is complete."""
    records = read_records(path)
    head = list(islice(records, SNIFFED_ROWS))
    kind = _format(path, head) if data.format == "auto" else data.format
    draft = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    draft.mkdir(parents=True)
    try:
        tally = Tally()
        _write_rows(draft / ROWS_FILE, _samples(chain(head, records), kind, data, chat, tally))
        tally.check(path, data)
        (draft / REPORT_FILE).write_text(json.dumps(asdict(tally.report(kind)), indent=1), encoding="utf-8")
        _publish(draft, target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _publish(draft: Path, target: Path) -> None:
    """Rename `draft` to `target`, unless another rank was first."""
    try:
        draft.rename(target)
    except OSError:
        if not target.is_dir():
            raise


def _format(path: Path, head: list[Record]) -> str:
    """The format by the columns that the first rows have between them."""
    if not head:
        raise DataError(Fault("data.path", f"{path} holds no row", "write it again, or name another file"))
    rows = [record.value for record in head if isinstance(record.value, dict)]
    if not rows:
        problem = f"none of the first {len(head)} rows of {path} is a JSON object"
        raise DataError(Fault("data.path", problem, f"write one object for each sample, with the fields of {EXPECTED}"))
    try:
        return detect_format(sorted({str(name) for row in rows for name, value in row.items() if value is not None}))
    except Malformed as error:
        remedy = f"give the fields of one of: {EXPECTED}"
        raise DataError(Fault("data.format", f"{path}: {error}", remedy)) from error


def _samples(
    records: Iterable[Record], kind: str, data: Data, chat: Chat, tally: Tally
) -> Iterator[tuple[list[int], list[int]]]:
    """(input_ids, labels) of the rows that are kept. Once the file is known to be refused, rows are only checked."""
    for record in records:
        tally.rows += 1
        try:
            if record.problem:
                raise Malformed(record.problem)
            conversation = read_conversation(record.value, kind)
            if tally.malformed and data.on_malformed == "refuse":
                continue
            ids, learned = chat.encode(conversation)
        except Malformed as error:
            tally.refuse(str(error), record.place)
            continue
        tally.longest = max(tally.longest, len(ids))
        long = len(ids) > data.seq_len
        if long and data.on_long == "drop":
            tally.dropped += 1
            continue
        ids, learned = ids[: data.seq_len], learned[: data.seq_len]
        count = sum(learned[1:])
        if not count:
            tally.unlabelled.add(record.place)
            continue
        tally.keep(ids, count, truncated=long)
        yield ids, [token if flag else IGNORED for token, flag in zip(ids, learned, strict=True)]


def _write_rows(path: Path, samples: Iterator[tuple[list[int], list[int]]]) -> None:
    """Write the samples as one Arrow file of record batches of `BATCH_ROWS` rows, safe on the disk when it returns."""
    import pyarrow as pa

    ids = pa.list_(pa.int32())
    schema = pa.schema([("input_ids", ids), ("labels", ids), ("length", pa.int32()), ("labelled", pa.int32())])
    with path.open("wb") as file:
        with pa.ipc.new_file(file, schema) as writer:
            while rows := list(islice(samples, BATCH_ROWS)):
                columns: list[Any] = [
                    [row[0] for row in rows],
                    [row[1] for row in rows],
                    [len(row[0]) for row in rows],
                    [sum(label != IGNORED for label in row[1][1:]) for row in rows],
                ]
                arrays = [pa.array(values, kind) for values, kind in zip(columns, schema.types, strict=True)]
                writer.write_batch(pa.record_batch(arrays, schema=schema))
        file.flush()
        os.fsync(file.fileno())
