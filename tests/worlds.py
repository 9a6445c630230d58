"""A world of one for tests that train in their own process."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from orchestrator.train.world import World, join, leave


@contextlib.contextmanager
def world_of_one() -> Iterator[World]:
    """This process alone, joined until the end of the block; its variables are taken back at once."""
    before = dict(os.environ)
    one = join("cpu")
    os.environ.clear()
    os.environ.update(before)  # children of other tests must not inherit this world
    yield one
    leave()
