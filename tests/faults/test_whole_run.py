"""A whole run gives no secret of its environment away, and unpickles nothing that it reads."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SECRET = "hf_4n7canary9Zq"
SECRETS = ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY")

LISTENER = """
import os, sys

def listen(event, arguments):
    if event == "pickle.find_class":
        frame, callers = sys._getframe(1), []
        while frame is not None and len(callers) < 8:
            callers.append(frame.f_code.co_filename)
            frame = frame.f_back
        with open(os.environ["UNPICKLED"], "a") as file:
            print(*arguments[:2], *callers, file=file)

sys.addaudithook(listen)
"""
"""Python calls it for each class or function that any unpickler of the process looks up (docs.python.org, audit events)."""

OWN = ("/torch/distributed/distributed_c10d.py", "/multiprocessing/", "/concurrent/futures/")
"""Who may unpickle: the messages of a run's own ranks, and of the processes that it has started itself."""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_secrets_of_the_environment_are_in_nothing_that_a_run_leaves(tmp_path):
    """Nor are those that were typed: an argument that is refused is told, but kept nowhere. And nothing that the run reads, its
    checkpoint, its prepared data and its export among it, is unpickled."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(LISTENER)
    unpickled = tmp_path / "unpickled"
    unpickled.touch()
    environment = {
        **os.environ, **dict.fromkeys(SECRETS, SECRET), "XDG_CACHE_HOME": str(tmp_path / "cache"), "UNPICKLED": str(unpickled),
        "PYTHONPATH": str(tmp_path / "site"),
    }  # fmt: skip
    small = ["model=tiny", "model.num_hidden_layers=1", "data.seq_len=64", "tuning=lora", f"run.dir={tmp_path / 'run'}"]
    train = [sys.executable, str(ROOT / "launch" / "train.py"), *small, "logger=tensorboard"]
    for steps, more in ((2, ()), (4, ("resume=auto", "data.workers=2", f"data.cache_dir={tmp_path / 'again'}"))):
        ended = subprocess.run(
            [*train, f"run.steps={steps}", *more], env=environment, capture_output=True, text=True, timeout=400
        )
        assert ended.returncode == 0, ended.stderr
        assert SECRET not in ended.stdout + ended.stderr
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 10
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []
    told = unpickled.read_text().splitlines()
    assert told, "the messages of the ranks are pickles: the listener must hear of them"
    assert [line for line in told if not any(place in line for place in OWN)] == []
