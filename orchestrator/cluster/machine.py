"""What this machine is, as far as a run depends on it: read from the driver, the kernel and the installed packages.

Nothing here imports torch or starts CUDA, so all of it takes some tens of milliseconds.
"""

from __future__ import annotations

import itertools
import os
import re
import resource
import shutil
import socket
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib import metadata, util
from pathlib import Path
from typing import Any

from orchestrator.cluster.local import driver, host_bytes, visible

Version = tuple[int, ...]

PINS = Path(__file__).resolve().parents[2] / "constraints.txt"
"""The versions that the project was tested with."""

DECIDING = ("torch", "deepspeed", "transformers", "peft", "accelerate", "datasets", "safetensors", "hydra-core")
"""Packages whose version can change what a run holds or does."""


@dataclass(frozen=True, slots=True)
class CardFacts:
    """One card as the driver shows it. `link` and `best_link` are (PCIe generation, lanes) now and at most."""

    name: str
    memory_bytes: int
    capability: tuple[int, int]
    link: tuple[int, int] = (0, 0)
    best_link: tuple[int, int] = (0, 0)


@dataclass(frozen=True, slots=True)
class Machine:
    """Bytes are ints, None stands for "unlimited" of a limit and for "not there" of everything else.

    `cards` are those that CUDA would use, `all_cards` how many the driver has; `unpeered` the pairs of cards that cannot read
    each other's memory. `free` holds the free bytes of the file system of each path, `tested` the pinned versions.
    """

    host: str = ""
    host_resolves: bool = True
    driver: str | None = None
    driver_cuda: Version | None = None
    torch_cuda: Version | None = None
    nccl: str | None = None
    cards: tuple[CardFacts, ...] = ()
    all_cards: int = 0
    unpeered: tuple[tuple[int, int], ...] = ()
    visible: str | None = None
    cores: int = 1
    memory_bytes: int = 0
    usable_bytes: int = 0
    available_bytes: int = 0
    shm_bytes: int = 0
    locked_bytes: int | None = None
    open_files: int | None = None
    free: Mapping[str, int] = field(default_factory=dict)
    compiler: str | None = None
    nvcc: Version | None = None
    ninja: bool = True
    libaio: bool = True
    locks: tuple[str, ...] = ()
    installed: Mapping[str, str] = field(default_factory=dict)
    tested: Mapping[str, str] = field(default_factory=dict)


def version(text: str) -> Version:
    """The leading numbers of a version: (2, 13, 0) of "2.13.0+cpu"."""
    found = re.match(r"\d+(\.\d+)*", text)
    return tuple(int(part) for part in found[0].split(".")) if found else ()


def _torch_cuda() -> Version | None:
    """The CUDA that torch was built with, from its version file; None for a CPU build."""
    found = util.find_spec("torch")
    if found is None or found.origin is None:
        return None
    match = re.search(r"^cuda: .*= '([\d.]+)'", (Path(found.origin).parent / "version.py").read_text(), re.MULTILINE)
    return version(match[1]) if match else None


def _installed(names: Iterable[str]) -> dict[str, str]:
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _tested(pins: Path) -> dict[str, str]:
    if not pins.is_file():
        return {}
    lines = [line.partition("==") for line in pins.read_text(encoding="utf-8").splitlines() if "==" in line]
    return {name.strip(): pin.strip() for name, _, pin in lines}


def _nccl() -> str | None:
    for distribution in metadata.distributions():
        name = distribution.metadata["Name"] or ""
        if name.startswith("nvidia-nccl"):
            return distribution.version
    return None


def _limit(kind: int) -> int | None:
    soft, _ = resource.getrlimit(kind)
    return None if soft == resource.RLIM_INFINITY else soft


def _available() -> int:
    """Bytes that new processes can have without swapping; 0 where the kernel does not say."""
    try:
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        return 0
    return int(found[1]) * 1024 if found else 0


def free_bytes(path: Path) -> int:
    """Free bytes of the file system that `path` lies on, or will lie on."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def _resolves(host: str) -> bool:
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        return False
    return True


def _cuda_tools() -> Version | None:
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    found = re.search(r"cuda-(\d+\.\d+)", str(home.resolve()))
    return version(found[1]) if found and (home / "bin" / "nvcc").exists() else None


def _stale_locks() -> tuple[str, ...]:
    """Lock files of torch's extension builds; a build that was killed leaves one, and the next waits for it without a word."""
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions")
    return tuple(str(path) for path in sorted(root.glob("**/lock"))) if root.is_dir() else ()


def _cards() -> tuple[str | None, Version | None, list[CardFacts], int, list[tuple[int, int]]]:
    """(driver, its newest CUDA, the visible cards, the number of all, pairs of visible ones without peer access)."""
    with driver() as nvml:
        if nvml is None:
            return None, None, [], 0, []
        import pynvml

        cuda = int(pynvml.nvmlSystemGetCudaDriverVersion())
        count = int(pynvml.nvmlDeviceGetCount())
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in visible(count, os.environ.get("CUDA_VISIBLE_DEVICES"))]

        def asked(question: Callable[..., Any], *about: Any) -> int:
            """The driver's answer; 0 where this card or a virtual machine does not tell."""
            try:
                return int(question(*about))
            except pynvml.NVMLError:
                return 0

        found = [
            CardFacts(
                name=str(pynvml.nvmlDeviceGetName(handle)),
                memory_bytes=int(pynvml.nvmlDeviceGetMemoryInfo(handle).total),
                capability=tuple(pynvml.nvmlDeviceGetCudaComputeCapability(handle)),
                link=(
                    asked(pynvml.nvmlDeviceGetCurrPcieLinkGeneration, handle),
                    asked(pynvml.nvmlDeviceGetCurrPcieLinkWidth, handle),
                ),
                best_link=(
                    asked(pynvml.nvmlDeviceGetMaxPcieLinkGeneration, handle),
                    asked(pynvml.nvmlDeviceGetMaxPcieLinkWidth, handle),
                ),
            )
            for handle in handles
        ]
        readable = pynvml.NVML_P2P_CAPS_INDEX_READ
        apart = [
            (one, other)
            for one, other in itertools.combinations(range(len(handles)), 2)
            if asked(pynvml.nvmlDeviceGetP2PStatus, handles[one], handles[other], readable) != pynvml.NVML_P2P_STATUS_OK
        ]
        return str(pynvml.nvmlSystemGetDriverVersion()), (cuda // 1000, cuda % 1000 // 10), found, count, apart


def this_machine(folders: Iterable[Path] = (), pins: Path = PINS) -> Machine:
    """The machine at hand; `folders` are those whose free space matters."""
    name, cuda, cards, count, apart = _cards()
    host = socket.gethostname()
    return Machine(
        host=host,
        host_resolves=_resolves(host),
        driver=name,
        driver_cuda=cuda,
        torch_cuda=_torch_cuda(),
        nccl=_nccl(),
        cards=tuple(cards),
        all_cards=count,
        unpeered=tuple(apart),
        visible=os.environ.get("CUDA_VISIBLE_DEVICES"),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        usable_bytes=host_bytes(),
        available_bytes=_available(),
        shm_bytes=shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else 0,
        locked_bytes=_limit(resource.RLIMIT_MEMLOCK),
        open_files=_limit(resource.RLIMIT_NOFILE),
        free={str(folder): free_bytes(folder.absolute()) for folder in folders},
        compiler=shutil.which("c++") or shutil.which("g++"),
        nvcc=_cuda_tools(),
        ninja=shutil.which("ninja") is not None,
        libaio=any(Path(folder, "libaio.h").exists() for folder in ("/usr/include", "/usr/local/include")),
        locks=_stale_locks(),
        installed=_installed(DECIDING),
        tested=_tested(pins),
    )
