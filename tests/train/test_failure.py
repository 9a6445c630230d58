"""The culprit's error is the last thing on the screen, under every launcher, and the run ends with a code."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from orchestrator.errors import ConfigError
from orchestrator.train import failure
from orchestrator.train.launcher import PeerFailure

WORKER = Path(__file__).parent / "failing_worker.py"
ROOT = Path(__file__).resolve().parents[2]
LAUNCHERS = {
    "deepspeed": [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2"],
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"],
}


def launch(launcher: str, how: str, tmp_path: Path) -> tuple[int, str]:
    from ranks import free_port

    port = {"deepspeed": f"--master_port={free_port()}", "torchrun": f"--master-port={free_port()}"}[launcher]
    environment = {**os.environ, "FAIL": how, "FAIL_LOG": str(tmp_path / "train.log"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*LAUNCHERS[launcher], port, str(WORKER)], env=environment, text=True, timeout=60,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    return done.returncode, done.stdout.rstrip().rstrip("=").rstrip()


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_an_unexpected_error_of_one_rank_comes_last_with_its_rank(launcher, tmp_path):
    code, screen = launch(launcher, "raise", tmp_path)
    assert code != 0 and screen.endswith("rank 1: RuntimeError: the second rank broke")
    assert "closed by peer" not in screen
    log = (tmp_path / "train.log").read_text()
    assert "Traceback (most recent call last)" in log and "failing_worker.py" in log


def test_an_error_of_the_users_input_is_said_once(tmp_path):
    code, screen = launch("deepspeed", "everyone", tmp_path)
    assert code != 0 and screen.count("the file is empty") == 1 and screen.endswith("-> give another")


def test_an_error_that_one_rank_alone_meets_is_said_by_it(tmp_path):
    code, screen = launch("torchrun", "user", tmp_path)
    assert code != 0 and screen.endswith("rank 1, extra: 7 elements live, 0 expected")


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_killed_rank_ends_the_run_and_the_screen_says_what_it_means(launcher, tmp_path):
    code, screen = launch(launcher, "kill", tmp_path)
    assert code != 0 and "closed by peer" not in screen
    assert ("SIGKILL" if launcher == "torchrun" else "ended without a word") in screen


def test_what_only_reports_another_ranks_death_is_known():
    for text in (
        "[../gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1",
        "NCCL error: remote process exited",
    ):
        assert failure.is_peers_fault(RuntimeError(text))
    assert failure.is_peers_fault(ConnectionResetError("Connection reset by peer")) and failure.is_peers_fault(PeerFailure("x"))
    for error in (RuntimeError("shape mismatch"), ValueError("connection closed by peer"), ConfigError("nccl")):
        assert not failure.is_peers_fault(error)


def test_without_a_log_the_whole_traceback_is_shown():
    try:
        raise KeyError("x")
    except KeyError as error:
        text = failure.describe(error, 0, 1, None)
        assert text.startswith("Traceback") and text.endswith("KeyError: 'x'")
        assert failure.describe(error, 3, 4, None).endswith("rank 3: KeyError: 'x'")


def test_the_watcher_prints_once_the_watched_process_has_ended():
    code = (
        "import subprocess\n"
        "from orchestrator.train.failure import print_after\n"
        "print(print_after(subprocess.Popen(['sleep', '0.7']).pid, 'the last word'), flush=True)\n"
    )
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, timeout=30, cwd=ROOT)
    assert (done.stdout, done.stderr) == ("True\n", "\nthe last word\n") and time.monotonic() - began > 0.7
