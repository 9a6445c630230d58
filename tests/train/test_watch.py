"""A rank that hangs is named with its step and its stack, the others end, and no process is left. tests/faults/hangs.py has
more ways to hang, without a launcher."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from ranks import free_port

from orchestrator.train.watch import State, culprits, verdict

WORKER = Path(__file__).parent / "hanging_worker.py"
SMALL = (
    "model=tiny", "model.hidden_size=32", "model.head_dim=8", "model.intermediate_size=64", "model.num_hidden_layers=2",
    "batch.global_size=8", "data.seq_len=64", "run.steps=6", "export.format=none",
)  # fmt: skip
GLOO = "/x/torch/distributed/distributed_c10d.py:1 in all_reduce"
BACKWARD = "/x/torch/autograd/graph.py:1 in _engine_run_backward"
OURS = "/x/loader.py:1 in fetch"


def state(rank: int, stack: str = GLOO, step: int = 3, order: int = 2) -> State:
    return State(rank, f"n{rank}", 100 + rank, step, "the sum of the losses", order, (stack,) if stack else ())


@pytest.mark.parametrize(
    ("states", "guilty"),
    [
        ([state(0), state(1, ""), state(2, OURS)], [1]),
        ([state(0), state(1, OURS), state(2)], [1]),
        ([state(0), state(1, BACKWARD), state(2)], [1]),
        ([state(0), state(1, order=1), state(2)], [1]),
        ([state(0), state(1, step=2, order=9), state(2)], [1]),
        ([state(0), state(1)], [0, 1]),
    ],
)
def test_the_rank_that_others_wait_for_is_found(states, guilty):
    assert [found.rank for found in culprits(states)] == guilty


def test_the_verdict_names_place_step_and_stack():
    text = verdict([state(0), state(1, OURS)], 21.0, Path("runs/x/train.log")).report()
    assert "rank 1 on n1: has not moved for 21" in text and "step 3, the sum of the losses (process 101)" in text
    assert OURS in text and "the stacks of all ranks are in runs/x/train.log" in text
    assert "look at n1" in verdict([state(0), state(1, "")], 21.0, None).report()
    assert "all 2 ranks wait for each other" in verdict([state(0), state(1)], 21.0, None).report()


def launched(how: str, folder: Path) -> tuple[int, str, float]:
    """(exit code, the screen, seconds) of two ranks of which the second hangs; every process of theirs has ended."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}",
        "--shutdown-timeout=2", WORKER, "fsdp=full_shard", "run.timeout=10", f"run.dir={folder}/run", *SMALL,
    ]  # fmt: skip
    mark = f"watched-{os.getpid()}-{how}"
    environment = {**os.environ, "HANG": how, "MARK": mark, "XDG_CACHE_HOME": str(folder), "OMP_NUM_THREADS": "1"}
    began = time.monotonic()
    done = subprocess.run([*map(str, command)], env=environment, text=True, capture_output=True, timeout=240)
    time.sleep(1.0)
    left = [process.pid for process in psutil.process_iter() if mark in _environment(process)]
    assert not left, left
    return done.returncode, done.stderr, time.monotonic() - began


def _environment(process: psutil.Process) -> str:
    try:
        return process.environ().get("MARK", "")
    except psutil.Error:
        return ""


@pytest.mark.parametrize("how", ["stop", pytest.param("lock", marks=pytest.mark.slow)])
def test_a_rank_that_does_not_answer_is_named_and_ended(how, tmp_path):
    code, screen, _ = launched(how, tmp_path)
    assert code != 0 and "rank 1 on " in screen and "does not answer" in screen and "rank 0 on" not in screen
    log = (tmp_path / "run" / "train.log").read_text()
    assert "rank 0, step 3" in log and "/torch/distributed/" in log
