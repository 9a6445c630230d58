"""DeepSpeed's asynchronous file I/O: its op compiled once and quickly, and a disk measured with it.

DeepSpeed 0.19.8 compiles twelve small files, each with all of torch's headers and debug symbols: 285 s, 1.6 GB a
compiler. The same sources joined in one file, with the two headers that they need and without symbols, take a twentieth.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import shutil
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from orchestrator.errors import ConfigError, Fault
from orchestrator.spec import Nvme
from orchestrator.units import MIB

OPS = ("pin_memory", "async_io")
"""The op, after the one that it needs."""

Note = Callable[[str], None]

_INCLUDE = re.compile(r'\s*#include\s+["<]([^">]+)[">]')
_CONSTANT = re.compile(r"^(?:static\s+)?const\s+[\w:]+\s+(\w+)\s*=", re.MULTILINE)
_HEADERS = "#include <torch/types.h>\n#include <torch/csrc/utils/pybind.h>"
"""What the sources use of torch/extension.h."""


def join_sources(sources: Sequence[Path], folders: Sequence[Path]) -> str:
    """One C++ source out of several: each of their own headers once, in place, and constants of equal names kept apart."""
    seen: set[Path] = set()
    lines: list[str] = []

    def own_header(line: str, beside: Path) -> Path | None:
        found = _INCLUDE.match(line)
        places = [(folder / found[1]).resolve() for folder in (beside, *folders)] if found else []
        return next((place for place in places if place.is_file()), None)

    def take(file: Path) -> None:
        for line in file.read_text(encoding="utf-8").splitlines():
            header = own_header(line, file.parent)
            if header is None:
                lines.append(_HEADERS if "<torch/extension.h>" in line else line.replace("#pragma once", ""))
            elif header not in seen:
                seen.add(header)
                take(header)

    for number, source in enumerate(sources):
        names = _CONSTANT.findall(source.read_text(encoding="utf-8"))
        lines += [f"#define {name} {name}_{number}" for name in names]
        take(source)
        lines += [f"#undef {name}" for name in names]
    return "\n".join([*lines, ""])


def ops_folder() -> Path:
    """Where compiled ops are kept: TORCH_EXTENSIONS_DIR, else the user's cache, apart by torch, Python and device.

    Not torch's own default: a program that compiles DeepSpeed's op as it stands would find another one under its name.
    """
    stated = os.environ.get("TORCH_EXTENSIONS_DIR")
    if stated:
        return Path(stated)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "orchestrator" / "ops" / f"torch-{torch.__version__}-py{sysconfig.get_python_version()}"


def _worked_in(folder: Path) -> bool:
    """Whether a compiler of any program works in `folder`."""
    return any(process.info["cwd"] == str(folder) for process in psutil.process_iter(["cwd"]))


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """The only process of this project that builds in `folder`; what a killed build has locked is freed.

    torch waits for the file "lock" for ever and silently (torch/utils/file_baton.py)."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".orchestrator").open("a") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)
        stale = folder / "lock"
        if stale.exists() and not _worked_in(folder):
            stale.unlink(missing_ok=True)
        yield


def _hasten(builder: Any, folder: Path) -> None:
    """Let `builder` make the same op from one source, in `folder`. No subclass: pin_memory's loader calls its own type."""
    places = [Path(builder.deepspeed_src_path(path)).resolve() for path in builder.include_paths()]
    sources = [Path(builder.deepspeed_src_path(path)).resolve() for path in builder.sources()]
    joined = folder / f"{builder.name}.cpp"
    text = join_sources(sources, places)
    if not joined.exists() or joined.read_text(encoding="utf-8") != text:
        joined.write_text(text, encoding="utf-8")
    arguments = [word for word in builder.cxx_args() if word != "-g"]
    builder.sources = lambda: [str(joined)]
    builder.cxx_args = lambda: list(arguments)


def built(name: str) -> bool:
    """Whether the op `name` has been compiled before, so that loading it takes no time."""
    return (ops_folder() / name / f"{name}.so").exists()


def _prebuilt() -> bool:
    """Whether DeepSpeed was installed with its ops compiled for this kind of machine, as docker/Dockerfile does."""
    from deepspeed.accelerator import get_accelerator
    from deepspeed.git_version_info import accelerator_name, installed_ops

    return accelerator_name == get_accelerator()._name and all(installed_ops.get(name, False) for name in OPS)


def load_op(note: Note = lambda line: None) -> Any:
    """DeepSpeed's async_io module, compiled now where it was neither installed nor compiled before; `note` is told before and
    after that.

    From then on DeepSpeed itself finds the op loaded.

    Raises:
        ConfigError: libaio, a compiler or ninja is missing, or the compiler failed.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    from deepspeed.ops.op_builder import AsyncIOBuilder, PinMemoryBuilder

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    loaded = AsyncIOBuilder._loaded_ops.get(AsyncIOBuilder.NAME)
    if loaded is not None:
        return loaded
    if _prebuilt():
        return AsyncIOBuilder().load(verbose=False)
    folder = ops_folder()
    os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)
    beside = str(Path(sys.executable).parent)  # ninja lies there, also where the environment was not activated
    if beside not in os.environ["PATH"].split(os.pathsep):
        os.environ["PATH"] = f"{beside}{os.pathsep}{os.environ['PATH']}"
    begun, module = time.perf_counter(), None
    fresh = not all(built(name) for name in OPS)
    if fresh:
        _check_tools()
        note("nvme     compiling DeepSpeed's async_io, once; half a minute on an idle core …")
    for builder in (PinMemoryBuilder(), AsyncIOBuilder()):
        place = folder / builder.name
        with _alone(place), redirect_stdout(sys.stderr):
            try:
                _hasten(builder, place)
                module = builder.load(verbose=False)
            except RuntimeError as error:
                raise ConfigError(_build_fault(str(error))) from error
    if fresh:
        note(f"nvme     compiled in {time.perf_counter() - begun:.0f} s, kept in {folder}")
    return module


def _check_tools() -> None:
    """Raises ConfigError: naming everything that a build lacks."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    missing = []
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        problem = f"no C++ compiler ({compiler}) to build DeepSpeed's async_io with"
        missing.append(Fault("offload", problem, "install one (Debian, Ubuntu: apt-get install g++)"))
    elif not AsyncIOBuilder().is_compatible(verbose=False):
        remedy = "install it with its headers (Debian, Ubuntu: apt-get install libaio-dev; Fedora, RHEL: libaio-devel)"
        missing.append(Fault("offload", "libaio is missing, on which DeepSpeed's async_io is built", remedy))
    if shutil.which("ninja") is None:
        missing.append(Fault("offload", "ninja is missing, with which torch builds ops", "pip install ninja"))
    if missing:
        raise ConfigError(missing)


def _build_fault(text: str) -> Fault:
    lines = [line.strip() for line in text.splitlines() if "error" in line.lower()] or text.splitlines()[-1:]
    problem = f"DeepSpeed's async_io does not build: {'; '.join(lines[:3])}"
    return Fault("offload", problem, "mend the compiler, or use offload=cpu")


@dataclass(frozen=True, slots=True)
class Bandwidth:
    """Bytes a second that a disk really read and wrote."""

    read: float
    write: float


SAMPLE_BYTES, SAMPLES, SAMPLE_SECONDS = 32 * MIB, 4, 0.4


def make_handle(op: Any, nvme: Nvme) -> Any:
    """A handle with the run's own settings."""
    return op.aio_handle(nvme.block_bytes, nvme.queue_depth, nvme.single_submit, nvme.overlap_events, nvme.threads)


def probe(folder: Path, nvme: Nvme, op: Any) -> Bandwidth:
    """What the disk under `folder` does with the run's own settings past the kernel's cache, in about a second; 128 MiB
    are written, and gone afterwards.

    Raises:
        OSError: the folder does not take them.
    """
    handle = make_handle(op, nvme)
    # One whole number of requests for each thread.
    size = max(1, SAMPLE_BYTES // (nvme.block_bytes * nvme.threads)) * nvme.block_bytes * nvme.threads
    buffer = handle.new_cpu_locked_tensor(size, torch.empty(0, dtype=torch.uint8)).fill_(1)
    files = [folder / f"probe-{number}" for number in range(SAMPLES)]

    def moved(move: Callable[[Path], int], seconds: float) -> float:
        """Bytes a second over all files, and again while `seconds` last."""
        begun, count = time.perf_counter(), 0
        while count < SAMPLES or time.perf_counter() - begun < seconds:
            if move(files[count % SAMPLES]) < 0:
                raise OSError("the file system refuses it")
            handle.wait()
            count += 1
        return count * size / (time.perf_counter() - begun)

    def write(file: Path) -> int:
        return int(handle.async_pwrite(buffer, str(file), 0))

    try:
        moved(write, 0.0)  # a run writes over what it has written before
        written = moved(write, SAMPLE_SECONDS)
        read = moved(lambda file: int(handle.async_pread(buffer, str(file), 0)), SAMPLE_SECONDS)
    finally:
        handle.free_cpu_locked_tensor(buffer)
        for file in files:
            file.unlink(missing_ok=True)
    return Bandwidth(read, written)
