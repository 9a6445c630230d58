"""The machine at hand as a Cluster: its NVIDIA cards as the driver shows them, else shares of its memory."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from orchestrator.cluster.hardware import card_of
from orchestrator.errors import ConfigError, Fault
from orchestrator.spec import Card, Cluster

MEMBERSHIP, HIERARCHY = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def cgroup_limits(membership: Path = MEMBERSHIP, hierarchy: Path = HIERARCHY) -> list[Path]:
    """Where limits of this process's memory may stand: those of its control group and of all around it, of cgroup v2 and v1.

    In a container its own group is the root; under Slurm or systemd it is some levels down (cgroups(7), /proc/PID/cgroup).
    """
    found = [hierarchy / "memory.max", hierarchy / "memory" / "memory.limit_in_bytes"]
    try:
        lines = [line.split(":", 2) for line in membership.read_text(encoding="utf-8").splitlines()]
    except OSError:
        return found
    for _, controllers, path in (line for line in lines if len(line) == 3):
        if controllers and "memory" not in controllers.split(","):
            continue
        base, name = (hierarchy / "memory", "memory.limit_in_bytes") if controllers else (hierarchy, "memory.max")
        group = Path(path.lstrip("/"))
        found += [base / each / name for each in (group, *group.parents)]
    return found


def host_bytes(limits: Iterable[Path] | None = None) -> int:
    """Bytes of memory that this process may use: the machine's, or the lowest of `limits` (None: of its control groups)."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in cgroup_limits() if limits is None else limits:
        with contextlib.suppress(OSError, ValueError):  # no such hierarchy, or "max": no limit
            memory = min(memory, int(limit.read_text().strip()))
    return memory


def visible(count: int, listed: str | None) -> list[int]:
    """Indices of the cards that CUDA would use, of `count`, where `listed` is CUDA_VISIBLE_DEVICES (None: not set).

    As CUDA does, the list ends at the first entry that names no card. A card named by UUID keeps its place in the list
    only as a count, which is all that a uniform machine needs.
    """
    if listed is None:
        return list(range(count))
    chosen: list[int] = []
    for entry in (part.strip() for part in listed.split(",")):
        if entry.startswith(("GPU-", "MIG-")):
            chosen.append(min(len(chosen), count - 1))
        elif entry.isdigit() and int(entry) < count:
            chosen.append(int(entry))
        else:
            break
    return chosen if count else []


@contextlib.contextmanager
def driver() -> Iterator[object | None]:
    """NVML while in the context; None where the package or the driver is missing."""
    try:
        import pynvml
    except ImportError:
        yield None
        return
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        yield None
        return
    try:
        yield pynvml
    finally:
        pynvml.nvmlShutdown()


def cards() -> list[Card]:
    """The NVIDIA cards that CUDA would use, in its order; empty on a machine without them."""
    with driver() as nvml:
        if nvml is None:
            return []
        import pynvml

        found = []
        for index in visible(pynvml.nvmlDeviceGetCount(), os.environ.get("CUDA_VISIBLE_DEVICES")):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            major, _ = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle).total
            found.append(card_of(str(pynvml.nvmlDeviceGetName(handle)), int(memory), int(major)))
        return found


def nodes_of(ranks: int) -> int:
    """Machines among which a launcher has spread `ranks`, from the number of ranks that it says run on this one."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or ranks)
    return ranks // local if 0 < local <= ranks and ranks % local == 0 else 1


def local_cluster(ranks: int | None = None) -> Cluster:
    """This machine, with one card for each of `ranks` (None: all cards, or one rank without cards).

    Cards that differ count as the one with the least memory, which decides what fits.

    Raises:
        ConfigError: more ranks than cards.
    """
    memory, found = host_bytes(), cards()
    nodes = nodes_of(ranks) if ranks else 1
    per_node = ranks // nodes if ranks else max(len(found), 1)
    if not found:
        card = Card("cpu", memory // per_node, 0.0, 0.0, 0.0, bf16=True, source="host memory divided by the ranks")
        return Cluster("local", nodes, per_node, card, host_bytes=memory)
    if per_node > len(found):
        problem = f"{per_node} ranks run on this machine, but it shows {len(found)} cards"
        remedy = f"start {len(found)}, or set CUDA_VISIBLE_DEVICES= (empty) to run on the CPU"
        raise ConfigError(Fault("cluster", problem, remedy))
    return Cluster("local", nodes, per_node, min(found, key=lambda card: card.memory_bytes), host_bytes=memory)
