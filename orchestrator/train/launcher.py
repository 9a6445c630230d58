"""What a launcher tells its ranks, and how they speak of each other; without torch, so that a refusal comes at once."""

from __future__ import annotations

import atexit
import os
import sys
from dataclasses import dataclass


class PeerFailure(RuntimeError):
    """Another rank failed and reports the cause itself."""


def ranks_from_environment() -> tuple[int, int]:
    """(ranks in all, ranks on this machine) as the launcher states them; (1, 1) under bare python."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    local = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1"
    return size, min(size, int(local)) if "WORLD_SIZE" in os.environ else 1


def launcher_keeps_the_store() -> bool:
    """Whether the ranks meet in a store of torchrun's own, and not in that of rank 0 (torch/distributed/elastic)."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


@dataclass
class Ending:
    """The end of a rank's process: with `code`, once that is known, after everything else has been put in order.

    Made first, so that the exit functions of all libraries have run when it is called (atexit calls the last one first). The
    interpreter's own clean-up after them is left out: gloo keeps threads that a destructor there may find running, and a rank
    whose work is saved would end with "terminate called without an active exception".
    """

    code: int | None = None

    def __post_init__(self) -> None:
        atexit.register(self._leave)

    def _leave(self) -> None:
        if self.code is not None and "torch" in sys.modules:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(self.code)
