"""Machines as they are found, for tests of what is said of them."""

from __future__ import annotations

from dataclasses import replace

from orchestrator.cluster.machine import CardFacts, Machine

GIB = 2**30
CARD = CardFacts("NVIDIA A10", 22 * GIB, (8, 6), (4, 16), (4, 16))
SOUND = Machine(
    host="n1", driver="570.86.15", driver_cuda=(12, 8), torch_cuda=(12, 8), nccl="2.27.3", cards=(CARD,) * 4, all_cards=4,
    cores=32, memory_bytes=256 * GIB, usable_bytes=256 * GIB, available_bytes=200 * GIB, shm_bytes=64 * GIB,
    open_files=65536, free={"runs": 500 * GIB}, compiler="/usr/bin/c++", nvcc=(12, 8),
    installed={"torch": "2.13.0+cu128"}, tested={"torch": "2.13.0"},
)  # fmt: skip
T4 = replace(CARD, name="Tesla T4", capability=(7, 5))
