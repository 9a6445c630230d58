"""From data files to tokenised samples on disk: once, in one pass, in memory that does not grow with the files."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.data.chat import Chat, open_chat, resolve_template
from orchestrator.data.conversation import EXPECTED, PASSAGES, Malformed, detect_format
from orchestrator.data.crew import WORTH_PROCESSES, crew_size, encode_all
from orchestrator.data.encode import Chunk, Encoder
from orchestrator.data.prepared import REPORT_FILE, Prepared, open_prepared
from orchestrator.data.records import Record, decoded
from orchestrator.data.report import Report
from orchestrator.data.sources import Part, find_parts, on_hub, wanted
from orchestrator.data.store import Writer
from orchestrator.data.tally import Tally, check
from orchestrator.data.tokenizer import tokenizer_digest
from orchestrator.errors import DataError, Fault
from orchestrator.spec import Data

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VERSION = 2
"""Raise it when the same inputs come to give other rows, so that old caches are not taken for new ones."""

SNIFFED_ROWS = 32
"""Rows whose columns decide the format under data.format=auto."""

CHUNK_ROWS, CHUNK_BYTES = 256, 1 << 19
"""A chunk of rows ends when it has this many, or when they take up about this many bytes of their file."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far tokenising has come: `share` of the data from 0 to 1 (0 where its size is not known), tokens, seconds."""

    share: float
    tokens: int
    seconds: float


OnProgress = Callable[[Progress], None]


def cache_folder() -> Path:
    """Where tokenised data is kept between runs, where data.cache_dir says nothing."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "orchestrator" / "data"


def prepared_folder(data: Data, prepared: Prepared) -> Path:
    """Where `prepared`, made from `data`, lies."""
    return (Path(data.cache_dir).expanduser() if data.cache_dir else cache_folder()) / prepared.digest


def is_quick(data: Data, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether `prepare` would answer in seconds: the data is at hand, and it is little or was prepared before.

    Raises:
        DataError: a file is missing or cannot be read.
    """
    if any(on_hub(source.path) for source in wanted(data)):
        return False
    parts = find_parts(data)
    if sum(part.size for part in parts) < WORTH_PROCESSES:
        return True
    cache_dir = Path(data.cache_dir).expanduser() if data.cache_dir else cache_folder()
    return (cache_dir / _digest(parts, data, tokenizer, cache_dir)).is_dir()


def prepare(
    data: Data,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    cache_dir: Path,
    on_progress: OnProgress = lambda progress: None,
) -> Prepared:
    """The tokenised samples of `data`, from `cache_dir` if they were made before, else made and written there.

    Any rank may call it at any time: the folder appears whole or not at all. A second call costs a look at the files' sizes
    and times, and a memory map. `data.cache_dir`, where set, goes before `cache_dir`.

    Raises:
        DataError: a file, its rows, the tokenizer or the template cannot be used; nothing is written then.
    """
    parts = find_parts(data)
    cache_dir = Path(data.cache_dir).expanduser() if data.cache_dir else cache_dir
    try:
        folder = cache_dir / _digest(parts, data, tokenizer, cache_dir)
        if not folder.is_dir():
            _Preparation(parts, data, tokenizer, on_progress).write(folder)
    except OSError as error:
        problem = f"{error.filename or cache_dir}: {error.strerror or error}"
        remedy = "free room there, or set data.cache_dir to a folder that can be written and has room"
        raise DataError(Fault("data.cache_dir", problem, remedy)) from error
    return open_prepared(folder, data, seed)


def _digest(parts: list[Part], data: Data, tokenizer: PreTrainedTokenizerBase, cache_dir: Path) -> str:
    """The name of the contents, of the tokenizer and of the rules; weights, packing and the split come after."""
    contents = [[part.source, part.format, _contents(part, cache_dir)] for part in parts]
    template = data.chat_template and resolve_template(data.chat_template, tokenizer)
    rules = [data.seq_len, data.on_long, data.on_malformed, data.max_rows]
    named = json.dumps([VERSION, contents, tokenizer_digest(tokenizer), template, rules])
    return hashlib.sha256(named.encode()).hexdigest()[:32]


def _contents(part: Part, cache_dir: Path) -> str:
    """SHA-256 of the file's contents, remembered under its name, size and time so that large files are hashed once."""
    if part.hub is not None:
        return json.dumps([part.hub.path, part.hub.subset, part.hub.split, part.hub.revision])
    assert part.path is not None, "a part is a file or a hub dataset"
    stat = part.path.stat()
    key = json.dumps([str(part.path.resolve()), stat.st_size, stat.st_mtime_ns])
    note = cache_dir / "fingerprints" / hashlib.sha256(key.encode()).hexdigest()[:32]
    if note.is_file() and len(known := note.read_text()) == 64:
        return known
    with part.path.open("rb") as file:
        content = hashlib.file_digest(file, "sha256").hexdigest()
    note.parent.mkdir(parents=True, exist_ok=True)
    draft = note.with_name(f"{note.name}.{uuid.uuid4().hex}")
    draft.write_text(content)
    draft.replace(note)
    return content


class _Preparation:
    """One pass over all parts."""

    def __init__(self, parts: list[Part], data: Data, tokenizer: PreTrainedTokenizerBase, on_progress: OnProgress) -> None:
        self.parts, self.data, self.tokenizer, self.on_progress = parts, data, tokenizer, on_progress
        self.tallies: dict[int, Tally] = {}
        self.faults: list[Fault] = []

    def write(self, target: Path) -> None:
        """Tokenise into the new folder `target`, which appears by a rename when it is complete.

        Raises:
            DataError: all that is wrong with the data, at once.
        """
        kinds = [self._kind(part) for part in self.parts]
        check([], self.data, self.faults)
        chat = self._chat(kinds)
        encoder = Encoder(self.tokenizer, chat, self.data.seq_len, self.data.on_long)
        if encoder.end is None:
            problem = "the tokenizer has no end token (eos)"
            raise DataError(Fault("data.tokenizer", problem, "name one in tokenizer_config.json"))
        draft = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
        draft.mkdir(parents=True)
        try:
            self._tokenise(encoder, kinds, draft)
            check(list(self.tallies.values()), self.data, self.faults)
            sources = [Report("") for _ in wanted(self.data)]
            for number, tally in self.tallies.items():
                sources[self.parts[number].source] += tally.report
            (draft / REPORT_FILE).write_text(json.dumps([asdict(report) for report in sources], indent=1), encoding="utf-8")
            _publish(draft, target)
        finally:
            shutil.rmtree(draft, ignore_errors=True)

    def _kind(self, part: Part) -> str:
        """The format of `part`: as told, else by the columns that its first rows have between them."""
        if part.format != "auto":
            return part.format
        try:
            return _sniffed(part)
        except DataError as error:
            self.faults += error.faults
            return ""

    def _chat(self, kinds: list[str]) -> Chat | None:
        """The chat template, where a row may need one: completions may be lists of turns."""
        needed = any(kind not in PASSAGES for kind in kinds)
        if not needed and ("completion" not in kinds or self.tokenizer.chat_template is None):
            return None
        return open_chat(self.tokenizer, resolve_template(self.data.chat_template, self.tokenizer))

    def _tokenise(self, encoder: Encoder, kinds: list[str], draft: Path) -> None:
        sizes = [part.size for part in self.parts]
        began, tokens = time.perf_counter(), 0
        processes = crew_size(self.data.workers, sum(sizes))
        with Writer(draft) as writer:
            for shard in encode_all(encoder, self._chunks(kinds), processes):
                self.tallies[shard.file].add(shard)
                writer.add(shard, self.parts[shard.file].source)
                tokens += len(shard.ids)
                done = sum(sizes[: shard.file]) + shard.share * sizes[shard.file]
                share = done / sum(sizes) if sum(sizes) else shard.share
                self.on_progress(Progress(share, tokens, time.perf_counter() - began))

    def _chunks(self, kinds: list[str]) -> Iterator[Chunk]:
        """Every row of every part. A part that cannot be read to its end becomes a fault, and the next one is read."""
        left = {part.source: self.data.max_rows for part in self.parts}
        for number, (part, kind) in enumerate(zip(self.parts, kinds, strict=True)):
            if left[part.source] == 0:
                continue
            self.tallies[number] = Tally(part.name, kind, part.place_word)
            rows = part.rows()
            try:
                while chunk := _take(rows, left[part.source], part.size):
                    if (rest := left[part.source]) is not None:
                        left[part.source] = rest - len(chunk)
                    yield Chunk(number, kind, chunk, chunk[-1].share)
            except DataError as error:
                self.faults += error.faults


def _take(rows: Iterator[Record], most: int | None, size: int) -> list[Record]:
    """The next rows of a part of `size` bytes, enough for a chunk; none at the end."""
    chunk: list[Record] = []
    for row in islice(rows, CHUNK_ROWS if most is None else min(CHUNK_ROWS, most)):
        chunk.append(row)
        if (row.share - chunk[0].share) * size >= CHUNK_BYTES:
            break
    return chunk


def _sniffed(part: Part) -> str:
    """The format by the columns that the first rows have between them.

    Raises:
        DataError: there is no row, they cannot be read, or the columns are of no format.
    """
    head = [decoded(record) for record in islice(part.rows(), SNIFFED_ROWS)]
    rows = [record.value for record in head if isinstance(record.value, dict)]
    if not head:
        raise DataError(Fault("data.path", f"{part.name} holds no row", "write it again, or name another file"))
    if not rows:
        problem = f"none of the first {len(head)} rows of {part.name} is a JSON object"
        raise DataError(Fault("data.path", problem, f"write one object for each sample, with the fields of {EXPECTED}"))
    try:
        return detect_format(sorted({str(name) for row in rows for name, value in row.items() if value is not None}))
    except Malformed as error:
        remedy = f"give the fields of one of: {EXPECTED}"
        raise DataError(Fault("data.format", f"{part.name}: {error}", remedy)) from error


def _publish(draft: Path, target: Path) -> None:
    """Rename `draft` to `target`, unless another rank was first."""
    try:
        draft.rename(target)
    except OSError:
        if not target.is_dir():
            raise
