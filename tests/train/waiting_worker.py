"""One of two ranks that wait for what rank 0 does, longer than any of their collectives would wait."""

from __future__ import annotations

import sys
import time
from datetime import timedelta

from orchestrator.errors import DataError, Fault
from orchestrator.train import world as worlds


def refuse() -> None:
    raise DataError(Fault("data.path", "no good"))


def main() -> int:
    worlds.CONTROL_TIMEOUT, worlds.POLL = timedelta(seconds=2), timedelta(seconds=1)
    world = worlds.join("cpu")
    began = time.monotonic()
    value = world.on_first(lambda: time.sleep(6) or "made")
    assert value == "made" and time.monotonic() - began > 5, value
    try:
        world.on_first(refuse)
    except DataError as error:
        assert "no good" in str(error)
    else:
        raise AssertionError("every rank is told of a refusal")
    print("waited")
    worlds.leave()
    return 0


if __name__ == "__main__":
    sys.exit(main())
