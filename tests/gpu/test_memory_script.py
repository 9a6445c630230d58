"""The script for a real card, in miniature on the CPU: it measures, and what it measures is what was predicted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu" / "memory.py"


def run(*arguments: str, timeout: float = 600) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", str(SCRIPT), *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment, cwd=ROOT)
    assert ended.returncode == 0, ended.stderr[-3000:] + ended.stdout[-1000:]
    return ended.stdout


def test_smoke_measures_what_was_predicted(tmp_path: Path) -> None:
    out = tmp_path / "runs"
    assert "1 measured, 0 failed" in run("measure", "--smoke", "--only", "zero2-lora", "--out", str(out))
    run("compare", str(out), "--json", str(tmp_path / "result.json"))
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["summary"]["requested"] == {
        "runs": 1, "median": 0.0, "worst": 0.0, "worst_run": "smoke-llama32_1b-zero2-lora-2048x1-full-4ranks",
    }  # fmt: skip
    assert result["about"]["deepspeed"]


def test_there_are_enough_runs_and_none_is_there_twice() -> None:
    code = "import sys; sys.path[:0] = sys.argv[1:]; from cases import all_cases; print(len(all_cases()))"
    paths = [str(ROOT), str(SCRIPT.parent)]
    ended = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True, timeout=60, check=True)
    assert int(ended.stdout) >= 40


@pytest.mark.gpu
def test_one_real_run(tmp_path: Path) -> None:
    """On a card: a 0.5 B model, plain, and the prediction of what was allocated within a hundredth."""
    out = tmp_path / "runs"
    run("measure", "--only", "qwen25_0_5b-plain-full-1024", "--out", str(out))
    run("compare", str(out), "--json", str(tmp_path / "result.json"))
    assert abs(json.loads((tmp_path / "result.json").read_text())["summary"]["allocated"]["worst"]) <= 0.01
