"""The script that clocks steps on a real card, in miniature on the CPU: what it compares, it can run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu" / "speed.py"


def summary(folder: Path, *only: str) -> dict[str, Any]:
    """What `summary` writes about a measurement in miniature."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for words in (
        ["measure", "--smoke", "--out", str(folder), *only],
        ["summary", str(folder), "--json", str(folder / "all.json")],
    ):
        command = [sys.executable, "-W", "ignore", str(SCRIPT), *words]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment, cwd=ROOT, check=False)
        assert ended.returncode == 0, ended.stdout + ended.stderr[-3000:]
    found: dict[str, Any] = json.loads((folder / "all.json").read_text())
    return found


def test_ours_and_the_trainer_take_the_same_steps(tmp_path: Path) -> None:
    found = summary(tmp_path, "--only", "8b-lora-recompute")
    ours, trainer = found["results"]["8b-lora-recompute"], found["results"]["8b-lora-recompute-trainer"]
    assert trainer["case"]["against"] == ours["case"]["name"]
    for each in (ours, trainer):
        assert (each["tokens"], each["learned"]) == (2 * 64, 2 * 63) and len(each["seconds"]) == 2
    assert ours["flop"] == trainer["flop"] > 0
    assert found["about"]["card_of_plan"]["name"] == "H100" and ours["predicted_seconds"] > 0


@pytest.mark.slow
def test_every_measurement_runs(tmp_path: Path) -> None:
    results = summary(tmp_path, "--minutes", "30")["results"]
    refused = {name: result["error"] for name, result in results.items() if "error" in result}
    assert set(refused) <= {"1b-full-liger", "8b-qlora"} and all("not installed" in why for why in refused.values())
    assert len(results) == 17
    assert results["1b-full-sample-packed"]["tokens"] > 1.5 * results["1b-full-sample-padded"]["tokens"] / 4
