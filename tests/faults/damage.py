"""Damage checkpoints at random and look whether it is seen.

python tests/faults/damage.py [--cases 1000] [--seed 0] [--json FILE]
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from record import record

from orchestrator.engine.protocol import Piece
from orchestrator.errors import CheckpointError
from orchestrator.train import checkpoint
from orchestrator.train.resume import first_sound
from orchestrator.train.world import World, join, leave


def flip(file: Path, generator: random.Random, _: list[Path]) -> None:
    """Turn one bit over."""
    data = bytearray(file.read_bytes())
    data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
    file.write_bytes(data)


def truncate(file: Path, generator: random.Random, _: list[Path]) -> None:
    """Cut the end off."""
    with file.open("r+b") as opened:
        opened.truncate(generator.randrange(file.stat().st_size))


def delete(file: Path, _: random.Random, __: list[Path]) -> None:
    """Take the file away."""
    file.unlink()


def swap(file: Path, generator: random.Random, files: list[Path]) -> None:
    """Exchange the file with another one of other contents, if need be the same file of another checkpoint."""
    other = generator.choice([each for each in files if each != file and each.read_bytes() != file.read_bytes()])
    mine, theirs = file.read_bytes(), other.read_bytes()
    file.write_bytes(theirs)
    other.write_bytes(mine)


DAMAGES: tuple[Callable[[Path, random.Random, list[Path]], None], ...] = (flip, truncate, delete, swap)


def save(folder: Path, world: World, step: int) -> Path:
    """A checkpoint of several files, other values for each step."""
    pieces = [Piece(name, "weight", (1000,), 0, torch.arange(1000.0) * step + place) for place, name in enumerate("abc")]
    moment = checkpoint.Moment(step, 0, 1, "digest", {})
    torch.manual_seed(step)
    return checkpoint.save(folder, moment, iter(pieces), world, scalars={}, keep=9, expected_bytes=0)[0]


def sweep(cases: int, seed: int) -> dict[str, object]:
    """How many damages of each kind were tried, and those that were not seen or not passed over for the sound checkpoint."""
    generator, world = random.Random(seed), join("cpu")
    tried: Counter[str] = Counter()
    missed: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        checkpoint.CHUNK_BYTES = 5000  # several files
        whole = Path(name) / "whole"
        names = [save(whole, world, step).name for step in (1, 2)]
        for number in range(cases):
            torn = Path(name) / "torn"
            shutil.copytree(whole, torn)
            sound, newest = (torn / each for each in names)
            files = sorted(newest.iterdir())
            file, damage = generator.choice(files), DAMAGES[number % len(DAMAGES)]
            damage(file, generator, files)
            tried[damage.__name__] += 1
            said: list[str] = []
            if first_sound([newest, sound], world, said.append) != sound or newest.name not in said[0]:
                missed.append(f"{damage.__name__} of {file.name}: passed over {said}")
            try:
                first_sound([newest], world, said.append)
                missed.append(f"{damage.__name__} of {file.name}: taken when named")
            except CheckpointError as error:
                if newest.name not in str(error):
                    missed.append(f"{damage.__name__} of {file.name}: refused without its name")
            shutil.rmtree(torn)
    leave()
    return {"tried": dict(tried), "missed": missed, "seed": seed, "files": [file.name for file in files]}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    result = sweep(asked.cases, asked.seed)
    record(result, asked.json)
    return 1 if result["missed"] else 0


if __name__ == "__main__":
    sys.exit(main())
