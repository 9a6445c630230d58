"""The look at the data before training: figures, the screen, the masks, and the picture."""

from __future__ import annotations

import io
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from orchestrator import data
from orchestrator.data.lengths import candidates, histogram, measure
from orchestrator.data.preparation import prepared_folder
from orchestrator.report import lengths as report
from orchestrator.spec import Batch, Data

LAUNCH = Path(__file__).resolve().parents[2] / "launch"


@pytest.fixture(scope="module")
def looked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any, Any]:
    """(folder, lengths, prepared, tokenizer) of the built-in sample, cut at 32 tokens."""
    wanted = Data(None, 32, cache_dir=str(tmp_path_factory.mktemp("cache")))
    tokenizer = data.load_tokenizer(wanted, None)
    prepared = data.prepare(wanted, tokenizer, 0, data.cache_folder())
    folder = prepared_folder(wanted, prepared)
    return folder, measure(folder, prepared, Batch(16, 4, 2), 0), prepared, tokenizer


def printed(what: Any, *, terminal: bool = False) -> str:
    file = io.StringIO()
    Console(file=file, width=140, force_terminal=terminal, color_system="standard" if terminal else None).print(what)
    return file.getvalue()


def test_figures_are_those_of_the_uncut_rows(looked: Any) -> None:
    folder, found, prepared, tokenizer = looked
    full = data.prepare(Data(None, 1024), tokenizer, 0, folder.parent / "full")
    assert (found.rows, found.tokens, found.longest) == (255, int(full.lengths.sum()), int(full.lengths.max()))
    assert dict(found.percentiles)[50] == np.sort(full.lengths)[127]
    own = next(limit for limit in found.limits if limit.seq_len == 32)
    assert own.longer == int((full.lengths > 32).sum()) == prepared.report.truncated + prepared.report.unlabelled
    assert own.lost == full.lengths.sum() - prepared.lengths.sum()
    assert 0 < own.padding < 0.5
    assert own.fill > 0.9
    assert found.limits[-1].longer == 0


def test_the_padding_told_is_the_padding_of_the_run(looked: Any) -> None:
    _, found, prepared, _ = looked
    batch = Batch(16, 4, 2)
    total = data.steps_per_epoch(prepared, batch)
    made = list(data.steps(prepared, batch, seed=0, rank=0, ranks=2, pad_id=0, total_steps=total))
    others = list(data.steps(prepared, batch, seed=0, rank=1, ranks=2, pad_id=0, total_steps=total))
    computed = sum(micro.input_ids.numel() for step in [*made, *others] for micro in step.micro_batches)
    assert computed == sum(step.positions for step in made)
    own = next(limit for limit in found.limits if limit.seq_len == 32)
    assert own.padding == pytest.approx(1 - int(prepared.lengths.sum()) / computed)


def test_candidates_reach_from_an_eighth_to_what_cuts_nothing() -> None:
    assert candidates(512, 945) == [64, 128, 256, 512, 1024]
    assert candidates(1000, 300) == [128, 256, 512, 1000]


def test_bars_hold_every_row_once(looked: Any) -> None:
    folder, found, *_ = looked
    shown = histogram(folder, 16)
    assert sum(count for *_, count in shown) == found.rows
    assert all(one[1] + 1 == other[0] for one, other in itertools.pairwise(shown))


def test_the_screen_marks_the_limit_of_the_run(looked: Any) -> None:
    folder, found, prepared, _ = looked
    text = printed(report.overview(folder, found, prepared))
    assert "data     255 rows (alpaca), 250 kept, 117 truncated, 5 left out" in text
    assert "longest" in text and "> 32" in text and "█" in text


def test_masks_show_what_is_learned_in_colour_and_between_brackets(looked: Any) -> None:
    _, _, prepared, tokenizer = looked
    chosen = report.chosen(prepared, 3)
    assert chosen == [0, 124, 249]
    plain = printed(report.masks(prepared, tokenizer, chosen, coloured=False))
    coloured = printed(report.masks(prepared, tokenizer, chosen, coloured=True), terminal=True)
    assert plain.count("⟦") == plain.count("⟧") == 4  # one in the legend
    for sample in chosen:
        answer = tokenizer.decode(prepared.input_ids[sample][prepared.labels[sample] >= 0]).removesuffix("<|im_end|>")
        assert f"⟦{answer}" in plain
        assert f"\x1b[1;32m{answer.splitlines()[0]}" in coloured


@pytest.mark.parametrize("where", ["sample", "shared"])
def test_the_command_prints_and_draws(where: str, tmp_path: Path) -> None:
    shared = Path(__file__).resolve().parents[2].parent / "shared"
    arguments = ["data.seq_len=32", "show=2"]
    if where == "shared":
        if not (shared / "data").is_dir():
            pytest.skip("the shared folder of real data is not on this machine")
        arguments = [f"data.path={shared}/data/glaive_toolcall_en_demo.json", f"data.tokenizer={shared}/tokenizer"]
        arguments += ["model.vocab_size=6400", "data.seq_len=1024", "format=json"]
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    command = [sys.executable, str(LAUNCH / "lengths.py"), *arguments, "out=lengths.png"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr
    if where == "shared":
        assert json.loads(done.stdout)["report"]["unlabelled"] == 1
    else:
        assert (tmp_path / "lengths.png").stat().st_size > 10_000
        assert "sample 249" in done.stdout


def test_a_number_of_samples_that_is_none_is_refused(tmp_path: Path) -> None:
    command = [sys.executable, str(LAUNCH / "lengths.py"), "show=all"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 2
    assert "show: 'all' is not a whole number" in done.stderr
