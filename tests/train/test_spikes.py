"""What counts as a spike of the loss, and what the run says and keeps of it."""

import json
import math
from dataclasses import replace

import pytest

from orchestrator.data.batch import IGNORED
from orchestrator.spec import Health
from orchestrator.train.health import Diverged
from orchestrator.train.metrics import read_metrics
from orchestrator.train.resume import Reader
from orchestrator.train.spikes import Spikes

HEALTH = Health(on_spike="rollback", spike_window=20, spike_deviations=10.0, spike_limit=1)


def seen(*losses, health=HEALTH):
    spikes = Spikes(health, {})
    return [spikes.judge(step, loss) is not None for step, loss in enumerate(losses, start=1)]


def test_a_spike_is_far_above_the_median_of_the_steps_before():
    usual = [3.0 + 0.1 * (step % 5) for step in range(20)]
    assert seen(*usual, 4.6, 4.8, 3.1, 9.0, 4.5) == [False] * 21 + [True, False, True, False]
    spikes = Spikes(HEALTH, {"losses": list(enumerate(usual))})
    assert spikes.judge(21, 9.0).limit == pytest.approx(3.2 + 10 * 1.4826 * 0.1)


def test_noise_of_losses_that_hardly_differ_is_none_and_few_losses_say_nothing():
    assert not any(seen(*[2.0] * 20, 2.19))  # the deviation counts as 1 % of the median at least
    assert seen(*[2.0] * 20, 2.21)[-1]
    assert not any(seen(*[2.0] * 15, 50.0))
    assert not any(seen(*[2.0] * 20, 50.0, health=Health()))


def test_a_leap_goes_back_once_and_a_second_one_ends_the_run(small, execute, screen, monkeypatch, tmp_path):
    from orchestrator import data

    real = data.steps

    def poisoned(*arguments, **named):
        for batch in real(*arguments, **named):
            if batch.step + 1 in (20, 22):
                spoiled = [replace(m, labels=m.labels.where(m.labels == IGNORED, 2047)) for m in batch.micro_batches]
                batch = replace(batch, micro_batches=tuple(spoiled))
            yield batch

    monkeypatch.setattr(data, "steps", poisoned)
    watched = ("health.on_spike=rollback", "health.spike_limit=1", "health.spike_deviations=4", "health.spike_window=8")
    words = (*watched, "run.steps=24", "checkpoint.every=5", "optimizer.lr=3e-2", "schedule=constant", "export.format=none")
    with pytest.raises(Diverged, match=r"step 22 is a spike .*after those of steps 20\n.*raise health\.spike_limit"):
        execute(small(*words))
    run = tmp_path / "run"
    assert "back to step 15, without the samples of step 20 (1 of at most 1)" in " ".join(screen.text.split())
    (line,) = [json.loads(text) for text in (run / "audit.jsonl").read_text().splitlines()]
    assert (line["event"], line["step"], line["skipped"]) == ("rollback", 20, [20])
    assert line["loss"] > line["limit"] > line["median"]
    assert [line["step"] for line in read_metrics(run / "metrics.jsonl")] == [*range(1, 20), 21, 22]
    assert all(math.isfinite(line["loss"]) for line in read_metrics(run / "metrics.jsonl.bak"))
    assert Reader(run / "checkpoints" / "step-000015").health["skipped"] == [20]
