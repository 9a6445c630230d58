"""Ranks wait for rank 0 as long as it takes."""

from __future__ import annotations

from pathlib import Path

from ranks import run_ranks


def test_no_collective_is_open_while_rank_0_prepares() -> None:
    ended = run_ranks(Path(__file__).with_name("waiting_worker.py"), [], ranks=2, timeout=600)
    assert [code for code, _ in ended] == [0, 0], ended
    assert all("waited" in text for _, text in ended)
