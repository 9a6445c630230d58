"""A real run whose rank VICTIM does at its third step what HANG says: stop (SIGSTOP), lock (holds Python's lock), kill
(SIGKILL). The file HUNG then tells when that was."""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from orchestrator.train.loop import Loop  # noqa: E402 - the clone goes on the path first

HANGS = {
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "lock": lambda: ctypes.PyDLL(None).sleep(3600),  # PyDLL keeps the lock during the call
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
}
real = Loop._step


def hanging_step(self: Loop, batch, number, stop):
    if number == 3 and os.environ["RANK"] == os.environ["VICTIM"]:
        Path(os.environ["HUNG"]).write_text(repr(time.time()))
        HANGS[os.environ["HANG"]]()
    return real(self, batch, number, stop)


if __name__ == "__main__":
    Loop._step = hanging_step
    sys.argv[0] = str(ROOT / "launch" / "train.py")
    runpy.run_path(sys.argv[0], run_name="__main__")
