"""A rank that fails as FAIL says: raise, user, kill (all in rank 1), everyone (a user's error on all ranks)."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist

from orchestrator.errors import DataError, Fault, LayoutDrift
from orchestrator.train import failure
from orchestrator.train.log import open_log
from orchestrator.train.world import join

LOG = Path(os.environ["FAIL_LOG"])


def fail(how: str, rank: int) -> None:
    if how == "everyone":
        raise DataError(Fault("data.path", "the file is empty", "give another"))
    if rank == 1 and how == "user":
        raise LayoutDrift(Fault("rank 1, extra", "7 elements live, 0 expected"))
    if rank == 1 and how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if rank == 1 and how == "raise":
        raise RuntimeError("the second rank broke")


def work() -> int:
    world = join("cpu")
    open_log(LOG, world.rank)
    for step in range(3):
        if step == 2:
            fail(os.environ["FAIL"], world.rank)
        dist.all_reduce(torch.ones(1))
    return 0


if __name__ == "__main__":
    sys.exit(failure.guarded(work, lambda: LOG if LOG.exists() else None))
