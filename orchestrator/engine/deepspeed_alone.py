"""ZeRO without its peers: what a single process must answer for the others, under a process group that only pretends."""

from __future__ import annotations

import sys
from functools import lru_cache


@lru_cache(maxsize=1)
def agree_with_peers() -> None:
    """Let ZeRO-3's checks that every rank walks the modules in the same order (runtime/zero/utils.py) hear this rank's own list
    as rank 0's. The tensors of the exchange are still made. For the rest of the process; deepspeed must be imported."""
    zero = sys.modules["deepspeed.runtime.zero.utils"]
    exchange = zero.get_lst_from_rank0  # type: ignore[attr-defined]

    def own(values: list[int]) -> list[int]:
        exchange(values)
        return values

    zero.get_lst_from_rank0 = own  # type: ignore[attr-defined]
