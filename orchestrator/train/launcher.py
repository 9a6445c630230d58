"""What a launcher tells its ranks, and how they speak of each other; without torch, so that a refusal comes at once."""

from __future__ import annotations

import os


class PeerFailure(RuntimeError):
    """Another rank failed and reports the cause itself."""


def ranks_from_environment() -> tuple[int, int]:
    """(ranks in all, ranks on this machine) as the launcher states them; (1, 1) under bare python."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    local = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1"
    return size, min(size, int(local)) if "WORLD_SIZE" in os.environ else 1
