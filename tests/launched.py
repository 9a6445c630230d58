"""A real launch command, one of whose ranks hangs or dies (tests/train/hanging_worker.py), and how it ends."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
from ranks import ROOT, free_port

WORKER = ROOT / "tests" / "train" / "hanging_worker.py"
SMALL = (
    "model=tiny", "model.hidden_size=32", "model.head_dim=8", "model.intermediate_size=64", "model.num_hidden_layers=2",
    "batch.global_size=8", "data.seq_len=64", "run.steps=6", "export.format=none",
)  # fmt: skip
LAUNCHERS = {
    "torchrun": ("-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port={port}", "--shutdown-timeout=2"),
    "deepspeed": ("-m", "deepspeed.launcher.runner", "--num_gpus=2", "--master_port={port}"),
}
STRATEGIES = {"torchrun": "fsdp=full_shard", "deepspeed": "zero=stage2"}


@dataclass(frozen=True)
class Ended:
    """`seconds` passed from the hang until the last rank had ended, `launcher_seconds` until the launcher had; `orphans` are
    processes that live on."""

    code: int
    screen: str
    log: str
    seconds: float
    launcher_seconds: float
    orphans: int


def _marked(mark: str) -> dict[int, psutil.Process]:
    """The living processes with `mark` in their environment, by their number."""
    found = {}
    for process in psutil.process_iter():
        try:
            if process.environ().get("MARK") == mark and process.status() != psutil.STATUS_ZOMBIE:
                found[process.pid] = process
        except psutil.Error:
            continue
    return found


def _ranks(processes: dict[int, psutil.Process]) -> int:
    """How many of them are ranks, with the launcher for a parent: what a rank leaves behind to speak for it has none."""
    count = 0
    for process in processes.values():
        try:
            count += "LOCAL_RANK" in process.environ() and process.ppid() in processes
        except psutil.Error:
            continue
    return count


def launched(launcher: str, how: str, victim: int, folder: Path, limit: float) -> Ended:
    """How a run of two ranks ends whose rank `victim` hangs or dies at its third step, with run.timeout at `limit` seconds."""
    mark, hung = f"launched-{os.getpid()}-{folder.name}", folder / "hung"
    words = [word.format(port=free_port()) for word in LAUNCHERS[launcher]]
    command = [
        sys.executable,
        *words,
        str(WORKER),
        STRATEGIES[launcher],
        f"run.timeout={limit}",
        f"run.dir={folder}/run",
        *SMALL,
    ]
    environment = {
        **os.environ, "HANG": how, "VICTIM": str(victim), "HUNG": str(hung), "MARK": mark, "XDG_CACHE_HOME": str(folder),
        "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    with (folder / "screen").open("w") as screen:
        started = subprocess.Popen(command, env=environment, stdout=screen, stderr=subprocess.STDOUT)
        deadline, ended = time.monotonic() + 300, None
        while started.poll() is None and time.monotonic() < deadline:
            if ended is None and hung.exists() and not _ranks(_marked(mark)):
                ended = time.time()
            time.sleep(0.1)
        over = time.time()
    if started.poll() is None:
        started.kill()
    began = float(hung.read_text())
    time.sleep(1.5)  # the process that speaks after the launcher
    orphans = _marked(mark)
    for process in orphans.values():
        process.kill()
    return Ended(
        started.wait(), (folder / "screen").read_text(), (folder / "run" / "train.log").read_text(),
        round((ended or over) - began, 2), round(over - began, 2), len(orphans),
    )  # fmt: skip
