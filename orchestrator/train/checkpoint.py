"""Saving: a checkpoint that any strategy on any number of ranks can resume.

    step-000050/
        COMMITTED                     the SHA-256 of checkpoint.json: written last, by rank 0
        checkpoint.json               step, epoch, seed, ranks, digests, tuning, scalars; every file with size and SHA-256
        rank-00000.json               where every piece of rank 0 lies: tensor, kind, start, length, columns, file
        rank-00000-0000.safetensors   the pieces, one-dimensional, under the key "name|kind|start"
        rank-00000.rng.safetensors    the random states of rank 0

The folder is written under a temporary name and renamed when every rank has flushed it to the disk (train/commit.py).
"""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from orchestrator.engine.protocol import Piece
from orchestrator.errors import CheckpointError, Fault
from orchestrator.train import commit
from orchestrator.train.commit import Stored, saved_steps, stored
from orchestrator.train.storage import remedy_for
from orchestrator.train.world import World
from orchestrator.units import GIB, MIB, format_bytes

LOG = logging.getLogger("orchestrator.train")

FORMAT = 2
CHUNK_BYTES = GIB
"""Pieces are gathered in host memory up to this size and then written, and larger ones are cut: the price of a save in RAM, per
rank."""

SPARE_BYTES = 4 * MIB
"""Room for indexes and headers on top of the tensors."""


class NotSaved(CheckpointError):
    """A rank could not write its part, or rank 0 what makes it whole."""

    title = "The checkpoint was not saved"


@dataclass(frozen=True, slots=True)
class Moment:
    """What a checkpoint says about the run besides tensors.

    A resume must share `about`, the identity. `course`, what decides the samples of a step, it may change, and is told so.
    `health` is what the run knows of its losses (train/spikes.py).
    """

    step: int
    epoch: int
    seed: int
    spec_digest: str
    about: Mapping[str, Any]
    course: Mapping[str, Any] = field(default_factory=dict)
    health: Mapping[str, Any] = field(default_factory=dict)


def key_of(name: str, kind: str, start: int) -> str:
    return f"{name}|{kind}|{start}"


def _cut(piece: Piece) -> Iterator[Piece]:
    """`piece` as pieces of whole rows that each fit into a chunk; a row that does not, by itself."""
    data, columns = piece.data.detach().reshape(-1), piece.columns
    row, width = (1, 1) if columns is None else (columns[1] - columns[0], math.prod(piece.shape[1:]))
    at_once = max(1, CHUNK_BYTES // (row * data.element_size())) * row
    for first in range(0, data.numel(), at_once):
        yield replace(piece, start=piece.start + first // row * width, data=data[first : first + at_once])


class _PieceWriter:
    """Writes the pieces of one rank in files of about CHUNK_BYTES, and their index."""

    def __init__(self, folder: Path, rank: int) -> None:
        self._folder, self._stem = folder, f"rank-{rank:05d}"
        self._chunk: dict[str, torch.Tensor] = {}
        self._chunk_bytes, self._files = 0, 0
        self._index: list[dict[str, Any]] = []
        self._shapes: dict[str, list[int]] = {}
        self.bytes = 0
        self.files: dict[str, Stored] = {}

    def add(self, piece: Piece) -> None:
        for part in _cut(piece):
            self._add(part)

    def _add(self, piece: Piece) -> None:
        size = piece.data.nbytes
        if self._chunk and self._chunk_bytes + size > CHUNK_BYTES:
            self._write_chunk()
        data = piece.data.to("cpu").contiguous()
        if data.untyped_storage().nbytes() > data.nbytes:
            data = data.clone()  # safetensors refuses two views of one storage
        self._chunk[key_of(piece.name, piece.kind, piece.start)] = data
        self._shapes[piece.name] = list(piece.shape)
        self._index.append(
            {"name": piece.name, "kind": piece.kind, "start": piece.start, "length": data.numel(), "file": self._file_name()}
            | ({"columns": list(piece.columns)} if piece.columns is not None else {})
        )
        self._chunk_bytes += size
        self.bytes += size

    def _file_name(self) -> str:
        return f"{self._stem}-{self._files:04d}.safetensors"

    def _write_chunk(self) -> None:
        path = self._folder / self._file_name()
        save_file(self._chunk, path)
        self._keep(path)
        self._chunk, self._chunk_bytes, self._files = {}, 0, self._files + 1

    def _keep(self, path: Path) -> None:
        """Flush a written file to the disk and note its SHA-256."""
        commit.flush(path)
        self.files[path.name] = stored(path)

    def finish(self, device: torch.device) -> None:
        if self._chunk:
            self._write_chunk()
        random = {"cpu": torch.get_rng_state()}
        if device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(device)
        states = self._folder / f"{self._stem}.rng.safetensors"
        save_file(random, states)
        index = self._folder / f"{self._stem}.json"
        index.write_text(json.dumps({"shapes": self._shapes, "pieces": self._index}), encoding="utf-8")
        self._keep(states)
        self._keep(index)


def _describe(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).splitlines()[0]


def _no_room(checkpoints: Path, step: int, needed: int, failures: list[str]) -> NotSaved:
    free = shutil.disk_usage(next(folder for folder in (checkpoints, *checkpoints.absolute().parents) if folder.is_dir())).free
    older = saved_steps(checkpoints)
    keeps = f"the newest checkpoint, {older[-1].name}, is whole" if older else "no earlier checkpoint was there to lose"
    problem = (
        f"step {step} was not saved under {checkpoints}: {'; '.join(failures[:3])}. It needs {format_bytes(needed)} "
        f"and {format_bytes(free)} are free; {keeps}"
    )
    short = max(needed - free, 0)
    remedy = f"free {format_bytes(short)} there" if short else remedy_for(failures[0]) or "free space there or check the disk"
    if len(older) > 1 and remedy.startswith("free"):
        remedy += f" (for example the older {older[0].name}), lower checkpoint.keep,"
    larger = " or move run.dir to a larger disk" if remedy.startswith("free") else ""
    return NotSaved(Fault("checkpoint", problem, f"{remedy}{larger}, then resume=auto"))


def _write_rank(temporary: Path, pieces: Iterator[Piece], world: World) -> tuple[_PieceWriter, str | None]:
    """(what this rank has written, failure or None). The pieces are always taken to the end: peers may be exchanging."""
    writer, failure = _PieceWriter(temporary, world.rank), None
    for piece in pieces:
        if not piece.owned or failure is not None:
            continue
        try:
            writer.add(piece)
        except (OSError, SafetensorError) as error:
            failure = _describe(error)
    if failure is None:
        try:
            writer.finish(world.device)
        except (OSError, SafetensorError) as error:
            failure = _describe(error)
    return writer, failure


def _open_temporary(final: Path, needed: int) -> str | None:
    """The failure, or None: makes an empty temporary folder. What earlier crashes left is removed first."""
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        commit.recover(final.parent)
        if shutil.disk_usage(final.parent).free < needed:
            return "No space left on device"
        commit.temporary_of(final).mkdir()
    except OSError as error:
        return _describe(error)
    return None


def _publish(final: Path, document: dict[str, Any], files: dict[str, Stored], keep: int) -> str | None:
    """The failure, or None: commits the checkpoint, and then drops all but the `keep` newest."""
    try:
        commit.publish(final, document, files)
    except OSError as error:
        return _describe(error)
    try:
        for old in saved_steps(final.parent)[: -max(keep, 1)]:
            commit.remove(old)
    except OSError as error:  # the new one is safe; the next save tries again
        LOG.warning("an older checkpoint could not be removed: %s", _describe(error))
    return None


def save(
    checkpoints: Path,
    moment: Moment,
    pieces: Iterator[Piece],
    world: World,
    *,
    scalars: Mapping[str, float],
    keep: int,
    expected_bytes: int,
) -> tuple[Path, int]:
    """(the new checkpoint, bytes of its tensors over all ranks). Every rank calls it; every rank gets the same answer.

    `expected_bytes` is what all ranks together are expected to write: less free space is refused before anything is written.

    Raises:
        NotSaved: any rank could not write; the temporary folder is gone and earlier checkpoints are whole.
    """
    needed = expected_bytes + SPARE_BYTES
    final = checkpoints / f"step-{moment.step:06d}"
    temporary = commit.temporary_of(final)
    failure = world.tell(_open_temporary(final, needed) if world.first else None)
    failures = [f"rank 0: {failure}"] if failure else []
    written = 0
    if not failures:
        own, failure = _write_rank(temporary, pieces, world)
        failures = world.agree(failure)
        ranks = world.gather((own.bytes, own.files))
        written = sum(size for size, _ in ranks)
    if not failures:
        document = {
            "format": FORMAT, "step": moment.step, "epoch": moment.epoch, "seed": moment.seed, "ranks": world.size,
            "spec_digest": moment.spec_digest, "about": dict(moment.about), "course": dict(moment.course),
            "scalars": dict(scalars), "bytes": written, "health": dict(moment.health),
        }  # fmt: skip
        files = {name: file for _, listed in ranks for name, file in listed.items()}
        failure = world.tell(_publish(final, document, files, keep) if world.first else None)
        if failure is None:
            return final, written
        failures = [f"rank 0: {failure}"]
    refused = _no_room(checkpoints, moment.step, max(needed, written), failures) if world.first else None
    if world.first:
        shutil.rmtree(temporary, ignore_errors=True)
    faults = world.tell(refused.faults if refused else ())
    raise NotSaved(faults)
