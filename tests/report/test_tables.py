import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from orchestrator.config import compose
from orchestrator.errors import CheckpointError, ConfigError
from orchestrator.report.arguments import positive, read_arguments
from orchestrator.report.record import Record, load
from orchestrator.report.tables import print_report
from orchestrator.spec import to_json

MIB = 2**20


def line(step: int, **more: object) -> dict[str, object]:
    return {"step": step, "loss": 8.0 / step, "tokens_per_second": 100.0 * step, "step_seconds": 2.0, "finite": True, **more}


def held(rank: int, resident: int, card: int | None = None) -> dict[str, int | None]:
    return {"rank": rank, "resident": resident, "resident_peak": resident + MIB, "device_used": card}


def account(rank: int, found: int) -> dict[str, object]:
    row = {"line": "weights", "dtype": "bf16", "home": "gpu", "elements": MIB, "bytes": 2 * MIB}
    measured = {"load": [], "step": [row | {"bytes": found}]}
    return {"rank": rank, "predicted": [row], "measured": measured, "memory": held(rank, 100 * MIB)}


def write(path: Path, lines: list[dict[str, object]], accounts: list[dict[str, object]]) -> Path:
    path.mkdir()
    (path / "spec.json").write_text(json.dumps(to_json(compose(["model=tiny", "zero=stage2"], ranks=2))))
    (path / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in lines))
    (path / "ledger.json").write_text(json.dumps({"ranks": accounts}))
    return path


def shown(record: Record) -> str:
    file = io.StringIO()
    print_report(record, console=Console(file=file, width=40))
    return file.getvalue()


def test_the_summary_tells_steps_loss_speed_and_what_was_skipped(tmp_path):
    lines = [line(1), line(2, finite=False, loss=None), line(3, eval_loss=4.0), line(4, eval_loss=3.0)]
    record = load(write(tmp_path / "run", lines, [account(0, 2 * MIB)]))
    assert record.losses == (8.0, 2.0) and record.tokens_per_second == 300 and record.seconds == 8.0
    text = shown(record)
    for expected in (
        "4 in 8.0 s, 1 of them skipped",
        "8.0000 -> 2.0000",
        "4.0000 (step 3) -> 3.0000 (step 4)",
        "zero2, 1 rank",
    ):
        assert expected in text


def test_predicted_stands_beside_measured_for_each_rank(tmp_path):
    text = shown(load(write(tmp_path / "run", [line(1)], [account(0, 2 * MIB), account(1, 3 * MIB)])))
    row = next(text_line for text_line in text.splitlines() if text_line.startswith("weights (bf16, device)"))
    assert row.split("  ", 1)[1].split() == ["2.0", "MiB", "|", "same", "2.0", "MiB", "|", "3.0", "MiB"]
    assert "together" in text and "101.0 MiB" in text


def test_memory_over_time_is_thinned_and_ends_with_the_last(tmp_path):
    lines = [line(step, memory=[held(0, step * MIB), held(1, 2 * step * MIB)]) for step in range(1, 101)]
    text = shown(load(write(tmp_path / "run", lines, [account(0, 2 * MIB)])))
    rows = text.partition("during the run")[2].splitlines()[2:]
    assert rows[0].split() == ["1", "1.0", "MiB", "2.0", "MiB"] and rows[-1].split()[0] == "100" and len(rows) <= 13


def test_cards_are_shown_where_there_are_any_and_more_than_eight_ranks_go_below(tmp_path):
    lines = [line(1, memory=[held(rank, MIB, card=5 * MIB) for rank in range(10)])]
    text = shown(load(write(tmp_path / "run", lines, [account(rank, 2 * MIB) for rank in range(10)])))
    assert "Card memory in use during the run" in text and "5.0 MiB" in text
    assert max(len(text_line.rstrip()) for text_line in text.splitlines()) < 200 and text.count("rank 9") == 3


def test_a_run_without_a_finished_step_is_told_from_no_run(tmp_path):
    with pytest.raises(CheckpointError, match="there is no folder"):
        load(tmp_path / "none")
    with pytest.raises(CheckpointError, match="is not a run folder"):
        load(tmp_path)
    with pytest.raises(CheckpointError, match=r"has not finished its first step\n.*train\.log"):
        load(write(tmp_path / "run", [], []))
    path = write(tmp_path / "old", [line(1)], [])
    (path / "spec.json").write_text('{"version": 0}')
    with pytest.raises(CheckpointError, match="was not written by this version"):
        load(path)


def test_arguments_are_keys_or_text():
    known = {"run": "", "most": "64"}
    assert read_arguments(["run=a", "what is x=3?", "most=5"], known) == ({"run": "a", "most": "5"}, ["what is x=3?"])
    with pytest.raises(ConfigError, match="no run folder is named"):
        read_arguments(["hello"], known)
    with pytest.raises(ConfigError, match="there is no such flag"):
        read_arguments(["--run"], known)
    with pytest.raises(ConfigError, match="'0' is not a whole number above zero"):
        positive({"most": "0"}, "most")
