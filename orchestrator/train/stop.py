"""A polite end: SIGTERM, SIGINT and SIGUSR1 ask the loop to finish its step, save and leave."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""What a batch system, a person and a job script send. Slurm sends them to every process of a step."""

OF_A_JOB = (signal.SIGTERM, signal.SIGUSR1)
"""Those that a job listens to from its start on. A person's Ctrl-C ends a start at once."""


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
def listening(request: StopRequest, signals: Sequence[signal.Signals] = SIGNALS) -> Iterator[StopRequest]:
    """`request`, which `signals` set while the context lasts; the former handlers come back after it.

    Processes that are forked meanwhile inherit the handlers: they note a signal and live on until their parent ends them.
    """
    former = {number: signal.signal(number, request._on_signal) for number in signals}
    try:
        yield request
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
