"""What every result of a benchmark carries: the machine, the versions, and ratios with the measurements behind them."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True, slots=True)
class Cost:
    """What a piece of work took: seconds of the processor (user and system, all processes of it) and of the clock."""

    cpu: float
    wall: float


def timed(command: Sequence[str], environment: Mapping[str, str], log: Path, folder: Path | None = None) -> Cost:
    """The cost of a command to its end, with every process that it started and waited for; its output goes to `log`.

    Raises:
        RuntimeError: it failed; carries its last lines.
    """
    with log.open("wb") as output:
        before = os.times()
        child = subprocess.Popen(command, env=dict(environment), stdout=output, stderr=subprocess.STDOUT, cwd=folder)
        _, status, used = os.wait4(child.pid, 0)
        wall = os.times().elapsed - before.elapsed
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        lines = log.read_text(errors="replace").splitlines()[-25:]
        raise RuntimeError("\n".join([f"code {child.returncode}: {' '.join(command)}", *lines]))
    return Cost(used.ru_utime + used.ru_stime, wall)


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    """The median of the ratios of neighbours, the range that its middle half spans, and the medians of both sides."""
    pairs = sorted(a / b for a, b in zip(ours, theirs, strict=True))
    quarters = statistics.quantiles(pairs, n=4) if len(pairs) > 1 else [pairs[0]] * 3
    return {
        "ratio": round(statistics.median(pairs), 4),
        "middle_half": [round(quarters[0], 4), round(quarters[2], 4)],
        "ours": round(statistics.median(ours), 6),
        "theirs": round(statistics.median(theirs), 6),
        "pairs": len(pairs),
    }


def versions(*packages: str) -> dict[str, str]:
    """The installed versions of `packages`, and Python's."""
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in packages}}


def machine() -> str:
    """Cores, processor, memory, and how busy the machine was in the last five minutes."""
    information = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    model = next((line.partition(":")[2].strip() for line in information if line.startswith("model name")), platform.machine())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{len(os.sched_getaffinity(0))} cores, {model}, {memory:.0f} GiB, load average {os.getloadavg()[1]:.0f}"


def write(name: str, command: str, packages: Mapping[str, str], results: Mapping[str, Any]) -> Path:
    """benchmarks/results/<name>.json with the results, how to get them again, and where they were got."""
    path = RESULTS / f"{name}.json"
    document = {"command": command, "machine": machine(), "versions": dict(packages), "results": dict(results)}
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return path
