"""A rank that hangs is named with its step and its stack, the others end, and no process is left. tests/faults/hangs.py has
more ways to hang, without a launcher."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist
from launched import LAUNCHERS, launched
from ranks import free_port

from orchestrator.train.board import Board
from orchestrator.train.verdict import State, culprits, silent_launcher, verdict

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


KEEPER = "import sys, time, torch.distributed as d; s = d.TCPStore('127.0.0.1', int(sys.argv[1]), None, True); time.sleep(600)"


def test_nobody_waits_for_a_store_that_neither_answers_nor_refuses():
    """One that is stopped, and then killed."""
    port = free_port()
    keeper = subprocess.Popen([sys.executable, "-c", KEEPER, str(port)])
    try:
        board = Board(dist.TCPStore("127.0.0.1", port, None, False, timeout=timedelta(seconds=120)), 0, 1)
        told = board.look(state(0), 60)
        assert told is not None and told[0] == (1, state(0)) and board.first == state(0)
        keeper.send_signal(signal.SIGSTOP)
        os.waitpid(keeper.pid, os.WUNTRACED)  # until it has stopped: it may answer until then
        began = time.monotonic()
        assert board.look(state(0), 0.1, 0.5) is None and not board.lost and 0.4 < time.monotonic() - began < 5
        keeper.kill()
        assert board.look(state(0), 60) is None and board.lost and time.monotonic() - began < 30
        board.close()
    finally:
        keeper.kill()
        keeper.wait()


def test_a_store_that_is_torchruns_is_named_as_such():
    text = silent_launcher("n0", 21.0, Path("runs/x/train.log")).report()
    assert "torchrun on n0: does not answer since 21" in text and "look at n0; where this rank stands is in runs/x" in text


@pytest.mark.parametrize(
    ("launcher", "how", "victim"),
    [
        ("deepspeed", "stop", 0),  # who keeps the store
        pytest.param("deepspeed", "stop", 1, marks=pytest.mark.slow),
        pytest.param("torchrun", "stop", 0, marks=pytest.mark.slow),
        pytest.param("torchrun", "stop", 1, marks=pytest.mark.slow),
        pytest.param("torchrun", "lock", 1, marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_does_not_answer_is_named_and_ended(launcher, how, victim, tmp_path):
    ended = launched(launcher, how, victim, tmp_path, 10)
    screen = ended.screen
    assert ended.code != 0 and f"rank {victim} on " in screen and "does not answer" in screen
    assert f"rank {1 - victim} on" not in screen and ended.orphans == 0
    assert f"rank {1 - victim}, step 3" in ended.log and "/torch/distributed/" in ended.log


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_is_killed_is_named(launcher, victim, tmp_path):
    ended = launched(launcher, "kill", victim, tmp_path, 60)
    assert ended.code != 0 and ended.orphans == 0 and ended.seconds < 60
    named = "Rank {} on" if launcher == "deepspeed" else "local_rank: {})"
    assert named.format(victim) in ended.screen
