import json
import math
import sys

import pytest

from orchestrator.errors import ConfigError
from orchestrator.train.metrics import Metrics, drop_after, open_tracker, read_metrics


def test_lines_are_there_at_once_and_infinities_become_null(tmp_path):
    metrics = Metrics(tmp_path / "metrics.jsonl")
    metrics.write({"step": 1, "loss": math.nan, "grad_norm": math.inf, "finite": False})
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": None, "grad_norm": None, "finite": False}]
    metrics.close()


def test_a_torn_last_line_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    assert read_metrics(path) == [{"step": 1}]


def test_nothing_is_written_behind_a_torn_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    drop_after(path, 1)
    metrics = Metrics(path)
    metrics.write({"step": 2})
    metrics.close()
    assert read_metrics(path) == [{"step": 1}, {"step": 2}]


def test_resuming_keeps_one_line_for_each_step_and_a_backup(tmp_path):
    path = tmp_path / "metrics.jsonl"
    text = "".join(json.dumps({"step": step}) + "\n" for step in range(1, 6))
    path.write_text(text)
    assert drop_after(path, 3) == 2
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3]
    assert (tmp_path / "metrics.jsonl.bak").read_text() == text
    assert drop_after(path, 3) == 0
    assert drop_after(path, 1) == 2 and (tmp_path / "metrics.jsonl.bak2").exists()


def test_tensorboard_gets_the_numbers(tmp_path):
    pytest.importorskip("tensorboard")
    metrics = Metrics(tmp_path / "metrics.jsonl", open_tracker("tensorboard", tmp_path))
    metrics.write({"step": 1, "loss": 2.5, "finite": True})
    metrics.close()
    assert b"loss" in next((tmp_path / "tensorboard").iterdir()).read_bytes()


@pytest.mark.parametrize(("tracker", "module"), [("wandb", "wandb"), ("tensorboard", "torch.utils.tensorboard")])
def test_a_missing_package_is_named_with_its_remedy(tmp_path, monkeypatch, tracker, module):
    monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    with pytest.raises(ConfigError, match=rf"'{tracker}', which is not installed\n.*pip install {tracker}, or set logger=none"):
        open_tracker(tracker, tmp_path)


def test_none_is_no_tracker(tmp_path):
    assert open_tracker("none", tmp_path) is None
