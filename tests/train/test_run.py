"""Whole runs in this process: what stands in the folder, exact resume, stops, and refusals."""

import json
import math
import os
import signal
import sys
from pathlib import Path

import pytest
import torch

from orchestrator import model as models
from orchestrator.data import load_tokenizer
from orchestrator.engine import StepResult
from orchestrator.engine.plain import PlainEngine
from orchestrator.errors import CheckpointError, ConfigError, DataError, LayoutDrift
from orchestrator.layout import Row
from orchestrator.spec import Data, Home, RunSpec, from_json
from orchestrator.train import checkpoint, commit
from orchestrator.train.health import Diverged, MemoryEnded
from orchestrator.train.metrics import read_metrics

EXACT = ("step", "epoch", "loss", "lr", "grad_norm", "tokens", "labelled_tokens")


def lines(run):
    """The metrics of an outcome or of a run folder."""
    return read_metrics((run if isinstance(run, Path) else run.folder.path) / "metrics.jsonl")


def numbers(path):
    return [tuple(line[key] for key in EXACT) for line in lines(path)]


def test_a_run_leaves_a_folder_that_explains_itself(small, execute, screen):
    outcome = execute(small("eval.every=2", "data.eval_fraction=0.1", "logging.every=2"))
    path = outcome.folder.path
    names = {p.name for p in path.iterdir()}
    assert names == {"spec.json", "strategy.json", "metrics.jsonl", "train.log", "ledger.json", "checkpoints", "export", "done"}
    assert from_json(RunSpec, json.loads((path / "spec.json").read_text())).run.steps == 4
    assert json.loads((path / "strategy.json").read_text())["engine"]
    written = lines(path)
    assert [line["step"] for line in written] == [1, 2, 3, 4]
    for line in written:
        assert line["tokens_per_second"] == pytest.approx(line["tokens"] / line["step_seconds"])
        assert 0 <= line["data_wait_seconds"] < line["step_seconds"] and line["finite"]
    assert ["memory" in line for line in written] == [True, True, False, True]
    assert written[1]["memory"][0]["resident_peak"] >= written[1]["memory"][0]["resident"] > 2**26
    assert ["eval_loss" in line for line in written] == [False, True, False, True]
    account = json.loads((path / "ledger.json").read_text())["ranks"][0]
    assert {row["line"] for row in account["predicted"]} == {"weights", "moments"}
    assert account["measured"]["step"][0]["bytes"] == account["predicted"][0]["bytes"]
    assert (outcome.step, outcome.total, outcome.stopped) == (4, 4, False)
    assert (
        "step 4/4" in screen.text and "reopened and compared" in screen.text and "step 4/4" in (path / "train.log").read_text()
    )


def test_the_first_loss_is_the_mean_over_the_labelled_tokens_of_an_untrained_model(small, execute):
    first = lines(execute(small("run.steps=1")))[0]
    assert first["loss"] == pytest.approx(math.log(2048), rel=0.2)
    assert first["labelled_tokens_per_second"] < first["tokens_per_second"]


def test_resume_gives_the_same_numbers_as_the_uninterrupted_run(small, execute, tmp_path, screen):
    whole = execute(small(f"run.dir={tmp_path / 'whole'}", "run.steps=5"))
    execute(small("run.steps=5", "checkpoint.every=2", "export.format=none"))
    path = tmp_path / "run"
    assert sorted(p.name for p in (path / "checkpoints").iterdir()) == ["step-000004", "step-000005"]
    for file in (path / "checkpoints" / "step-000005").iterdir():
        file.unlink()  # torn: the one before it is taken
    execute(small("run.steps=5", "resume=auto"))
    assert numbers(path) == numbers(whole.folder.path)
    assert len((path / "metrics.jsonl.bak").read_text().splitlines()) == 5
    assert "resume   after step 4 of 5" in screen.text


def test_dropout_continues_where_it_stopped(small, execute, tmp_path):
    drop = ("tuning=lora", "tuning.dropout=0.5", "run.steps=3")
    whole = execute(small(f"run.dir={tmp_path / 'whole'}", *drop))
    first = execute(small("checkpoint.every=2", *drop))
    execute(small(f"run.dir={tmp_path / 'again'}", f"resume={first.folder.checkpoint(2)}", *drop))
    assert numbers(tmp_path / "again") == numbers(whole.folder.path)[2:]


def test_a_finished_run_has_nothing_left_to_do_and_its_export_is_kept(small, execute, screen):
    folder = execute(small("run.steps=1")).folder
    before = folder.ledger.read_text()
    (folder.checkpoints / ".removed-step-000000").mkdir()  # as a kill in the last save leaves it, which no other one follows
    (folder.path / ".ledger.json.new").touch()
    outcome = execute(small("run.steps=1", "resume=auto"))
    assert outcome.folder.ledger.read_text() == before
    assert [path.name for path in folder.checkpoints.iterdir()] == ["step-000001"]
    assert not list(folder.path.glob(".*"))
    assert "nothing is left to do: raise run.steps above 1" in screen.text
    assert len(lines(outcome)) == 1 and (outcome.folder.path / "export.old").is_dir()


def test_another_model_is_refused_and_nothing_is_written_over(small, execute):
    first = execute(small("run.steps=1"))
    before = {p: p.stat().st_mtime_ns for p in first.folder.path.rglob("*") if p.name != "train.log"}
    with pytest.raises(CheckpointError, match=r"model\.hidden_size: .* was saved with 32, this run has 64"):
        execute(small("run.steps=2", "resume=auto", "model.hidden_size=64"))
    with pytest.raises(CheckpointError, match=r"tuning: .* was saved with full, this run has lora"):
        execute(small("run.steps=2", "resume=auto", "tuning=lora"))
    with pytest.raises(ConfigError, match="already holds a run"):
        execute(small())
    assert before == {p: p.stat().st_mtime_ns for p in first.folder.path.rglob("*") if p.name != "train.log"}


def test_another_seed_is_refused_and_other_samples_are_told(small, execute, screen):
    execute(small("run.steps=1", "export.format=none"))
    with pytest.raises(CheckpointError, match=r"seed: .* was saved with 0, this run has 3\n.*set seed=0"):
        execute(small("run.steps=2", "resume=auto", "seed=3"))
    execute(small("run.steps=2", "resume=auto", "export.format=none"))
    assert "the checkpoint was made with" not in screen.text
    other = ("data.seq_len=48", "data.eval_fraction=0.1", "batch.global_size=4")
    execute(small("run.steps=3", "resume=auto", "export.format=none", *other))
    assert "the data, its tokenizer or data.seq_len is not what the checkpoint was made with" in screen.text
    assert "data.eval_fraction was 0.0 and is 0.1" in screen.text and "batch.global_size was 8 and is 4" in screen.text


def test_a_start_that_is_refused_leaves_no_folder_of_its_own(small, execute, tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"token id \d+, but the model has vocab_size 300"):
        execute(small("model.vocab_size=300"))
    assert not (tmp_path / "run").exists()
    monkeypatch.setitem(sys.modules, "wandb", None)  # as where it is not installed
    with pytest.raises(ConfigError, match="wandb"):
        execute(small("logger=wandb"))
    assert not (tmp_path / "run").exists()
    execute(small("run.steps=1", "export.format=none"))
    with pytest.raises(DataError):
        execute(small("run.steps=2", "resume=auto", f"data.path={Path(__file__).parent / 'conftest.py'}", "data.format=alpaca"))
    assert len(lines(tmp_path / "run")) == 1


def test_a_signal_finishes_the_step_saves_and_leaves(small, execute, monkeypatch):
    real = PlainEngine.step

    def step(self, lr):
        self.count = getattr(self, "count", 0) + 1
        if self.count == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, lr)

    monkeypatch.setattr(PlainEngine, "step", step)
    outcome = execute(small("run.steps=6"))
    assert (outcome.step, outcome.stopped, outcome.export) == (2, True, None)
    assert outcome.folder.newest_checkpoint() == outcome.folder.checkpoint(2) and not outcome.folder.export.exists()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    monkeypatch.undo()
    assert execute(small("run.steps=6", "resume=auto")).step == 6


def test_steps_that_are_not_finite_are_counted_and_ten_in_a_row_end_the_run(small, execute, monkeypatch, screen):
    monkeypatch.setattr(PlainEngine, "step", lambda self, lr: StepResult(math.inf, False))
    with pytest.raises(Diverged, match=r"10 steps in a row, up to step 10.*\n.*lower optimizer\.lr"):
        execute(small("run.steps=20"))
    assert "step 10: loss or gradient is not finite, nothing was updated (10 in a row)" in screen.text


def test_the_first_step_that_is_not_finite_ends_a_run_that_asks_for_it(small, execute, monkeypatch):
    """A real loss that is not a number, in the second step."""
    losses = []

    def loss_sum(model, batch):
        losses.append(models.loss_sum(model, batch))
        return losses[-1] * float("nan") if len(losses) == 2 else losses[-1]

    monkeypatch.setattr("orchestrator.train.run.loss_sum", loss_sum)
    with pytest.raises(Diverged, match=r"step 2 had a loss or gradient that is not finite; nothing was updated.*\n.*=skip"):
        execute(small("health.on_nonfinite=stop", "batch.micro=8"))


def starved(where, when=lambda: True):
    """The loss of the run, before which a real allocation fails where `where(model)` and `when()` say so."""

    def loss_sum(model, batch):
        if where(model) and when():
            torch.empty(2**58)
        return models.loss_sum(model, batch)

    return loss_sum


def ended(execute, spec, tmp_path):
    """(the report, what was written down) of a run that runs out of memory."""
    with pytest.raises(MemoryEnded) as caught:
        execute(spec)
    assert caught.value.exit_code == 3
    return caught.value.report(), json.loads((tmp_path / "run" / "memory-end-rank-00000.json").read_text())


def test_a_rank_without_memory_leaves_its_ledger_and_says_what_would_help(small, execute, monkeypatch, tmp_path):
    """In the forward of the second step: alone, it saves the first."""
    calls = iter(range(9))
    monkeypatch.setattr("orchestrator.train.run.loss_sum", starved(lambda model: next(calls) == 1))
    report, kept = ended(execute, small("batch.micro=8"), tmp_path)
    assert "rank 0, step 2, forward or backward" in report and "resume=auto goes on from step-000001" in report
    assert "batch.micro=4 (the global batch and the result stay)" in report and "optimizer=adamw_8bit" in report
    assert (kept["step"], kept["phase"]) == (2, "forward or backward") and kept["memory"]["resident"] > 2**26
    assert {row["line"]: row["bytes"] for row in kept["found"]} == {row["line"]: row["bytes"] for row in kept["predicted"]}


def test_an_evaluation_without_memory_ends_the_run_and_nothing_is_lost(small, execute, monkeypatch, tmp_path):
    words = ("eval.every=2", "data.eval_fraction=0.2", "export.format=none")
    whole = [line["loss"] for line in lines(execute(small(*words, f"run.dir={tmp_path / 'whole'}")))]
    with monkeypatch.context() as patched:
        patched.setattr("orchestrator.train.run.loss_sum", starved(lambda model: not model.training))
        report, kept = ended(execute, small(*words), tmp_path)
    assert "rank 0, step 2, evaluation" in report and "batch.micro=" in report and "or eval.every=0" in report
    assert "resume=auto goes on from step-000002" in report and kept["phase"] == "evaluation"
    assert {row["line"] for row in kept["found"]} == {row["line"] for row in kept["predicted"]}
    resumed = lines(execute(small(*words, "resume=auto")))
    assert [line["loss"] for line in resumed] == whole and "eval_loss" not in resumed[1] and "eval_loss" in resumed[3]


@pytest.mark.parametrize(("background", "words"), [(False, "up to 1.00 GiB of it"), (True, "use checkpoint.background=false")])
def test_a_save_without_memory_ends_the_run_and_the_checkpoint_before_is_whole(
    small, execute, monkeypatch, tmp_path, background, words
):
    real, calls = PlainEngine.save, iter(range(9))

    def save(self):
        pieces, scalars = real(self)
        return (torch.empty(2**58) if next(calls) == 1 else pieces), scalars

    monkeypatch.setattr(PlainEngine, "save", save)
    wanted = ("checkpoint.every=1", f"checkpoint.background={str(background).lower()}")
    report, kept = ended(execute, small(*wanted), tmp_path)
    assert "rank 0, step 2, saving" in report and words in report and "resume=auto goes on from step-000001" in report
    assert (kept["step"], kept["phase"]) == (2, "saving")
    assert list(commit.problems(tmp_path / "run" / "checkpoints" / "step-000001")) == []


def test_a_thread_that_writes_without_memory_ends_the_run_soon(small, execute, monkeypatch, tmp_path):
    """The run ends where it next looks, and not at the next save."""
    monkeypatch.setattr(checkpoint, "_write_rank", lambda *arguments: torch.empty(2**58))
    spec = small("checkpoint.every=1", "checkpoint.background=true", "logging.every=1")
    report, kept = ended(execute, spec, tmp_path)
    assert "use checkpoint.background=false" in report and (kept["step"], kept["phase"]) == (2, "saving")


def test_loading_without_memory_says_what_would_help(small, execute, monkeypatch, tmp_path):
    monkeypatch.setattr(PlainEngine, "adopt", lambda *arguments: torch.empty(2**58))
    report, kept = ended(execute, small(), tmp_path)
    assert "rank 0, loading the model" in report and "zero=stage3" in report and kept["found"] == []


def test_one_step_that_is_not_finite_is_survived(small, execute, monkeypatch):
    real, seen = PlainEngine.step, []

    def step(self, lr):
        seen.append(lr)
        return StepResult(math.nan, False) if len(seen) == 2 else real(self, lr)

    monkeypatch.setattr(PlainEngine, "step", step)
    written = lines(execute(small()))
    assert [line["finite"] for line in written] == [True, False, True, True] and written[1]["grad_norm"] is None


def test_tensors_that_the_layout_does_not_know_stop_the_run(small, execute, monkeypatch):
    real = PlainEngine.census
    monkeypatch.setattr(PlainEngine, "census", lambda self: (*real(self), Row("extra", "fp32", Home.GPU, 7)))
    with pytest.raises(LayoutDrift, match="rank 0, extra"):
        execute(small())


def test_eval_is_the_token_mean_of_the_held_out_samples_whatever_the_batch(small, execute, tmp_path):
    wanted = ("eval.every=1", "data.eval_fraction=0.2", "run.steps=1")
    one = lines(execute(small(*wanted, "batch.micro=8")))[0]["eval_loss"]
    other = lines(execute(small(*wanted, "batch.micro=1", f"run.dir={tmp_path / 'other'}")))[0]["eval_loss"]
    assert one == pytest.approx(other, rel=1e-6) and one > 6


def test_the_vocabulary_of_the_data_must_fit_the_model(small, execute):
    with pytest.raises(ValueError, match="model has vocab_size 100"):
        execute(small("model.vocab_size=100"))


def test_half_precision_exports_in_its_dtype(small, execute):
    from transformers import AutoModelForCausalLM

    outcome = execute(small("precision=bf16", "run.steps=1"))
    assert AutoModelForCausalLM.from_pretrained(outcome.export, dtype="auto").dtype is torch.bfloat16


def test_a_run_on_raw_text_needs_no_chat_template_to_the_end(small, execute, tmp_path):
    """Packed raw text with a tokenizer that has no template: trained, exported, and asked to go on."""
    from orchestrator.train.reopen import answer, open_model

    bare = load_tokenizer(Data(path=None, seq_len=8), None)
    bare.chat_template = None
    bare.save_pretrained(tmp_path / "bare")
    (tmp_path / "text.txt").write_text("".join(f"Line {number} of the text is here.\n" for number in range(60)))
    spec = small(f"data.path={tmp_path / 'text.txt'}", f"data.tokenizer={tmp_path / 'bare'}", "data.packing=best_fit")
    outcome = execute(spec)
    model, tokenizer = open_model(outcome.export)
    assert isinstance(answer(model, tokenizer, "Line 1", 4), str)
    line = read_metrics(outcome.folder.metrics)[0]
    assert line["labelled_tokens"] > 0.9 * line["tokens"]
    assert line["padded_tokens"] >= line["tokens"]


def test_a_packed_and_weighted_run_resumed_in_mid_epoch_repeats_the_uninterrupted_one(small, execute, tmp_path):
    """The second epoch shows other rows of the half-weighted source; the break lies within the first."""
    for name, count in (("a", 40), ("b", 60)):
        rows = [{"instruction": f"{name} {number}?", "output": f"answer {number} " * 3} for number in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = f"data.sources=[{{path:{tmp_path}/a.jsonl}},{{path:{tmp_path}/b.jsonl,weight:0.5}}]"
    words = [sources, "data.packing=best_fit", "batch.global_size=4", "batch.micro=2", "data.seq_len=128"]
    whole = execute(small(*words, "run.steps=8", f"run.dir={tmp_path / 'whole'}"))
    execute(small(*words, "run.steps=8", "checkpoint.every=4", f"run.dir={tmp_path / 'cut'}"))
    first = tmp_path / "cut" / "checkpoints" / "step-000004"
    again = execute(small(*words, "run.steps=8", f"resume={first}", f"run.dir={tmp_path / 'again'}"))
    losses = [[line["loss"] for line in read_metrics(outcome.folder.metrics)] for outcome in (whole, again)]
    epochs = [line["epoch"] for line in read_metrics(whole.folder.metrics)]
    assert losses[1] == losses[0][4:]
    assert epochs[3:5] == [0, 0] and epochs[-1] == 1
