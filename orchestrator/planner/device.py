"""What a card and its machine take beside torch's own tensors, and the rates that `spec.Card` does not state.

Data with a source in each row. Nothing here was fitted to a measured run.
"""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.spec import Card, Cluster, Engine
from orchestrator.units import GIB, MIB

CPU = "cpu"
"""`Card.name` of a rank without an accelerator."""

CONTEXT_BYTES = 426 * MIB
"""CUDA context and loaded kernels of one process: 426 MiB with torch 2.10 and CUDA 13, 287 to 667 MB elsewhere (collected
2026-11-21). It grows with the kernels that are loaded, so it is the figure most worth measuring on a new driver."""

CHANNEL_BYTES = 4 * MIB
"""NCCL's buffer of one channel: NCCL_BUFFSIZE, default 4 MiB (NCCL user guide, environment variables)."""

NVLINK_CHANNELS = 24
PCIE_CHANNELS = 4
"""Channels of a ring: up to 24 where NVLink joins the cards, 2 to 4 over PCIe (nccl src/graph/search.cc)."""

WORKSPACE_BYTES = {"hopper": 32 * MIB, "earlier": 8 * MIB + 128 * 1024}
"""cuBLAS workspace of one handle and stream, in torch's allocator (aten/src/ATen/cuda/CUDABlas.cpp): 32 MiB from compute
capability 9.0 on, 8.125 MiB before."""

HOST_PROCESS_BYTES = 900 * MIB
"""Resident memory of one rank before any tensor: interpreter, torch with its CUDA libraries, transformers, DeepSpeed."""

CPU_PROCESS_BYTES = {Engine.PLAIN: 440 * MIB, Engine.FSDP: 455 * MIB, Engine.DEEPSPEED: 520 * MIB}
"""The same with torch's CPU build, by engine: resident memory of a rank of `launch/train.py` at its first step, less its
tensors (measured: Python 3.11, torch 2.13, deepspeed 0.19.8, transformers 5.23, peft 0.21; a run that still compiles the
libraries' bytecode holds some 100 MiB more)."""

COMPILER_BYTES = 105 * MIB
"""What torch.compile keeps in a rank's process where blocks are compiled (measured on a CPU, versions as above: a rank of 1.3 M
parameters peaked at 568 MiB instead of 462). Not in the plan's sum. While it compiles, g++ takes 494 MiB more for a moment."""

SAVED_AT_ONCE = GIB
"""Bytes that a checkpoint gathers in host memory before it writes them (train/checkpoint.py)."""

HOST_MEMORY_GB_PER_S = 204.8
"""Memory bandwidth of a host: 8 channels of DDR4-3200, as in one socket of the servers that these cards are sold in (25.6
GB/s a channel, JEDEC JESD79-4). Assumed, and shared by the cards of a machine; it decides how long an Adam step on the
CPU takes."""

NVME_GB_PER_S = 4.0
"""What the local disk of a machine writes, and takes as its rate for reading too: a 3.84 TB data-centre drive on PCIe 4
(Samsung PM9A3 data sheet: 4.0 written, 6.8 read). Assumed where the cluster states none; the cards of a machine share it."""

NETWORK_GB_PER_S = 12.5
"""Link between machines where nothing else is stated: 100 Gbit/s Ethernet, shared by the cards of a machine. Assumed."""


@dataclass(frozen=True, slots=True)
class Rates:
    """Peaks of one card: fp32 outside the tensor cores in TFLOP/s, and one way of its slot to the host in GB/s."""

    fp32_tflops: float
    host_gb_per_s: float
    hopper: bool
    nvlink: bool
    source: str


_PCIE3, _PCIE4, _PCIE5 = 16.0, 32.0, 64.0

RATES: dict[str, Rates] = {
    "T4": Rates(8.1, _PCIE3, False, False, "NVIDIA T4 datasheet"),
    "V100-32": Rates(15.7, _PCIE3, False, True, "NVIDIA V100 datasheet, SXM2"),
    "A10": Rates(31.2, _PCIE4, False, False, "NVIDIA A10 datasheet"),
    "A10G": Rates(35.0, _PCIE4, False, False, "NVIDIA A10G datasheet"),
    "L4": Rates(30.3, _PCIE4, False, False, "NVIDIA L4 datasheet"),
    "RTX3090": Rates(35.6, _PCIE4, False, False, "NVIDIA GA102 whitepaper"),
    "RTX4090": Rates(82.6, _PCIE4, False, False, "NVIDIA Ada whitepaper"),
    "A100-40": Rates(19.5, _PCIE4, False, True, "NVIDIA A100 datasheet"),
    "A100-80": Rates(19.5, _PCIE4, False, True, "NVIDIA A100 datasheet"),
    "H100": Rates(67.0, _PCIE5, True, True, "NVIDIA H100 datasheet, SXM"),
    "H200": Rates(67.0, _PCIE5, True, True, "NVIDIA H200 datasheet"),
}
"""By `Card.name`."""


@dataclass(frozen=True, slots=True)
class Overhead:
    """Bytes on a card that torch's tensors do not account for: `context` and `communication` lie outside torch's allocator,
    `workspace` inside it."""

    context: int
    communication: int
    workspace: int

    @property
    def outside(self) -> int:
        """What the driver shows beyond the bytes that torch has reserved."""
        return self.context + self.communication


def rates(card: Card) -> Rates:
    """The further rates of `card`; of one that is not in the table PCIe 4 and, for fp32, an eighth of its half rate."""
    nvlink = card.link_gb_per_s > _PCIE5
    return RATES.get(card.name) or Rates(card.half_tflops / 8, _PCIE4, False, nvlink, "not in the table: PCIe 4 assumed")


def overhead(cluster: Cluster, ranks: int) -> Overhead:
    """What one card of `cluster` spends on its context, on NCCL and on cuBLAS."""
    if cluster.card.name == CPU:
        return Overhead(0, 0, 0)
    row = rates(cluster.card)
    channels = NVLINK_CHANNELS if row.nvlink else PCIE_CHANNELS
    # A channel has a buffer for what it sends and one for what it receives.
    communication = 2 * channels * CHANNEL_BYTES if ranks > 1 else 0
    return Overhead(CONTEXT_BYTES, communication, WORKSPACE_BYTES["hopper" if row.hopper else "earlier"])


def process_bytes(cluster: Cluster, engine: Engine) -> int:
    """Host memory of one rank before any tensor."""
    return CPU_PROCESS_BYTES[engine] if cluster.card.name == CPU else HOST_PROCESS_BYTES


def nvme_rate(cluster: Cluster) -> float:
    """GB/s of its machine's disk for each rank."""
    return (cluster.nvme_gb_per_s or NVME_GB_PER_S) / max(1, cluster.cards_per_node)


def nvme_share(cluster: Cluster) -> int:
    """Bytes of its machine's disk for each rank; 0 where the cluster does not state them."""
    return cluster.nvme_bytes // max(1, cluster.cards_per_node)


def host_share(cluster: Cluster) -> int:
    """Host bytes for each rank of a machine; 0 where the cluster does not state them."""
    return cluster.host_bytes // max(1, cluster.cards_per_node)
