"""Where rows come from: files, folders, globs and hub datasets, one source or several with weights."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from orchestrator.data.hub import HubRows, open_hub
from orchestrator.data.records import READERS, Record, check_file, read_raw
from orchestrator.data.tokenizer import SAMPLE
from orchestrator.errors import DataError, Fault
from orchestrator.spec import Data
from orchestrator.spec import Source as Wanted

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
"""owner/name, as the hub writes it."""

PATTERN = re.compile(r"[*?\[]")


@dataclass(frozen=True, slots=True)
class Part:
    """One file, or one split of a hub dataset, of the source of number `source`."""

    source: int
    name: str
    path: Path | None
    hub: HubRows | None
    format: str

    @property
    def size(self) -> int:
        """Bytes; 0 where they are not known before they are read."""
        return self.path.stat().st_size if self.path is not None else 0

    def rows(self) -> Iterator[Record]:
        """The rows of the part, text lines not yet decoded.

        Raises:
            DataError: it cannot be read to its end.
        """
        if self.hub is not None:
            return self.hub.rows()
        assert self.path is not None, "a part is a file or a hub dataset"
        return read_raw(self.path)

    @property
    def place_word(self) -> str:
        """What the places of its rows count."""
        return "line" if self.path is not None and self.path.suffix in (".json", ".jsonl", ".txt") else "row"


def wanted(data: Data) -> tuple[Wanted, ...]:
    """The sources of `data`: data.sources, else data.path, else the built-in sample."""
    return data.sources or (Wanted(data.path or str(SAMPLE / "train.jsonl"), 1.0, data.format),)


def find_parts(data: Data) -> list[Part]:
    """Every part of every source, in the order in which they are read.

    Raises:
        DataError: all that is missing or cannot be read, at once.
    """
    parts: list[Part] = []
    faults: list[Fault] = []
    for number, source in enumerate(wanted(data)):
        try:
            if on_hub(source.path):
                rows = open_hub(source.path, data.subset, data.split, streaming=data.streaming)
                parts.append(Part(number, source.path, None, rows, source.format))
            else:
                parts += [Part(number, str(file), file, None, source.format) for file in _files(source.path)]
        except DataError as error:
            faults += error.faults
    if faults:
        raise DataError(faults)
    return parts


def on_hub(path: str) -> bool:
    """Whether `path` is no file or folder here, but may be the id of a hub dataset."""
    there = Path(path).expanduser()
    return bool(HUB_ID.fullmatch(path)) and not there.exists() and there.suffix not in READERS


def _files(path: str) -> list[Path]:
    """The data files that `path` names, sorted: a file, every file below a folder, or what a pattern matches.

    Raises:
        DataError: there is none, or one cannot be read.
    """
    place = Path(path).expanduser()
    if place.is_dir():
        found = sorted(file for file in place.rglob("*") if file.suffix in READERS and not _hidden(file, place))
        if not found:
            listed = ", ".join(sorted(entry.name for entry in place.iterdir())[:5]) or "nothing"
            problem = f"the folder {place} holds no {', '.join(READERS)} file; it holds {listed}"
            raise DataError(Fault("data.path", problem, "name a file, or the folder that has them"))
    elif place.exists() or not PATTERN.search(path):
        found = [place]
    else:
        root = Path(place.anchor or ".")
        found = sorted(match for match in root.glob(str(place.relative_to(place.anchor))) if match.suffix in READERS)
        if not found:
            raise DataError(Fault("data.path", f"no data file matches {path}", f"known are {', '.join(READERS)}"))
    for file in found:
        check_file(file)
    return found


def _hidden(file: Path, folder: Path) -> bool:
    return any(part.startswith((".", "_")) for part in file.relative_to(folder).parts)
