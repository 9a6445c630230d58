"""Findings about a machine: how bad, what would happen, and the mend. Pure functions of `Machine` and `Need`, in one table."""

from __future__ import annotations

import errno
import socket
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import Enum

from orchestrator.cluster.machine import Machine, Version, version
from orchestrator.units import GIB, format_bytes

DEFAULT_PORT = 29500
"""The port at which torchrun and deepspeed meet where none is named."""

SHM_BYTES = GIB
"""NCCL shares some 10 MiB for each pair of ranks through /dev/shm, loaders more; Docker's default of 64 MiB is too little."""

OPEN_FILES, MANY_RANKS = 4096, 16
"""Sockets and mapped files of a rank; 1,024 is the common default and runs out with some dozen ranks."""

FREE_BYTES = 2 * GIB

DRIVERS: dict[int, Version] = {11: (450, 80, 2), 12: (525, 60, 13), 13: (580, 65, 6)}
"""Oldest Linux driver for each major CUDA release (CUDA Toolkit release notes, table "CUDA minor version compatibility")."""

SLOW_LINK = 5.0
"""GB/s: half of what PCIe 3 with 16 lanes gives in practice."""

BF16_CAPABILITY = (8, 0)


class Severity(Enum):
    """`fails`: a run cannot work. `risk`: it may, and may be slow or break later. `fine`: as it should be."""

    FAILS = "fails"
    RISK = "risk"
    FINE = "fine"


@dataclass(frozen=True, slots=True)
class Finding:
    """`about` is what was looked at, `found` what is there; `effect` what would happen and `mend` what to do, both "" where
    all is well."""

    severity: Severity
    about: str
    found: str
    effect: str = ""
    mend: str = ""


@dataclass(frozen=True, slots=True)
class Need:
    """What a run asks of each machine. `ranks` 0: one for each card. `pinned_bytes` are page-locked by all ranks together."""

    ranks: int = 0
    nodes: int = 1
    on_cards: bool | None = None
    bf16: bool = False
    pinned_bytes: int = 0
    disk_bytes: int = FREE_BYTES
    compiles: bool = False
    nvme: bool = False


def _fine(about: str, found: str) -> Finding:
    return Finding(Severity.FINE, about, found)


def _risk(about: str, found: str, effect: str, mend: str) -> Finding:
    return Finding(Severity.RISK, about, found, effect, mend)


def _fails(about: str, found: str, effect: str, mend: str) -> Finding:
    return Finding(Severity.FAILS, about, found, effect, mend)


def _dotted(numbers: Version) -> str:
    return ".".join(map(str, numbers))


def _cards(machine: Machine, need: Need) -> Iterator[Finding]:
    if not machine.cards:
        hidden = f"none visible of {machine.all_cards}" if machine.all_cards else "none"
        shown = f"{hidden} (CUDA_VISIBLE_DEVICES={machine.visible})" if machine.visible is not None else hidden
        if need.on_cards and machine.driver is None:
            return  # a missing driver says it all
        if need.on_cards:
            yield _fails("cards", shown, "the run needs cards", "look at nvidia-smi and CUDA_VISIBLE_DEVICES")
        else:
            yield _fine("cards", f"{shown}; runs compute on {machine.cores} cores")
        return
    counts = Counter((card.name, card.memory_bytes) for card in machine.cards)
    listed = ", ".join(f"{number} × {name} {format_bytes(size)}" for (name, size), number in counts.items())
    if len(counts) > 1:
        yield _risk(
            "cards", listed, "all are used as the smallest, and wait for the slowest", "choose equal ones: CUDA_VISIBLE_DEVICES"
        )
    else:
        yield _fine("cards", listed)
    if need.ranks > len(machine.cards):
        shown = f"{need.ranks} ranks, {len(machine.cards)} cards visible of {machine.all_cards}"
        mend = f"start {len(machine.cards)}, or set CUDA_VISIBLE_DEVICES (now {machine.visible or 'not set'})"
        yield _fails("ranks", shown, "a rank would have no card of its own", mend)


def _cuda(machine: Machine, need: Need) -> Iterator[Finding]:
    if machine.driver is None:
        if need.on_cards:
            effect = "torch sees no card"
            yield _fails("driver", "none", effect, "install NVIDIA's driver; in a container start it with --gpus all")
        elif machine.torch_cuda is not None:
            yield _fine("driver", f"none; torch is built for CUDA {_dotted(machine.torch_cuda)} and computes on the CPU")
        return
    if machine.torch_cuda is None and not machine.cards:
        yield _fine("driver", f"{machine.driver}; no card is visible, and torch is a CPU build")
        return
    if machine.torch_cuda is None:
        effect = "the cards stay idle, and the run computes on the CPU"
        yield _fails("torch", "a CPU build beside cards", effect, "pip install the CUDA build of the same torch version")
        return
    least = DRIVERS.get(machine.torch_cuda[0])
    text = f"driver {machine.driver}, torch for CUDA {_dotted(machine.torch_cuda)}"
    if least is not None and version(machine.driver) < least:
        mend = f"update the driver to {_dotted(least)} or newer, or install torch for an older CUDA"
        yield _fails("driver", text, "CUDA does not start: the driver is older than torch's CUDA", mend)
    else:
        yield _fine("driver", text)
    if machine.nccl is None and len(machine.cards) > 1:
        yield _risk(
            "NCCL",
            "no package nvidia-nccl",
            "torch may bring its own, else ranks cannot talk",
            "python -c 'import torch; print(torch.cuda.nccl.version())'",
        )
    elif machine.nccl is not None:
        yield _fine("NCCL", machine.nccl)


def _bf16(machine: Machine, need: Need) -> Iterator[Finding]:
    without = [card.name for card in machine.cards if card.capability < BF16_CAPABILITY]
    if without:
        make = _fails if need.bf16 else _risk
        yield make(
            "bf16",
            f"{without[0]} has none",
            "precision=bf16 is emulated or refused",
            "precision=fp16, which auto takes by itself",
        )
    elif machine.cards:
        yield _fine("bf16", "every card computes in it")


def _links(machine: Machine, need: Need) -> Iterator[Finding]:
    for index, card in enumerate(machine.cards):
        (generation, lanes), (best, most) = card.link, card.best_link
        if lanes and lanes < most:
            effect = f"transfers to the host at {lanes}/{most} of the speed"
            yield _risk(
                f"card {index}",
                f"PCIe {generation} × {lanes} of PCIe {best} × {most}",
                effect,
                "reseat the card or use another slot; offload least there",
            )
    if machine.unpeered:
        pairs = ", ".join(f"{one}-{other}" for one, other in machine.unpeered[:4])
        yield _risk(
            "peers",
            f"no direct access between cards {pairs}",
            "what ranks exchange goes through host memory",
            "NCCL does that by itself; choose strategies that send little: launch/compare.py",
        )
    elif len(machine.cards) > 1:
        yield _fine("peers", "all cards read each other directly")


def _memory(machine: Machine, need: Need) -> Iterator[Finding]:
    limited = machine.usable_bytes < machine.memory_bytes
    free = min(machine.available_bytes, machine.usable_bytes)
    text = f"{format_bytes(machine.usable_bytes)} usable, {format_bytes(free)} free now"
    if limited:
        text += f" (the limit of the container or job; the machine has {format_bytes(machine.memory_bytes)})"
    if need.pinned_bytes > free:
        effect = f"{format_bytes(need.pinned_bytes)} rest in host memory: the kernel would kill a rank without a word (code -9)"
        yield _fails("host memory", text, effect, "free memory, raise the container's limit, or use offload=none or more nodes")
    elif free < machine.usable_bytes // 10:
        yield _risk("host memory", text, "loading may be killed", "look who holds it: ps aux --sort=-rss | head")
    else:
        yield _fine("host memory", text)


def _shm(machine: Machine, need: Need) -> Iterator[Finding]:
    if machine.shm_bytes >= SHM_BYTES:
        yield _fine("/dev/shm", format_bytes(machine.shm_bytes))
        return
    if need.on_cards is False and need.ranks == 1:
        return  # nothing to share
    severe = len(machine.cards) > 1 and need.ranks != 1 and need.on_cards is not False
    effect = 'NCCL ends with "No space left on device" or "unhandled system error"'
    mend = "start the container with --ipc=host or --shm-size=8g; in a pod mount an emptyDir of medium Memory there"
    yield (_fails if severe else _risk)("/dev/shm", format_bytes(machine.shm_bytes), effect, mend)


def _limits(machine: Machine, need: Need) -> Iterator[Finding]:
    files = machine.open_files
    many = (need.ranks or len(machine.cards)) * need.nodes > MANY_RANKS
    if files is not None and files < OPEN_FILES and many:
        yield _risk(
            "open files",
            f"at most {files}",
            "sockets or mapped files run out: Too many open files",
            f"ulimit -n {OPEN_FILES} in the shell that starts the run",
        )
    else:
        yield _fine("open files", "no limit" if files is None else f"at most {files}")
    locked = machine.locked_bytes
    uses = [
        *(["InfiniBand cannot register buffers, and NCCL falls back to TCP"] if need.nodes > 1 else []),
        *(["DeepSpeed cannot lock the buffers through which a disk is read (mlock)"] if need.nvme else []),
    ]
    if uses and locked is not None:
        mend = "ulimit -l unlimited; in Slurm LimitMEMLOCK=infinity for slurmd, in Docker --ulimit memlock=-1"
        yield _risk("locked memory", f"at most {format_bytes(locked)}", "; ".join(uses), mend)
    if not machine.host_resolves:
        yield _risk(
            "host name",
            f"{machine.host} has no address",
            "gloo cannot find its own interface and a start may hang",
            f"add {machine.host} to /etc/hosts, or set GLOO_SOCKET_IFNAME",
        )


def _disk(machine: Machine, need: Need) -> Iterator[Finding]:
    for path, free in machine.free.items():
        if free < need.disk_bytes:
            effect = f"a checkpoint of {format_bytes(need.disk_bytes)} does not fit, and saving fails"
            make = _fails if need.disk_bytes > FREE_BYTES else _risk
            yield make("disk", f"{format_bytes(free)} free for {path}", effect, "name another run.dir, or free space")
        else:
            yield _fine("disk", f"{format_bytes(free)} free for {path}")


def operators(machine: Machine, need: Need) -> Iterator[Finding]:
    lacking = [name for name, there in (("a C++ compiler", machine.compiler), ("ninja", machine.ninja)) if not there]
    if lacking:
        make = _fails if need.compiles else _risk
        yield make(
            "operators",
            f"no {' and no '.join(lacking)}",
            "DeepSpeed's own operators (NVMe offload) cannot be built",
            "apt-get install g++; pip install ninja; and have both on PATH",
        )
    else:
        cuda = machine.nvcc
        mismatch = cuda is not None and machine.torch_cuda is not None and cuda[0] != machine.torch_cuda[0]
        if mismatch and machine.cards:
            assert cuda is not None and machine.torch_cuda is not None
            text = f"nvcc of CUDA {_dotted(cuda)}, torch for {_dotted(machine.torch_cuda)}"
            yield _risk(
                "operators",
                text,
                "DeepSpeed refuses to build operators for the card",
                "set CUDA_HOME to a toolkit of torch's CUDA",
            )
        else:
            able = ["cpu_adam", *(["async_io"] if machine.libaio else [])]
            able += ["fused_adam"] if cuda is not None and machine.torch_cuda is not None and not mismatch else []
            yield _fine("operators", f"{', '.join(able)} can be built with {machine.compiler}, when they are needed")
    if not machine.libaio:
        make = _fails if need.nvme else _risk
        yield make(
            "libaio", "no libaio.h", "offload to NVMe cannot be built; nothing else needs it", "apt-get install libaio-dev"
        )
    for lock in machine.locks:
        yield _risk(
            "operators",
            f"an unfinished build holds {lock}",
            "if no build is running now, the next waits for ever",
            f"rm {lock}",
        )


FLOORS: dict[str, tuple[Version, str]] = {
    "torch": ((2, 10), "torch.load runs code of a file also with weights_only"),
    "transformers": ((5, 3), "a model's config can run code while it is loaded"),
    "hydra-core": ((1, 3, 4), "a config can name any function to be called"),
}
"""Oldest versions without a known hole, and what the hole is."""


def _holes(machine: Machine, need: Need) -> Iterator[Finding]:
    for name, (least, hole) in FLOORS.items():
        installed = machine.installed.get(name)
        if installed is not None and version(installed) < least:
            yield _fails(f"{name}'s version", f"{installed}, and {_dotted(least)} is needed", hole, "pip install -U it")


def _versions(machine: Machine, need: Need) -> Iterator[Finding]:
    other = []
    for name, installed in machine.installed.items():
        tested = machine.tested.get(name)
        if tested is not None and version(installed)[:2] != version(tested)[:2]:
            other.append(f"{name} {installed} (tested: {tested})")
    if other:
        yield _risk(
            "versions",
            ", ".join(other),
            "predictions may be off, and what is measured is held to them (exit code 5)",
            "pip install -c constraints.txt the packages named",
        )
    elif machine.tested:
        yield _fine("versions", f"as tested: {', '.join(f'{name} {v}' for name, v in list(machine.installed.items())[:4])}")


Check = Callable[[Machine, Need], Iterable[Finding]]

CHECKS: tuple[Check, ...] = (_cards, _cuda, _bf16, _links, _memory, _shm, _limits, _disk, operators, _holes, _versions)
OF_CARDS: tuple[Check, ...] = (_cards, _cuda, _bf16, _links)
SHARED: tuple[Check, ...] = (_disk, _holes, _versions)
"""What the nodes of a job have in common with the machine that submits it."""


def examine(machine: Machine, need: Need | None = None, checks: Iterable[Check] = CHECKS) -> list[Finding]:
    """Every finding of `checks` about `machine` for a run with `need` (None: any), those that fail first."""
    return ordered([finding for check in checks for finding in check(machine, need or Need())])


def ordered(findings: Iterable[Finding]) -> list[Finding]:
    """`findings`, those that fail first."""
    return sorted(findings, key=lambda finding: list(Severity).index(finding.severity))


def fails(findings: Iterable[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.severity is Severity.FAILS]


def link(source: str, target: str, gb_per_s: float, exact: bool) -> Finding:
    """What a probe of the link between two devices means."""
    about, found = f"{source} to {target}", f"{gb_per_s:.1f} GB/s"
    if not exact:
        effect = "what arrives is not what was sent: losses would be wrong without an error"
        return _fails(about, f"{found}, damaged", effect, "switch ACS off in the BIOS, or set NCCL_P2P_DISABLE=1")
    if gb_per_s < SLOW_LINK:
        effect = "offloading and gathering weights would wait for this link"
        return _risk(
            about, found, effect, "look at the slot (nvidia-smi topo -m), or choose what sends little: launch/compare.py"
        )
    return _fine(about, found)


def port(number: int, host: str = "") -> Finding:
    """Whether the launcher of a run here can listen at port `number` of `host` ("": every address)."""
    about = f"port {number}"
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, number))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                return _risk(about, error.strerror or str(error), "the ranks could not meet there", "take another port")
            effect = "torchrun and deepspeed end with EADDRINUSE: another run meets there"
            mend = f"torchrun --master-port={number + 1} …, or deepspeed --master_port={number + 1} …"
            return _risk(about, "taken", effect, mend)
    return _fine(about, "free")
