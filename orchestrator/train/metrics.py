"""metrics.jsonl: one line for each optimizer step, and the experiment tracker that is fed from the same lines."""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from orchestrator.errors import ConfigError, Fault


class Tracker(Protocol):
    """Where the numbers of a run go besides its folder."""

    def record(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class _TensorBoard:
    def __init__(self, folder: Path) -> None:
        self._writer = _require("torch.utils.tensorboard", "tensorboard").SummaryWriter(str(folder / "tensorboard"))

    def record(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _WandB:
    def __init__(self, folder: Path) -> None:
        self._run = _require("wandb", "wandb").init(dir=str(folder), name=folder.name)

    def record(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


def _require(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        problem = f"{package} needs the Python package {package!r}, which is not installed"
        raise ConfigError(Fault("logger", problem, f"pip install {package}, or set logger=none")) from None


def open_tracker(kind: str, folder: Path) -> Tracker | None:
    """The tracker that `kind` ("none", "tensorboard" or "wandb") names, writing under `folder`; None for "none".

    Raises:
        ConfigError: its package is missing.
    """
    if kind == "none":
        return None
    return _TensorBoard(folder) if kind == "tensorboard" else _WandB(folder)


class Metrics:
    """Appends lines to `path` and hands their numbers to the tracker."""

    def __init__(self, path: Path, tracker: Tracker | None = None) -> None:
        self._path, self._file = path, path.open("a", encoding="utf-8")
        self._tracker = tracker

    def write(self, line: Mapping[str, Any]) -> None:
        """Append `line` at once, so that another process can follow. Numbers that JSON cannot hold (nan, inf) become null.

        Raises:
            OSError: the disk refuses; it carries the path.
        """
        plain = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in line.items()}
        try:
            self._file.write(json.dumps(plain) + "\n")
            self._file.flush()
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.close()  # it would write what it still holds
            raise OSError(error.errno, error.strerror, str(self._path)) from error
        if self._tracker is not None:
            numbers = {k: float(v) for k, v in plain.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
            self._tracker.record(int(line["step"]), numbers)

    def rewind(self, step: int) -> None:
        """Take the lines after `step` out of the file; see `drop_after`."""
        path = Path(self._file.name)
        self._file.close()
        drop_after(path, step)
        self._file = path.open("a", encoding="utf-8")

    def close(self) -> None:
        self._file.close()
        if self._tracker is not None:
            self._tracker.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file, in order; a last line torn by a crash is left out. Empty where there is no file."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines


def drop_after(path: Path, step: int) -> int:
    """Number of lines of `path` that are later than `step` and were taken out, so that one line stays one step. A last line
    that a crash or a full disk has torn goes too: the next one would be written behind it.

    The file as it was is kept beside it as `metrics.jsonl.bak` (`.bak2`, ... where that exists).
    """
    lines = read_metrics(path)
    kept = [line for line in lines if line["step"] <= step]
    raw = path.read_bytes() if path.exists() else b""
    if len(kept) == raw.count(b"\n") and (not raw or raw.endswith(b"\n")):
        return 0
    backup, number = path.with_name(path.name + ".bak"), 1
    while backup.exists():
        number += 1
        backup = path.with_name(f"{path.name}.bak{number}")
    shutil.copyfile(path, backup)
    fresh = path.with_name(path.name + ".new")
    fresh.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
    fresh.replace(path)  # whoever dies before has lost nothing
    return len(lines) - len(kept)
