"""A polite end: SIGTERM and SIGINT ask the loop to finish its step, save and leave."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopRequest:
    """Set by a signal, read by the loop once a step. `signal_name` is "" until a signal came."""

    def __init__(self) -> None:
        self.signal_name = ""

    def __bool__(self) -> bool:
        return bool(self.signal_name)

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        if self.signal_name and number == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C does not wait for the step
        self.signal_name = signal.Signals(number).name


@contextmanager
def listening() -> Iterator[StopRequest]:
    """A StopRequest that SIGTERM and SIGINT set while the context lasts; the former handlers come back after it."""
    request = StopRequest()
    former = {number: signal.signal(number, request._on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield request
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
