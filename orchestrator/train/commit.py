"""What makes a folder a checkpoint: every file on the disk, known by its SHA-256, and one rename at the end.

The ranks write into `.tmp-step-000050`. When all have flushed their files, rank 0 writes checkpoint.json, which lists them all
with their sizes and SHA-256, then COMMITTED, which holds the SHA-256 of checkpoint.json, and then gives the folder its name.
Whatever lacks a part of that chain is no checkpoint, and nothing but the chain is asked: no file says which is the latest.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DOCUMENT = "checkpoint.json"
COMMITTED = "COMMITTED"
HASHERS = 4
"""Files that one rank reads at once to verify them; hashlib works without the interpreter's lock."""

_STEP = re.compile(r"step-(\d{6,})")
_UNFINISHED, _REPLACED, _REMOVED = ".tmp-", ".replaced-", ".removed-"


@dataclass(frozen=True, slots=True)
class Stored:
    """A file of a checkpoint: its length and the SHA-256 of its contents."""

    bytes: int
    sha256: str


def flush(path: Path) -> None:
    """Flush a file or a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def stored(path: Path) -> Stored:
    """The size and SHA-256 of the file at `path`."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return Stored(file.tell(), digest)


def temporary_of(final: Path) -> Path:
    """Where the checkpoint `final` is written before it has its name."""
    return final.with_name(_UNFINISHED + final.name)


def publish(final: Path, document: Mapping[str, Any], files: Mapping[str, Stored]) -> None:
    """Make a checkpoint of the files that lie flushed in the temporary folder of `final`.

    A checkpoint of the same step that is there already, after a resume, is kept aside until the new one has its name, and
    `recover` gives it back should the process die in between.

    Raises:
        OSError: it cannot be written; the temporary folder is still there.
    """
    temporary, replaced = temporary_of(final), final.with_name(_REPLACED + final.name)
    listed = {name: {"bytes": file.bytes, "sha256": file.sha256} for name, file in sorted(files.items())}
    text = json.dumps({**document, "files": listed}, indent=2) + "\n"
    for name, content in ((DOCUMENT, text), (COMMITTED, hashlib.sha256(text.encode()).hexdigest() + "\n")):
        (temporary / name).write_text(content, encoding="utf-8")
        flush(temporary / name)
    flush(temporary)
    if final.exists():
        final.rename(replaced)
    temporary.rename(final)
    flush(final.parent)
    if replaced.exists():
        remove(replaced)


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint, so that no moment shows a part of it under its name."""
    if checkpoint.is_symlink():  # what somebody keeps elsewhere stays there
        checkpoint.unlink()
        return
    doomed = checkpoint.with_name(_REMOVED + checkpoint.name.lstrip("."))
    checkpoint.rename(doomed)
    shutil.rmtree(doomed)


def recover(checkpoints: Path) -> None:
    """Take away what saves and removals that were cut short have left; give back what one had put aside.

    Raises:
        OSError: something cannot be removed.
    """
    for aside in checkpoints.glob(f"{_REPLACED}step-*"):
        final = aside.with_name(aside.name.removeprefix(_REPLACED))
        if committed(final):
            remove(aside)
        else:
            shutil.rmtree(final, ignore_errors=True)
            aside.rename(final)
    for prefix in (_UNFINISHED, _REMOVED):
        for stale in checkpoints.glob(f"{prefix}*"):
            if stale.is_symlink():
                stale.unlink()
            else:
                shutil.rmtree(stale)


def committed(checkpoint: Path) -> bool:
    """Whether `checkpoint` was finished and its list of files is the one that was committed. Files are not looked at."""
    try:
        return (checkpoint / COMMITTED).read_bytes() == f"{stored(checkpoint / DOCUMENT).sha256}\n".encode()
    except OSError:
        return False


def is_named(path: Path) -> bool:
    """Whether `path` has the name of a checkpoint, be it sound or not."""
    return _STEP.fullmatch(path.name) is not None


def named_steps(checkpoints: Path) -> list[Path]:
    """What has the name of a checkpoint under `checkpoints`, sound or damaged, oldest step first.

    One that was put aside for a new one of the same step counts where the process died before that had its name.
    """
    if not checkpoints.is_dir():
        return []
    found: dict[int, Path] = {}
    for path in checkpoints.iterdir():
        match = _STEP.fullmatch(path.name.removeprefix(_REPLACED))
        if match and (int(match[1]) not in found or is_named(path)):
            found[int(match[1])] = path
    return [found[step] for step in sorted(found)]


def saved_steps(checkpoints: Path) -> list[Path]:
    """The committed checkpoints under `checkpoints`, oldest step first."""
    return [path for path in named_steps(checkpoints) if committed(path)]


def inside(name: object) -> bool:
    """Whether `name`, read from a file, is that of a file in the same folder: none above it, beside it or elsewhere."""
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\\\0")


def _problem(checkpoint: Path, name: str, listed: Mapping[str, Any]) -> str | None:
    path = checkpoint / name
    try:
        if not inside(name) or path.is_symlink():
            return f"{name} is no file of its own folder"
        size = path.stat().st_size
        if size != listed["bytes"]:
            return f"{name} has {size} bytes, {listed['bytes']} were saved"
        if stored(path).sha256 != listed["sha256"]:
            return f"{name} is not what was saved: its SHA-256 differs"
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read: {error.strerror}"
    return None


def problems(checkpoint: Path, rank: int = 0, ranks: int = 1) -> Iterator[str]:
    """What is wrong with the files of `checkpoint`, each named, found by reading all of them.

    Of `ranks` processes that call it each reads its part, largest files first.
    """
    if not committed(checkpoint):
        yield f"its {DOCUMENT} is not the one that was committed"
        return
    try:
        files: Mapping[str, Mapping[str, Any]] = json.loads((checkpoint / DOCUMENT).read_text(encoding="utf-8")).get(
            "files", {}
        )
        names: Sequence[str] = sorted(files, key=lambda name: (-files[name]["bytes"], name))[rank::ranks]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        yield f"its {DOCUMENT} does not list its files"
        return
    with ThreadPoolExecutor(HASHERS) as pool:
        found = pool.map(lambda name: _problem(checkpoint, name, files[name]), names)
        yield from (problem for problem in found if problem is not None)
