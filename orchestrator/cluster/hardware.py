"""The table of cards. It stands once, in conf/cluster/card/, where each row names its sources; here it is read."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from orchestrator.spec import Card

TABLE = Path(__file__).resolve().parents[2] / "conf" / "cluster" / "card"

AMPERE = 8
"""Major compute capability of the first NVIDIA cards with bf16 (CUDA C++ programming guide, compute capabilities)."""


@functools.cache
def rows() -> Mapping[str, Mapping[str, Any]]:
    """Rows of the table by each name that the driver gives the card."""
    found: dict[str, Mapping[str, Any]] = {}
    for path in sorted(TABLE.glob("*.yaml")):
        row = yaml.safe_load(path.read_text(encoding="utf-8"))
        found.update(dict.fromkeys(row["nvml"], row))
    return found


def card_of(nvml_name: str, memory_bytes: int, capability: int) -> Card:
    """The card that the driver calls `nvml_name` and gives `memory_bytes`, with major compute `capability`.

    Rates come from the table; of a card that is not in it they are 0: unknown. Memory is always what the driver shows.
    """
    row = rows().get(nvml_name)
    if row is None:
        return Card(nvml_name, memory_bytes, 0.0, 0.0, 0.0, bf16=capability >= AMPERE, source="NVML; rates unknown")
    return Card(
        name=row["name"],
        memory_bytes=memory_bytes,
        half_tflops=row["half_tflops"],
        memory_gb_per_s=row["memory_gb_per_s"],
        link_gb_per_s=row["link_gb_per_s"],
        bf16=row["bf16"],
        source=f"memory: NVML on this machine; {row['source'].strip()}",
    )
