"""What this rank's card and process hold at a moment, as the driver, torch's allocator and the kernel count it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of one rank. The card's figures are None on a rank that computes on the CPU.

    `allocated`/`reserved` are torch's peaks since the run began; `device_used` is the whole card, as nvidia-smi shows it;
    `resident` and `resident_peak` are this process's RAM.
    """

    rank: int
    resident: int
    resident_peak: int
    allocated: int | None = None
    reserved: int | None = None
    device_used: int | None = None
    device_total: int | None = None

    def to_json(self) -> dict[str, int | None]:
        return asdict(self)


def resident_peak_bytes() -> int:
    """Highest resident size of this process so far. VmHWM, because getrusage's figure is inherited from the launcher."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return int(psutil.Process().memory_info().rss)


def measure(rank: int, device: torch.device) -> Memory:
    """The memory of this rank now, with the peaks so far."""
    resident = int(psutil.Process().memory_info().rss)
    peak = max(resident, resident_peak_bytes())
    if device.type != "cuda":
        return Memory(rank, resident, peak)
    import torch  # reports read this module too, and need no torch

    free, total = torch.cuda.mem_get_info(device)
    return Memory(
        rank, resident, peak,
        allocated=torch.cuda.max_memory_allocated(device), reserved=torch.cuda.max_memory_reserved(device),
        device_used=total - free, device_total=total,
    )  # fmt: skip
