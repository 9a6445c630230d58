"""The commands as people type them, from another folder, without installing the package."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
LORA = ["model=llama3_8b", "cluster=4xa10", "tuning=lora", "data.seq_len=2048"]


def call(script: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "RANK", "WORLD_SIZE")}
    environment |= {"XDG_CACHE_HOME": str(cwd / ".cache"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(LAUNCH / script), *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [([*LORA, "zero=stage3", "offload=cpu"], 0), ([*LORA, "zero=stage2"], 3), ([*LORA, "zero=stage9"], 2)],
)
def test_the_exit_code_is_the_verdict(tmp_path, arguments, code):
    done = call("plan.py", *arguments, "basis=layout", cwd=tmp_path)
    assert done.returncode == code, done.stderr
    if code == 2:
        assert done.stdout == "" and "zero has no choice stage9" in done.stderr
    else:
        assert done.stderr == "" and ("does not fit" in done.stdout) == ("->" in done.stdout) == (code == 3)


def test_json_is_alone_on_stdout(tmp_path):
    done = call("plan.py", *LORA, "zero=stage2", "basis=layout", "format=json", cwd=tmp_path)
    made = json.loads(done.stdout)
    assert done.returncode == 3 and made["derived"]["verdict"] == "short" and made["fixes"] and done.stderr == ""


def test_compare_writes_a_table_a_picture_and_a_page(tmp_path):
    done = call("compare.py", *LORA, "out=here", "basis=layout", cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert sum(line.startswith(("zero=", "fsdp=")) for line in done.stdout.splitlines()) >= 24
    assert {path.name for path in (tmp_path / "here").iterdir()} == {"compare.png", "compare.html"}
    crossing = ["model=qwen25_14b", "tuning=lora", "cluster=1xt4,4xa10", "basis=layout", "format=json"]
    crossed = call("compare.py", *crossing, cwd=tmp_path)
    assert {made["cluster"] for made in json.loads(crossed.stdout)} == {"1xt4", "4xa10"}


def test_fit_says_how_far_it_goes_or_what_would_help(tmp_path):
    done = call("fit.py", *LORA, "zero=stage3", "recompute=full", cwd=tmp_path)
    assert done.returncode == 0 and "8192 (model's)" in done.stdout
    short = call("fit.py", "model=llama3_70b", "tuning=lora", "cluster=1xa10", "zero=stage1", cwd=tmp_path)
    assert short.returncode == 3 and "Nothing fits as asked" in short.stdout and "->" in short.stdout
    data = json.loads(call("fit.py", *LORA, "zero=stage3", "format=json", cwd=tmp_path).stdout)
    assert data["ladder"][0]["micro"] == 1


def test_a_run_that_cannot_fit_is_refused_before_anything_is_built(tmp_path):
    done = call("train.py", "model=llama3_70b", "model.path=random", "run.steps=1", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (3, "") and "of memory for each rank" in done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) < 12
    assert not (tmp_path / "runs").exists()


def test_a_run_leaves_its_plan_and_shows_its_error(tmp_path):
    small = ["model.hidden_size=32", "model.head_dim=8", "model.intermediate_size=64", "model.num_hidden_layers=2"]
    done = call("train.py", *small, "batch.global_size=8", "data.seq_len=64", "run.steps=2", "run.dir=one", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("plan     ") and "Peak, predicted (from the layout) and measured" in done.stdout
    plan = json.loads((tmp_path / "one" / "plan.json").read_text())
    assert plan["basis"] == "layout" and plan["card"] == "cpu"
    again = call("compare.py", "runs=one", "out=here", cwd=tmp_path)
    assert again.returncode == 0 and "rank 0" in again.stdout and (tmp_path / "here" / "runs.png").exists()
