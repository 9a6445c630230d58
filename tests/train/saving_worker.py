"""One of two ranks that save steps 1 and 2 of a tensor of 200 elements, half of it each."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from orchestrator.engine.protocol import Piece
from orchestrator.train import checkpoint
from orchestrator.train.world import join, leave


def main(folder: Path) -> None:
    world = join("cpu")
    half = torch.arange(100.0) + 100 * world.rank
    for step in (1, 2):
        moment = checkpoint.Moment(step, 0, 1, "digest", {})
        pieces = iter([Piece("w", "weight", (200,), 100 * world.rank, half)])
        checkpoint.save(folder, moment, pieces, world, scalars={}, keep=2, expected_bytes=800)
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
