"""The machines that a run is planned for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Card:
    """One accelerator. `memory_bytes` is what the driver shows; `tflops` and `bandwidth` are the sourced peak rates.

    `name` "cpu" stands for a rank of a machine without accelerators: its memory is a share of the host's.
    """

    name: str
    memory_bytes: int
    half_tflops: float
    memory_gb_per_s: float
    link_gb_per_s: float
    bf16: bool
    source: str = ""


@dataclass(frozen=True, slots=True)
class Cluster:
    """`nodes` machines with `cards_per_node` cards each; `host_bytes` is the RAM of one machine, `nvme_bytes` what its
    local disk has free and `nvme_gb_per_s` how fast that reads and writes, shared by its cards (0 = not stated)."""

    name: str
    nodes: int
    cards_per_node: int
    card: Card
    host_bytes: int = 0
    nvme_bytes: int = 0
    nvme_gb_per_s: float = 0.0

    @property
    def cards(self) -> int:
        return self.nodes * self.cards_per_node
