"""Every recipe trains: as it is, but for a small model of its own family, short samples and this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from ctypes.util import find_library
from pathlib import Path

import pytest
from recipes import second_runs

from orchestrator.config import compose
from orchestrator.config.catalog import groups

ROOT = Path(__file__).resolve().parents[2]
SMALL = [
    "model.path=random", "model.hidden_size=64", "model.intermediate_size=160", "model.num_hidden_layers=2",
    "model.num_attention_heads=4", "model.num_key_value_heads=2", "model.head_dim=16", "data.seq_len=64", "batch.global_size=4",
    "batch.micro=2", "run.steps=2", "cluster=local", "precision=bf16", "plan.on_misfit=ignore", "model.vocab_size=4096",
]  # fmt: skip
NAMES = [choice.name for choice in groups()["recipe"] if choice.name != "none"]
ON_A_DISK = "llama3_70b_nvme"
LARGER = ["model.vocab_size=32768", "batch.global_size=4"]
"""What a rank keeps of a weight rests on the disk from 1 MiB on."""

QUICK = ("small_sft_2048",)


def train(words: list[str], ranks: int, folder: Path) -> None:
    """Train in `folder` with the words of a recipe and small dimensions.

    Raises:
        AssertionError: the run failed; the text is what it said.
    """
    launcher = [sys.executable]
    if ranks > 1:
        launcher = [str(Path(sys.executable).with_name("torchrun")), "--nproc-per-node=2", "--rdzv-backend=c10d",
                    "--rdzv-endpoint=127.0.0.1:0"]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*launcher, str(ROOT / "launch/train.py"), *words],
        capture_output=True, text=True, timeout=900, env=environment, check=False, cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in NAMES])
def test_a_recipe_trains_a_small_model_of_its_family(name: str, tmp_path: Path) -> None:
    """And where it says how to go on, goes on from what it has left."""
    if name == ON_A_DISK and not find_library("aio"):
        pytest.skip("needs libaio to read a disk asynchronously (apt-get install libaio-dev)")
    spec = compose([f"recipe={name}"])
    more = LARGER if name == ON_A_DISK else []
    if spec.data.format == "text":
        (tmp_path / "text.txt").write_text("It rains in the valley, and the river rises.\n\n" * 40, encoding="utf-8")
        more = [f"data.path={tmp_path}/text.txt"]
    if spec.tuning.adapters:
        more = [*more, "tuning.rank=4"]
    train([f"recipe={name}", *SMALL, *more, f"run.dir={tmp_path}/run"], spec.strategy.ranks, tmp_path)
    assert (tmp_path / "run" / "export").is_dir()
    if name in second_runs():
        words = [word.replace("RUN/export", f"{tmp_path}/run/export") for word in second_runs()[name][0]]
        kept = [word for word in SMALL if not word.startswith("model.")]
        train([*words, *kept, *more, f"run.dir={tmp_path}/second"], 1, tmp_path)
        assert (tmp_path / "second" / "export").is_dir()
