"""Ranks that would not run the same stop before the first step, and who differs is named."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist
from ranks import free_port

from orchestrator.config import compose
from orchestrator.errors import ConfigError
from orchestrator.train.meeting import Hello, check_alike, differences, facts, meet, open_store


def hello(rank: int, **about: object) -> Hello:
    return Hello(rank, 4, f"n{rank // 2}", about)


def test_who_differs_from_most_is_named_with_both_values():
    (fault,) = differences([hello(0, seed=1), hello(1, seed=1), hello(2, seed=7), hello(3, seed=1)])
    assert (fault.field, fault.problem) == ("seed", "rank 2 on n1 has 7; the other 3 have 1")


def test_of_two_equal_parties_that_of_rank_0_counts_as_usual():
    (fault,) = differences([hello(0, seed=1), hello(1, seed=2)])
    assert fault.problem.startswith("rank 1 on n0 has 2")


def test_what_each_machine_measures_may_differ():
    here = facts(compose(["zero=stage2"], ranks=2))
    assert "cluster.host_bytes" not in here and here["batch.global_size"] == 16
    assert "cluster.host_bytes" in facts(compose(["zero=stage2", "cluster=4xa10"]))


def test_data_that_differ_are_named():
    check_alike([("n0", {"data": "a"}), ("n1", {"data": "a"})])
    with pytest.raises(ConfigError, match=r'data: rank 1 on n1 has "b"; the other 1 have "a"'):
        check_alike([("n0", {"data": "a"}), ("n1", {"data": "b"})])


def test_a_rank_that_is_there_twice_is_refused():
    store = dist.HashStore()
    store.add("count/0", 1)
    with pytest.raises(ConfigError, match="two processes say that they are rank 0"):
        meet(store, 0, 1, {}, timedelta(seconds=1))


def test_a_rank_that_does_not_come_is_named():
    with pytest.raises(ConfigError, match=r"rank 1, 2 of 3 has not come within .*; there are 1 on "):
        meet(dist.HashStore(), 0, 3, {}, timedelta(seconds=0.5))


def test_a_taken_port_is_named_with_the_flag_that_helps(monkeypatch):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(port))
        with pytest.raises(ConfigError, match=rf"port {port} is taken(.|\n)*--master_port={port + 1}"):
            open_store(0, timedelta(seconds=2))


def test_two_machines_started_with_different_words_both_say_who_differs(tmp_path):
    port = str(free_port())
    train = Path(__file__).resolve().parents[2] / "launch" / "train.py"

    def start(rank: int, *words: str) -> subprocess.Popen[str]:
        environment = {
            **os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        command = [sys.executable, str(train), "zero=stage2", *words]
        return subprocess.Popen(
            command, cwd=tmp_path, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    ranks = [start(0, "seed=1"), start(1, "seed=2")]
    screens = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2] and not list(tmp_path.iterdir())
    assert "seed: rank 1 on " in screens[0] and "has 2; the other 1 have 1" in screens[0]
