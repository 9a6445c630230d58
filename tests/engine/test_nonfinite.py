"""A loss that is not a number on one rank: every rank decides alike, and nothing is updated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from engine.nonfinite_worker import CASES
from ranks import run_ranks


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    output = tmp_path_factory.mktemp("nonfinite") / "seen.json"
    ended = run_ranks(Path(__file__).with_name("nonfinite_worker.py"), [str(output)], 2, timeout=600)
    assert all(code == 0 for code, _ in ended), "\n".join(text[-3000:] for _, text in ended)
    return [json.loads(output.with_suffix(f".{rank}").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", [case.name for case in CASES])
def test_every_rank_skips_and_no_weight_or_state_changes(name: str, found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert rank[name]["finite"] == [True, False, True]
        assert rank[name]["held"] > 0
        assert rank[name]["changed"] == 0
