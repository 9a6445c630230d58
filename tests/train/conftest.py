"""A world of one for tests that run in this process, and small runs."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from rich.console import Console
from worlds import world_of_one

from orchestrator.config import compose
from orchestrator.spec import RunSpec
from orchestrator.train.display import Display
from orchestrator.train.run import Outcome, Run
from orchestrator.train.world import World

SMALL = (
    "model=tiny", "model.hidden_size=32", "model.head_dim=8", "model.intermediate_size=64", "model.num_hidden_layers=2",
    "batch.global_size=8", "data.seq_len=64", "run.steps=4",
)  # fmt: skip
"""A run of about a second."""


@pytest.fixture(scope="session")
def world() -> Iterator[World]:
    with world_of_one() as one:
        yield one


@pytest.fixture
def small(tmp_path: Path) -> Callable[..., RunSpec]:
    """A small spec in a folder of its own: `small("checkpoint.every=2")`."""

    def make(*overrides: str) -> RunSpec:
        return compose([*SMALL, f"run.dir={tmp_path / 'run'}", f"data.cache_dir={tmp_path / 'cache'}", *overrides], ranks=1)

    return make


class Screen:
    """What a person saw."""

    def __init__(self) -> None:
        self.file = io.StringIO()
        self.display = Display(True, Console(file=self.file, width=140))

    @property
    def text(self) -> str:
        return self.file.getvalue()


@pytest.fixture
def screen() -> Screen:
    return Screen()


@pytest.fixture
def execute(world: World, screen: Screen) -> Callable[[RunSpec], Outcome]:
    """Run a spec to its end in this process."""
    return lambda spec: Run(spec, world, screen.display).execute()
