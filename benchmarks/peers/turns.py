"""Turns of several training jobs on one machine: each takes one step when it is told to, and says what the step took.

Standard library only: jobs of both environments import it. The driver writes `NAME.go`, a number; every rank of that job takes
its steps up to that number and writes `NAME.RANK.STEP.json` after each. So all jobs meet the same noise, and none waits in a
collective while another has the machine.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

POLL_SECONDS = 0.02


class Turns:
    """The turns of this rank. `begin` before the first step, `border` after each."""

    def __init__(self, folder: Path, name: str, steps: int) -> None:
        self._folder, self._name, self._steps = folder, name, steps
        self._rank, self._done = int(os.environ.get("RANK", "0")), 0
        self._began = (0.0, 0.0)

    def begin(self) -> None:
        """Wait for the first turn."""
        self._wait()

    def border(self, labels: int, tokens: int, positions: int) -> None:
        """A step of this rank ends here, with so many learned tokens, `tokens` in all, and `positions` with padding; wait for
        the next turn. The process ends after the last."""
        cpu, wall = time.process_time() - self._began[0], time.perf_counter() - self._began[1]
        path = self._folder / f"{self._name}.{self._rank}.{self._done}.json"
        fresh = path.with_suffix(".new")
        fresh.write_text(json.dumps({"cpu": cpu, "wall": wall, "labels": labels, "tokens": tokens, "positions": positions}))
        fresh.rename(path)
        self._done += 1
        if self._done == self._steps:
            os._exit(0)
        self._wait()

    def _wait(self) -> None:
        go = self._folder / f"{self._name}.go"
        while not go.exists() or int(go.read_text() or -1) < self._done:
            time.sleep(POLL_SECONDS)
        self._began = (time.process_time(), time.perf_counter())
