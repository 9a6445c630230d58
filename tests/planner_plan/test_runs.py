"""Predicted beside measured: in the report of one run, and for several runs."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from orchestrator.config import compose
from orchestrator.errors import CheckpointError, ConfigError
from orchestrator.planner.predict import by_layout
from orchestrator.planner.screen import fixes, need, screen
from orchestrator.report import plans, runs
from orchestrator.report.record import Record, load, load_all
from orchestrator.report.tables import drift, planned
from orchestrator.spec import to_json
from orchestrator.train.folder import RunFolder, write_json
from orchestrator.units import GIB

LORA = ["model=llama3_8b", "cluster=4xa10", "tuning=lora", "data.seq_len=2048", "zero=stage3"]


def run_folder(path: Path, *, on_card: bool = True) -> Record:
    """A run folder on disk as launch/train.py leaves it, read back."""
    spec = compose(LORA if on_card else ["model=tiny", "zero=stage1"])
    made = by_layout(spec)
    folder = RunFolder(path)
    path.mkdir()
    ranks = []
    for rank in range(spec.strategy.ranks):
        held = {
            "rank": rank,
            "resident": GIB,
            "resident_peak": 2 * GIB,
            "allocated": None,
            "reserved": None,
            "device_used": None,
        }
        if on_card:
            used = made.memory.used + rank * GIB // 10
            held |= {"allocated": made.memory.allocated, "reserved": made.memory.reserved, "device_used": used}
        ranks.append({"rank": rank, "predicted": [], "measured": {}, "memory": held})
    write_json(folder.spec, to_json(spec))
    write_json(folder.plan, made.to_json())
    write_json(folder.ledger, {"strategy": spec.strategy.label, "ranks": ranks})
    lines = [
        {"step": step, "loss": 1.0, "step_seconds": seconds, "tokens_per_second": 10.0} for step, seconds in ((1, 9), (2, 4))
    ]
    folder.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return load(path)


def shown(what) -> str:
    file = io.StringIO()
    plans.show(what, Console(file=file))
    return file.getvalue()


def test_a_run_is_read_with_its_plan(tmp_path):
    record = run_folder(tmp_path / "a")
    assert record.plan is not None and record.plan == by_layout(record.spec)
    text = "".join(shown(part) for part in planned(record))
    assert "predicted (from the layout) and measured" in text and "card used" in text and "(+0.0 %)" in text
    assert planned(replace(record, plan=None)) == []
    (tmp_path / "a" / "plan.json").unlink()
    assert load(tmp_path / "a").plan is None


def test_on_a_cpu_the_process_is_what_is_compared(tmp_path):
    text = "".join(shown(part) for part in planned(run_folder(tmp_path / "a", on_card=False)))
    assert "process resident, peak" in text and "card used" not in text


def test_runs_stand_side_by_side_for_each_card(tmp_path):
    records = [run_folder(tmp_path / "a"), replace(run_folder(tmp_path / "b"), plan=None)]
    text = shown(runs.table(records))
    assert "rank 3" in text and "zero=stage3" in text and "zero3" in text and "4.0 s" in text
    assert runs.draw(records, tmp_path / "out" / "runs.png").stat().st_size > 10_000
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        runs.draw(records, tmp_path / "file" / "runs.png")


def test_of_a_sweep_those_are_compared_that_have_run(tmp_path):
    made = run_folder(tmp_path / "a")
    (tmp_path / "b").mkdir()
    records, missing = load_all([tmp_path / "b", tmp_path / "a", tmp_path / "c"])
    assert [record.path for record in records] == [made.path]
    assert [fault.problem for fault in missing] == [f"{tmp_path}/b is not a run folder", f"there is no folder {tmp_path}/c"]
    with pytest.raises(CheckpointError, match="2 faults"):
        load_all([tmp_path / "b", tmp_path / "c"])


def test_a_narrow_terminal_gives_each_rank_a_line(tmp_path):
    records = [run_folder(tmp_path / "a"), run_folder(tmp_path / "b")]
    for width in (80, 100):
        file = io.StringIO()
        Console(file=file, width=width).print(runs.table(records, width))
        lines = file.getvalue().splitlines()
        assert max(map(len, lines)) <= width and "…" not in file.getvalue()
        assert sum("GiB (" in line for line in lines) == 8 and "rank" in lines[0] and "measured" in lines[0]


def test_drift_is_the_error_of_the_prediction():
    assert drift(11 * GIB, 10 * GIB) == "10.00 GiB (+10.0 %)"
    assert drift(9 * GIB, 10 * GIB) == "10.00 GiB (-10.0 %)"


def test_the_screen_never_asks_for_more_than_the_plan():
    for words in (["zero=stage1"], ["zero=stage3"], ["fsdp=full_shard"], ["zero=stage2", "offload=optimizer"]):
        spec = compose([*LORA[:-1], *words, "recompute=full"])
        from orchestrator.layout import parameter_table

        table = parameter_table(spec)
        assert need(spec, table).card <= by_layout(spec).memory.used
        assert screen(spec, table) == need(spec, table)
        assert all(bound <= spec.cluster.card.memory_bytes for _, bound in fixes(spec, table))
