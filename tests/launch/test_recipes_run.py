"""Every recipe trains: as it is, but for a small model of its own family, short samples and this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.config import compose
from orchestrator.config.catalog import groups

ROOT = Path(__file__).resolve().parents[2]
SMALL = [
    "model.path=random", "model.hidden_size=64", "model.intermediate_size=160", "model.num_hidden_layers=2",
    "model.num_attention_heads=4", "model.num_key_value_heads=2", "model.head_dim=16", "data.seq_len=64", "batch.global_size=4",
    "batch.micro=2", "run.steps=2", "cluster=local", "precision=bf16", "plan.on_misfit=ignore", "model.vocab_size=4096",
]  # fmt: skip
NAMES = [choice.name for choice in groups()["recipe"] if choice.name not in ("none", "llama3_70b_nvme")]
"""The run on a disk needs DeepSpeed's asynchronous reader, which compiles for minutes; the tests of offload=nvme have it."""

QUICK = ("small_sft_2048",)


def run(name: str, folder: Path) -> subprocess.CompletedProcess[str]:
    spec = compose([f"recipe={name}"])
    more = []
    if spec.data.format == "text":
        (folder / "text.txt").write_text("It rains in the valley, and the river rises.\n\n" * 40, encoding="utf-8")
        more = [f"data.path={folder}/text.txt"]
    if spec.tuning.adapters:
        more.append("tuning.rank=4")
    if spec.strategy.ranks > 1:
        launcher = [str(Path(sys.executable).with_name("torchrun")), "--nproc-per-node=2", "--rdzv-backend=c10d",
                    "--rdzv-endpoint=127.0.0.1:0"]  # fmt: skip
    else:
        launcher = [sys.executable]
    command = [*launcher, str(ROOT / "launch/train.py"), f"recipe={name}", *SMALL, *more, f"run.dir={folder}/run"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment, check=False, cwd=folder)


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in NAMES])
def test_a_recipe_trains_a_small_model_of_its_family(name: str, tmp_path: Path) -> None:
    done = run(name, tmp_path)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert (tmp_path / "run" / "export").is_dir()
