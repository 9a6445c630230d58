"""The folder of one job on a local disk, and what dead jobs have left beside it.

A job's folder carries an owner's mark and a lock that each of its ranks shares while it lives; the kernel drops the lock with
the process, however that ends. So a folder whose lock can be had alone belongs to nobody.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

PREFIX = "orchestrator-swap-"
MARK, LOCK = "owner.json", "lock"


@dataclass(frozen=True, slots=True)
class SwapFolder:
    """This rank's share in its job's folder `path`."""

    path: Path
    lock: IO[str]

    def release(self) -> None:
        """Let go of the folder; the last rank of this machine removes it."""
        with suppress(BlockingIOError):
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(self.path, ignore_errors=True)
            with suppress(OSError):  # others swap beside it
                self.path.parent.rmdir()
        self.lock.close()


def claim(parent: Path, job: str) -> SwapFolder:
    """The folder of `job` in `parent`, made if need be; every rank of a job claims it.

    Raises:
        OSError: it cannot be made.
    """
    path = parent / f"{PREFIX}{job}"
    path.mkdir(parents=True, exist_ok=True)
    lock = (path / LOCK).open("a")
    fcntl.flock(lock, fcntl.LOCK_SH)
    with suppress(FileExistsError), (path / MARK).open("x") as mark:
        json.dump({"host": socket.gethostname(), "pid": os.getpid()}, mark)
    return SwapFolder(path, lock)


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _host(folder: Path) -> str:
    """The machine on which the folder was made; empty where it carries no mark, as before its owner has locked it."""
    try:
        return str(json.loads((folder / MARK).read_text(encoding="utf-8")).get("host", ""))
    except (OSError, ValueError):
        return ""


def sweep(parent: Path) -> list[tuple[Path, int]]:
    """(folder, bytes) of every job's folder in `parent` that no process of this machine holds any more; they are gone now."""
    removed = []
    for folder in sorted(parent.glob(f"{PREFIX}*")):
        if _host(folder) != socket.gethostname():
            continue
        with suppress(OSError), (folder / LOCK).open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            removed.append((folder, _size(folder)))
            shutil.rmtree(folder)
    return removed
