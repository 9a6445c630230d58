"""Truth 3: the allocator model is the allocator. Answers of the real libc10_cuda.so, recorded by benchmarks/memory/oracle."""

from __future__ import annotations

import base64
import json
import zlib
from array import array
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

from orchestrator.planner.allocator import replay
from orchestrator.planner.trace import Event, Note
from orchestrator.units import MIB

ANSWERS = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "allocator_oracle.json"
NOTE = Note("op", 0)


@lru_cache(maxsize=1)
def cases() -> dict[str, dict[str, Any]]:
    return {case["name"]: case for case in json.loads(ANSWERS.read_text())["cases"]}


@lru_cache(maxsize=1)
def events(name: str) -> list[Event]:
    column = array("q")
    column.frombytes(zlib.decompress(base64.b85decode(cases()[name]["sequence"])))
    return [Event(b, size, Note("op", 0, stream=s)) for b, size, s in zip(column[::3], column[1::3], column[2::3], strict=True)]


@pytest.mark.parametrize("mode", ["default", "expandable"])
@pytest.mark.parametrize("name", cases())
def test_replay_is_the_real_allocator(name: str, mode: str) -> None:
    for answer in cases()[name]["answers"][mode]:
        told = replay(events(name), expandable=mode == "expandable", budget=answer["budget"])
        assert told.fits == answer["fits"], answer
        if told.fits:
            found = {"allocated": told.peak_allocated, "reserved": told.peak_reserved, "retries": told.retries}
            assert found == {key: answer[key] for key in found}


def test_enough_was_asked() -> None:
    assert len(cases()) >= 14
    assert any(e.note.stream for name in cases() for e in events(name))
    tight = [a for case in cases().values() for asked in case["answers"].values() for a in asked if a["budget"]]
    assert {answer["fits"] for answer in tight} == {True, False}


@pytest.mark.parametrize(
    ("sizes", "reserved"),
    [
        ([1], 2 * MIB),  # everything up to 1 MiB shares segments of 2 MiB
        ([MIB, MIB], 2 * MIB),
        ([MIB, MIB, 1], 4 * MIB),
        ([MIB + 1], 20 * MIB),  # above 1 MiB and below 10 MiB: 20 MiB
        ([9 * MIB, 9 * MIB], 20 * MIB),
        ([10 * MIB + 1], 12 * MIB),  # larger: a segment of its own, rounded to 2 MiB
    ],
)
def test_segments(sizes: list[int], reserved: int) -> None:
    sequence = [Event(number + 1, size, NOTE) for number, size in enumerate(sizes)]
    assert replay(sequence, expandable=False).peak_reserved == reserved


def test_out_of_memory_names_the_phase() -> None:
    told = replay([Event(1, 30 * MIB, NOTE), Event(2, 30 * MIB, Note("op", 1))], expandable=False, budget=50 * MIB)
    assert (told.fits, told.failed_phase, told.retries) == (False, "1", 1)
    assert told.peak_reserved == 30 * MIB


def test_what_is_on_the_host_does_not_count() -> None:
    assert replay([Event(1, MIB, Note("op", 0, home="cpu"))], expandable=False).peak_reserved == 0
