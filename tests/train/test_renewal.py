"""Out of memory in a step with health.on_oom=halve: real ranks, a real allocation that fails, and the attempt after it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from ranks import free_port, run_ranks

from orchestrator.spec import Batch
from orchestrator.train import commit
from orchestrator.train.metrics import read_metrics
from orchestrator.train.renewal import halved

WORKER = Path(__file__).with_name("oom_worker.py")
SMALL = (
    "model=tiny", "model.hidden_size=32", "model.head_dim=8", "model.intermediate_size=64", "model.num_hidden_layers=2",
    "batch.global_size=8", "data.seq_len=64", "run.steps=5", "checkpoint.every=1", "precision=fp32", "export.format=none",
    "tuning=lora",
)  # fmt: skip


def losses(folder: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in read_metrics(folder / "metrics.jsonl")]


def trained(folder: Path, ranks: int, words: tuple[str, ...], room: int, monkeypatch) -> list[tuple[int, str]]:
    monkeypatch.setenv("ROOM", str(room))
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder.parent / "cache"))
    arguments = [*SMALL, *words, f"run.dir={folder}", f"data.cache_dir={folder.parent / 'cache'}"]
    return run_ranks(WORKER, arguments, ranks, timeout=900)


@pytest.mark.parametrize(
    ("words", "ranks"),
    [
        ((), 1),
        pytest.param(("zero=stage3",), 2, marks=pytest.mark.slow),
        pytest.param(("fsdp=full_shard",), 2, marks=pytest.mark.slow),
        pytest.param(("zero=stage2",), 2, marks=pytest.mark.slow),
        pytest.param(("tensor=2",), 2, marks=pytest.mark.slow),
    ],
)
def test_all_ranks_begin_anew_with_half_the_micro_batch_and_the_result_is_the_same(
    words, ranks, tmp_path, monkeypatch, execute, small
):
    """Held to one plain rank that takes half the micro-batch from the start."""
    micro = 8 if ranks == 1 or "tensor=2" in words else 4  # one forward a step
    halving = (*words, f"batch.micro={micro}", "health.on_oom=halve")
    ended = trained(tmp_path / "run", ranks, halving, micro // 2, monkeypatch)
    assert [code for code, _ in ended] == [0] * ranks, "\n".join(text[-2000:] for _, text in ended)
    screen = ended[0][1]
    assert f"attempt  2: rank {ranks - 1} ran out of memory in step 3, forward or backward" in screen
    assert f"now batch.micro={micro // 2} × 2 forwards" in screen and screen.count("plan     ") == 2
    assert json.loads((tmp_path / "run" / f"memory-end-rank-{ranks - 1:05d}.json").read_text())["step"] == 3
    assert "resume   after step 2 of 5" in screen
    execute(small(*SMALL, f"batch.micro={micro // 2}", f"run.dir={tmp_path / 'half'}"))
    found, whole = losses(tmp_path / "run"), losses(tmp_path / "half")
    assert [step for step, _ in found] == [1, 2, 3, 4, 5]
    assert [loss for _, loss in found] == pytest.approx([loss for _, loss in whole], rel=1e-6)
    assert json.loads((tmp_path / "run" / "spec.json").read_text())["batch"]["micro"] == micro // 2


@pytest.mark.slow
def test_an_evaluation_without_memory_begins_anew_too(tmp_path, monkeypatch):
    monkeypatch.setenv("WHERE", "evaluation")
    words = ("batch.micro=8", "health.on_oom=halve", "eval.every=2", "data.eval_fraction=0.1")
    ((code, screen),) = trained(tmp_path / "run", 1, words, 4, monkeypatch)
    assert code == 0 and "ran out of memory in step 2, evaluation; now batch.micro=4" in screen, screen[-3000:]
    assert "resume   after step 2 of 5" in screen
    kept = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert ["eval_loss" in line for line in kept] == [False, False, False, True, True]


@pytest.mark.slow
@pytest.mark.parametrize("words", [("zero=stage3",), ("fsdp=full_shard",), ("zero=stage1",)])
@pytest.mark.parametrize(("where", "step"), [("evaluation", 2), ("saving", 2)])
def test_a_rank_without_memory_outside_of_a_step_ends_all_ranks(where, step, words, tmp_path, monkeypatch):
    """As a person starts it: the launcher ends the others, and the screen says why."""
    monkeypatch.setenv("WHERE", where)
    monkeypatch.setenv("ROOM", "0")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(WORKER.parents[2]))
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}", WORKER,
        *SMALL, *words, "eval.every=2", "data.eval_fraction=0.1", f"run.dir={tmp_path}/run", f"data.cache_dir={tmp_path}/cache",
    ]  # fmt: skip
    done = subprocess.run([*map(str, command)], text=True, capture_output=True, timeout=400)
    assert done.returncode == 1 and f"rank 1, step {step}, {where}" in done.stderr
    assert "exitcode  : 3" in done.stderr and "resume=auto goes on from step-000001" in done.stderr
    kept = json.loads((tmp_path / "run" / "memory-end-rank-00001.json").read_text())
    assert (kept["step"], kept["phase"]) == (step, where) and kept["found"]
    newest = commit.saved_steps(tmp_path / "run" / "checkpoints")[-1]
    assert newest.name == "step-000001" and list(commit.problems(newest)) == []


def test_a_batch_is_halved_without_changing_what_a_step_holds():
    assert halved(Batch(16, 8, 1)) == Batch(16, 4, 2)
    assert halved(Batch(12, 6, 2)) == Batch(12, 3, 4)
    assert halved(Batch(9, 3, 3)) == Batch(9, 1, 9)
    assert halved(Batch(4, 1, 4)) is None
