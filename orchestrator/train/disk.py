"""The disk of a run that swaps to NVMe, looked at on every machine before anything is built."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

from orchestrator.engine.deepspeed_aio import Bandwidth, load_op, probe
from orchestrator.engine.swap_folder import claim, sweep
from orchestrator.errors import ConfigError, Fault
from orchestrator.layout import Layout
from orchestrator.spec import Home, Nvme
from orchestrator.train.world import World
from orchestrator.units import GIB, format_bytes, format_seconds

IN_MEMORY = ("tmpfs", "ramfs")
REMOTE = ("nfs", "nfs4", "cifs", "smb3", "ceph", "lustre", "beegfs", "glusterfs", "fuse.glusterfs", "fuse.sshfs", "afs", "9p")
"""File systems whose bytes are in the memory that was to be saved, or on another machine (first and third field of
/proc/mounts)."""

CAP_IPC_LOCK = 14
"""Bit of the capability to lock memory without limit (linux/capability.h)."""

SPARE_BYTES = GIB
"""Left free beside what is swapped: for the probe, and for what else writes there meanwhile."""

Note = Callable[[str], None]


def file_system(path: Path, mounts: Path = Path("/proc/mounts")) -> str:
    """The kind of file system on which `path` lies, "" where the system does not tell."""
    if not mounts.exists():
        return ""
    found = ("", "")
    for line in mounts.read_text(encoding="utf-8").splitlines():
        point, kind = line.split()[1:3]
        point = point.encode().decode("unicode_escape")
        if path.is_relative_to(point) and len(point) >= len(found[0]):
            found = (point, kind)
    return found[1]


def _place_faults(folder: Path, need: int) -> list[Fault]:
    """What is wrong with `folder`, made here if need be, for `need` bytes."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return [Fault("offload.path", f"{folder} cannot be made: {error.strerror}", "name a folder on a local disk")]
    if not os.access(folder, os.W_OK | os.X_OK):
        return [Fault("offload.path", f"{folder} cannot be written", "name a folder on a local disk that you own")]
    kind, faults = file_system(folder.resolve()), []
    if kind in IN_MEMORY:
        problem = f"{folder} lies in memory ({kind}): what is swapped there saves none"
        faults.append(Fault("offload.path", problem, "name a folder on a local disk, or use offload=cpu"))
    elif kind in REMOTE:
        problem = f"{folder} lies on another machine ({kind})"
        faults.append(Fault("offload.path", problem, "name a folder on a disk of this machine"))
    free = shutil.disk_usage(folder).free
    if free < need + SPARE_BYTES:
        problem = (
            f"{format_bytes(need)} will be swapped to {folder} by the ranks of this machine, and {format_bytes(free)} are free "
            f"there ({format_bytes(need + SPARE_BYTES - free)} short with {format_bytes(SPARE_BYTES)} to spare)"
        )
        faults.append(Fault("offload.path", problem, "free space there, name a larger disk, or use more machines"))
    return faults


def _may_lock_all(status: Path = Path("/proc/self/status")) -> bool:
    lines = status.read_text(encoding="utf-8").splitlines() if status.exists() else []
    effective = next((int(line.split()[1], 16) for line in lines if line.startswith("CapEff:")), 0)
    return bool(effective >> CAP_IPC_LOCK & 1)


def lock_faults(need: int, limit: int | None = None) -> list[Fault]:
    """Less memory that may be page-locked than a rank's `need`, of which DeepSpeed would say nothing before it dies. `limit`
    None: this process's own."""
    if limit is None:
        limit = -1 if _may_lock_all() else resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if limit < 0 or limit >= need:
        return []
    problem = f"a rank page-locks {format_bytes(need)} of buffers for NVMe, and the system allows {format_bytes(limit)}"
    remedy = (
        "ulimit -l unlimited, or in a container --ulimit memlock=-1; zero.sub_group_size and offload.buffer_count make it less"
    )
    return [Fault("offload", problem, remedy)]


def sentence(folder: Path, speed: Bandwidth, moved: tuple[int, int], ranks: int) -> str:
    """What the disk does and what that means for a step in which each of `ranks` reads and writes `moved` bytes."""
    read, written = moved
    floor = ranks * (read / speed.read + written / speed.write)
    kind = file_system(folder.resolve()) or "unknown"
    return (
        f"{folder} ({kind}) reads {speed.read / 1e9:.2f} and writes {speed.write / 1e9:.2f} GB/s now; a step "
        f"reads {format_bytes(ranks * read)} and writes {format_bytes(ranks * written)}, so {format_seconds(floor)} at least"
    )


def look(nvme: Nvme, layout: Layout, moved: tuple[int, int], ranks: int, note: Note) -> str:
    """The sentence about the disk of this machine, on which `ranks` swap; `note` hears of what is done meanwhile.

    Raises:
        ConfigError: with all that stands against it.
    """
    folder = Path(nvme.path)
    for gone, size in sweep(folder) if folder.is_dir() else ():
        note(f"nvme     removed {gone} ({format_bytes(size)}), which a job that died has left")
    locked = sum(row.bytes for row in layout.rows if row.line == "staging" and row.home is Home.CPU)
    faults = [*_place_faults(folder, layout.rest_bytes(Home.NVME) * ranks), *lock_faults(locked)]
    if faults:
        raise ConfigError(faults)
    op = load_op(note)
    own = claim(folder, f"probe-{os.getpid()}")
    try:
        speed = probe(own.path, nvme, op)
    except OSError as error:
        problem = f"{folder} does not take direct I/O: {error}"
        raise ConfigError(Fault("offload.path", problem, "name a folder on a local disk (ext4, xfs)")) from error
    finally:
        own.release()
    return sentence(folder, speed, moved, ranks)


def prepare(nvme: Nvme, layout: Layout, moved: tuple[int, int], world: World, note: Note) -> None:
    """Look at the disk of every machine. Every rank calls it.

    Raises:
        ConfigError: on every rank, with the faults of all machines.
    """
    told: str | tuple[Fault, ...] = ""
    if world.local_rank == 0:
        try:
            told = look(nvme, layout, moved, world.local_size, note)
        except ConfigError as error:
            told = error.faults
    answers = [answer for answer in world.gather(told) if answer]
    faults = [fault for answer in answers if not isinstance(answer, str) for fault in answer]
    if faults:
        raise ConfigError(list(dict.fromkeys(faults)))
    for answer in answers:
        note(f"nvme     {answer}")
