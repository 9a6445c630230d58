"""One of two ranks that save steps 1 and 2 of a tensor of 200 elements, half of it each.

"limited" keeps rank 1 from writing step 2."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch

from orchestrator.engine.protocol import Piece
from orchestrator.errors import CheckpointError
from orchestrator.train import checkpoint
from orchestrator.train.world import join, leave


def main(folder: Path, how: str) -> int:
    world = join("cpu")
    half = torch.arange(100.0) + 100 * world.rank
    for step in (1, 2):
        if how == "limited" and step == 2 and world.rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (256, resource.RLIM_INFINITY))
        moment = checkpoint.Moment(step, 0, 1, "digest", {})
        pieces = iter([Piece("w", "weight", (200,), 100 * world.rank, half)])
        try:
            checkpoint.save(folder, moment, pieces, world, scalars={}, keep=2, expected_bytes=800)
        except CheckpointError as error:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            print(error.report())
            return error.exit_code
    leave()
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2]))
