"""Ranks wait for rank 0 as long as it takes, and record what NCCL does."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import torch
from ranks import run_ranks

from orchestrator.train import world


def test_no_collective_is_open_while_rank_0_prepares() -> None:
    ended = run_ranks(Path(__file__).with_name("waiting_worker.py"), [], ranks=2, timeout=600)
    assert [code for code, _ in ended] == [0, 0], ended
    assert all("waited" in text for _, text in ended)


def test_nccl_s_flight_recorder_is_switched_on_by_names_that_torch_reads(monkeypatch):
    for name in ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_DUMP_ON_TIMEOUT", "TORCH_FR_DUMP_TEMP_FILE"):
        monkeypatch.delenv(name, raising=False)
    before = set(os.environ)
    monkeypatch.setenv("TORCH_NCCL_DUMP_ON_TIMEOUT", "0")
    world._record_collectives("/tmp/trace_")
    made = {name: os.environ[name] for name in set(os.environ) - before}
    assert made.pop("TORCH_NCCL_DUMP_ON_TIMEOUT") == "0"  # what a person has set stands
    assert int(made["TORCH_FR_BUFFER_SIZE"]) > 0 and made["TORCH_FR_DUMP_TEMP_FILE"] == "/tmp/trace_"
    for name in made:
        monkeypatch.delenv(name)
    library = (Path(torch.__file__).parent / "lib" / "libtorch_cpu.so").open("rb")
    with library, mmap.mmap(library.fileno(), 0, access=mmap.ACCESS_READ) as content:
        assert all(content.find(name.encode()) >= 0 for name in made)
