"""Start a script as several real processes that form one gloo process group."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


LISTENED_ON = range(15000, 30000)
"""Ports below those that the kernel gives to outgoing connections and to whoever binds 0 (net.ipv4.ip_local_port_range): gloo
takes several of those a rank, and one of them could be gone before its rank listens."""


def free_port() -> int:
    """A TCP port that nothing listened on a moment ago."""
    while True:
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("127.0.0.1", random.SystemRandom().choice(LISTENED_ON)))
            return int(listener.getsockname()[1])


def run_ranks(script: Path, arguments: Sequence[str], ranks: int, timeout: float) -> list[tuple[int, str]]:
    """(exit code, everything it printed) of each rank; on a time-out every rank is killed (code -9)."""
    paths = os.pathsep.join(str(path) for path in (ROOT, ROOT / "tests", script.parent))
    shared = {
        **os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": "1", "PYTHONPATH": paths,
    }  # fmt: skip
    with contextlib.ExitStack() as files:
        # Files, not pipes: a rank that waits for its full pipe to be read would hang the others.
        outputs = [files.enter_context(tempfile.TemporaryFile("w+")) for _ in range(ranks)]
        processes = [
            subprocess.Popen(
                [sys.executable, str(script), *arguments], stdout=output, stderr=subprocess.STDOUT,
                env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            )
            for rank, output in enumerate(outputs)
        ]  # fmt: skip
        deadline = time.monotonic() + timeout
        try:
            while any(p.poll() is None for p in processes) and time.monotonic() < deadline:
                if any(p.poll() not in (None, 0) for p in processes):
                    deadline = min(deadline, time.monotonic() + 15)  # the others may still say why
                time.sleep(0.05)
        finally:
            for process in processes:
                process.kill()
        ended = []
        for process, output in zip(processes, outputs, strict=True):
            output.seek(0)
            ended.append((process.wait(), output.read()))
    return ended
