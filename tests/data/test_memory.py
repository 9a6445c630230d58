"""Memory of the preparation does not follow the size of the file."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "preparation.py"


def growth(megabytes: int) -> int:
    """MiB of memory of its own that the process gains while it tokenises a file of that size."""
    command = [sys.executable, str(BENCHMARK), f"megabytes={megabytes}", "kind=alpaca", "workers=1"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=1200)
    return int(json.loads(done.stdout)["growth_mib"])


@pytest.mark.slow  # minutes; the full size is `python benchmarks/preparation.py`
def test_four_times_the_rows_take_the_same_memory() -> None:
    small, large = growth(10), growth(40)
    assert large <= 300
    assert large <= small + 40
