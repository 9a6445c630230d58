"""Resuming: any run of any saved tensor, whoever wrote it, whatever the number of ranks was."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from orchestrator.engine.protocol import Engine, Piece
from orchestrator.errors import CheckpointError, Fault
from orchestrator.train import commit
from orchestrator.train.checkpoint import FORMAT, key_of
from orchestrator.train.world import World

_SHOWN = 5

COURSE = {
    "data": "the data, its tokenizer or data.seq_len is not what the checkpoint was made with: it goes on in the new samples",
    "data.eval_fraction": "data.eval_fraction was {saved} and is {now}: samples that are held out now may have been learned",
    "batch.global_size": "batch.global_size was {saved} and is {now}: samples of this epoch may come twice or not at all",
}
"""What to say of each part of `Moment.course` that a resumed run has changed."""


@dataclass(frozen=True, slots=True)
class _Place:
    """A saved piece: elements [start, stop) of the flattened tensor, or `columns` of rows of `width` from `start` on, which
    end before `stop`."""

    start: int
    stop: int
    file: str
    key: str
    columns: tuple[int, int] | None = None


def _read_document(path: Path) -> dict[str, Any]:
    try:
        document = json.loads((path / commit.DOCUMENT).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        problem = f"{path} is not a checkpoint: its checkpoint.json cannot be read ({error})"
        raise CheckpointError(Fault("resume", problem, "name another checkpoint of the run")) from None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        found = document.get("format") if isinstance(document, dict) else "?"
        problem = f"{path} has format {found}, this version reads {FORMAT}"
        raise CheckpointError(Fault("resume", problem, "resume it with the version that wrote it"))
    return document


class Reader:
    """A checkpoint opened for reading. Tensors stay on the disk until `read` takes a slice of them.

    Raises:
        CheckpointError: `path` is not a checkpoint, or the files of a rank are missing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        document = _read_document(path)
        try:
            self.step, self.epoch, self.ranks = int(document["step"]), int(document["epoch"]), int(document["ranks"])
            self.seed: int = int(document["seed"])
            self.about: Mapping[str, Any] = dict(document["about"])
            self.course: Mapping[str, Any] = dict(document.get("course", {}))
            self.scalars: dict[str, float] = {name: float(value) for name, value in document["scalars"].items()}
            self.bytes: int = int(document["bytes"])
            health = document.get("health", {})
            losses = [[int(step), float(loss)] for step, loss in health.get("losses", ())]
            self.health: Mapping[str, Any] = {"losses": losses, "skipped": [int(step) for step in health.get("skipped", ())]}
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise self._broken(f"its {commit.DOCUMENT} lacks what every checkpoint states ({error!r})") from None
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._places: dict[tuple[str, str], list[_Place]] = {}
        self._files: dict[str, Any] = {}
        for rank in range(self.ranks):
            self._merge(f"rank-{rank:05d}.json")
        for places in self._places.values():
            places.sort(key=lambda place: place.start)
        missing = sorted({p.file for places in self._places.values() for p in places if not (path / p.file).is_file()})
        if missing:
            raise self._broken(f"{len(missing)} of its files are missing: {', '.join(missing[:_SHOWN])}")

    def _broken(self, problem: str) -> CheckpointError:
        return CheckpointError(
            Fault("resume", f"{self.path} is incomplete: {problem}", "resume from another checkpoint of the run")
        )

    def _merge(self, name: str) -> None:
        try:
            index = json.loads((self.path / name).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            raise self._broken(f"{name} cannot be read, and {self.ranks} ranks wrote it") from None
        try:
            self._place(index)
        except (ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError) as error:
            raise self._broken(f"{name} is no index of pieces ({error!r})") from None

    def _place(self, index: Mapping[str, Any]) -> None:
        """Take in where the pieces of one rank lie."""
        self.shapes.update({tensor: tuple(shape) for tensor, shape in index["shapes"].items()})
        for piece in index["pieces"]:
            if not commit.inside(piece["file"]):
                raise ValueError(f"{piece['file']!r} is no file of its folder")
            start, length, file = piece["start"], piece["length"], piece["file"]
            key = key_of(piece["name"], piece["kind"], start)
            place = _Place(start, start + length, file, key)
            if "columns" in piece:
                first, last = piece["columns"]
                width = math.prod(self.shapes[piece["name"]][1:])
                place = _Place(start, start - first + length // (last - first) * width, file, key, (first, last))
            self._places.setdefault((piece["name"], piece["kind"]), []).append(place)

    def _slice(self, place: _Place, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of the saved piece itself."""
        try:
            if place.file not in self._files:
                self._files[place.file] = safe_open(self.path / place.file, framework="pt", device="cpu")
            part: torch.Tensor = self._files[place.file].get_slice(place.key)[start:stop]
        except SafetensorError as error:
            raise self._broken(f"{place.file} does not hold what its index says ({error})") from None
        return part

    def _from_columns(self, name: str, places: Sequence[_Place], start: int, stop: int) -> torch.Tensor | None:
        """Elements [start, stop) of a tensor that was saved by columns; None where some are in no piece."""
        width = math.prod(self.shapes[name][1:])
        above, below = start // width, -(-stop // width)
        rows, found = torch.empty(below - above, width), 0
        for place in places:
            assert place.columns is not None, "a tensor is saved by columns on every rank or on none"
            first, wide = place.columns[0], place.columns[1] - place.columns[0]
            top = (place.start - first) // width
            low, high = max(above, top), min(below, place.stop // width)
            if low < high:
                part = self._slice(place, (low - top) * wide, (high - top) * wide).view(-1, wide)
                rows[low - above : high - above, slice(*place.columns)] = part
                found += part.numel()
        return rows.reshape(-1)[start - above * width : stop - above * width] if found == rows.numel() else None

    def read(self, name: str, kind: str, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of the flattened tensor `name` of `kind`, one-dimensional, on the CPU, as saved.

        Raises:
            CheckpointError: the checkpoint does not hold all of them.
        """
        places = self._places.get((name, kind), [])
        if places and places[0].columns is not None:
            whole = self._from_columns(name, places, start, stop)
            if whole is None:
                raise self._broken(f"elements {start} to {stop} of {name} ({kind}) are not all in it")
            return whole
        parts: list[torch.Tensor] = []
        position = start
        for place in places:
            if place.stop <= position or position >= stop:
                continue
            if place.start > position:
                break
            end = min(stop, place.stop)
            parts.append(self._slice(place, position - place.start, end - place.start))
            position = end
        if position < stop:
            raise self._broken(f"elements {position} to {stop} of {name} ({kind}) are not in it")
        if not parts:
            return torch.empty(0)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def random_state(self, rank: int, device: torch.device) -> bool:
        """Whether the random state of `rank` was set as it was saved: not where fewer ranks had saved."""
        file = self.path / f"rank-{rank:05d}.rng.safetensors"
        if not file.exists():
            return False
        try:
            states = load_file(file)
            torch.set_rng_state(states["cpu"])
        except (SafetensorError, KeyError, TypeError, RuntimeError) as error:
            raise self._broken(f"{file.name} holds no random states ({error})") from None
        if device.type == "cuda" and "cuda" in states:
            torch.cuda.set_rng_state(states["cuda"], device)
        return True

    def close(self) -> None:
        self._files.clear()


def seed_rank(seed: int, rank: int) -> None:
    """Seed what dropout draws from, differently on each rank. Initial weights and the data's order have their own seeds."""
    random.seed(seed + rank)
    numpy.random.seed((seed + rank) % 2**32)
    torch.manual_seed(seed + rank)


def bring_back(engine: Engine, reader: Reader, world: World) -> None:
    """Bring `engine` and the random states of this rank to where the checkpoint left off; a rank that had no part in it draws
    afresh."""
    engine.load(reader.read, reader.scalars)
    if not reader.random_state(world.rank, world.device):
        seed_rank(reader.seed + reader.step, world.rank)
    reader.close()


def first_sound(candidates: Sequence[Path], world: World, say: Callable[[str], None]) -> Path | None:
    """The first of `candidates` whose every file is what was saved; None where there are none. Each rank reads a part of them.

    `say` is told of each that is passed over, and why.

    Raises:
        CheckpointError: none is sound.
    """
    damage: list[tuple[Path, str]] = []
    for path in candidates:
        own = list(commit.problems(path, world.rank, world.size))
        found = sorted({problem for problems in world.gather(own) for problem in problems})
        if not found:
            return path
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        damage.append((path, f"{found[0]}{more}"))
        if len(candidates) > 1:
            say(f"resume   {path.name} is damaged and passed over: {damage[-1][1]}")
    if not damage:
        return None
    remedy = "name another checkpoint of the run, or take the newest sound one with resume=auto"
    if len(candidates) > 1:
        remedy = "start afresh with resume=none and another run.dir"
    raise CheckpointError([Fault("resume", f"{path} is damaged: {what}", remedy) for path, what in damage])


def check_run(reader: Reader, about: Mapping[str, Any]) -> None:
    """Compare the identity of the run (`about`: model, tuning) with the checkpoint's, before anything is built.

    Raises:
        CheckpointError: they differ; every difference is named, but of another model its name alone.
    """
    different = [field for field, value in about.items() if field in reader.about and reader.about[field] != value]
    if "model" in different:  # its dimensions differ because it is another
        different = [field for field in different if not field.startswith("model.")]
    faults = [
        Fault(field, f"{reader.path} was saved with {reader.about[field]}, this run has {about[field]}",
              ("resume with that model" if field == "model" else f"set {field}={reader.about[field]}")
              + ", or start afresh with resume=none and another run.dir")
        for field in different
    ]  # fmt: skip
    if faults:
        raise CheckpointError(faults)


def changes(reader: Reader, course: Mapping[str, Any]) -> list[str]:
    """A sentence for each part of the run's `course` that differs from the checkpoint's."""
    saved = reader.course
    return [
        sentence.format(saved=saved[part], now=course[part])
        for part, sentence in COURSE.items()
        if part in saved and part in course and saved[part] != course[part]
    ]


def check_tensors(reader: Reader, pieces: Iterable[Piece]) -> str | None:
    """What differs between the trained tensors of this rank's `pieces` and the checkpoint's; None where nothing does."""
    wrong: list[str] = []
    seen: set[str] = set()
    for piece in pieces:
        if piece.name in seen:
            continue
        seen.add(piece.name)
        saved = reader.shapes.get(piece.name)
        if saved is None:
            wrong.append(f"{piece.name} is not in it")
        elif saved != tuple(piece.shape):
            wrong.append(f"{piece.name} is {list(saved)} in it and {list(piece.shape)} here")
    if not wrong:
        return None
    more = f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
    return f"{reader.path} was made with another model: {'; '.join(wrong[:_SHOWN])}{more}"
