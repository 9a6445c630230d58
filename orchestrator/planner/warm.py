"""A process that has the libraries loaded and forks for each rehearsal, so that many of them pay for the imports once.

`warm()` starts it and gives a function from a spec to its rehearsed Plan, which several threads may call at once.
`python -m orchestrator.planner.warm SOCKET` is that process: one request a connection, each answered by a fork, which makes
the whole Plan. It ends when its stdin does, that is, with the process that started it, however that ended.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import select
import signal
import socket
import socketserver
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from orchestrator.planner.plan import Plan
from orchestrator.planner.predict import by_rehearsal, table_for
from orchestrator.planner.programme import FULL, Programme
from orchestrator.planner.rehearsal import Rehearsal, RehearsalError, rehearse_here
from orchestrator.spec import RunSpec, from_json, to_json

STARTING = 120.0
"""Seconds that the imports may take on a busy machine."""

LAST_WORDS = 4000
"""Bytes kept of what a failed rehearsal said."""


class Rehearse(Protocol):
    """From a spec, the seconds that it may take, and a programme to its Plan; raises RehearsalError."""

    def __call__(self, spec: RunSpec, seconds: float, programme: Programme = FULL) -> Plan: ...


@contextlib.contextmanager
def warm() -> Iterator[Rehearse]:
    """A function that rehearses in forks of one process, which lives as long as the context and starts at its first use."""
    with tempfile.TemporaryDirectory(prefix="rehearse-") as folder:
        address = str(Path(folder) / "socket")
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONPATH": os.pathsep.join(sys.path),
        }
        server = subprocess.Popen(
            [sys.executable, "-m", "orchestrator.planner.warm", address],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment,
        )  # fmt: skip
        try:
            yield partial(_asked, server, address)
        finally:
            assert server.stdin is not None, "it was opened as a pipe"
            server.stdin.close()
            server.terminate()
            server.wait()


def _connected(server: subprocess.Popen[bytes], address: str) -> socket.socket:
    deadline = time.monotonic() + STARTING
    while server.poll() is None and time.monotonic() < deadline:
        line = socket.socket(socket.AF_UNIX)
        try:
            line.connect(address)
        except OSError:  # it still imports
            line.close()
            time.sleep(0.05)
            continue
        return line
    raise RehearsalError("the process that rehearses did not start")


def _asked(server: subprocess.Popen[bytes], address: str, spec: RunSpec, seconds: float, programme: Programme = FULL) -> Plan:
    label = spec.strategy.label
    with _connected(server, address) as line, line.makefile("rwb") as stream:
        stream.write(json.dumps({"spec": to_json(spec), "programme": programme.to_json()}).encode() + b"\n")
        stream.flush()
        child = int(stream.readline() or 0)
        line.settimeout(seconds)
        try:
            answer: dict[str, Any] = json.loads(stream.readline() or b"{}")
        except TimeoutError:
            os.kill(child, signal.SIGKILL)
            raise RehearsalError(f"{label}: no result after {seconds:.0f} s") from None
    if "plan" in answer:
        return Plan.from_json(answer["plan"])
    raise RehearsalError(f"{label}: the rehearsal failed\n{answer.get('error', '(it said nothing)')}")


def _in_this_process(spec: RunSpec, rank: int, _: float, programme: Programme) -> Rehearsal:
    return rehearse_here(spec, rank, programme=programme)


class _Answer(socketserver.StreamRequestHandler):
    """One request, in the fork."""

    def handle(self) -> None:
        self.wfile.write(f"{os.getpid()}\n".encode())
        request = json.loads(self.rfile.readline())
        spec, programme = from_json(RunSpec, request["spec"]), Programme.from_json(request["programme"])
        try:
            made = by_rehearsal(spec, table_for(spec), perform=_in_this_process, programme=programme)
            answer: dict[str, Any] = {"plan": made.to_json()}
        except Exception:
            answer = {"error": traceback.format_exc()[-LAST_WORDS:]}
        self.wfile.write(json.dumps(answer).encode() + b"\n")
        self.wfile.flush()
        os._exit(0)  # fake tensors and fake groups do not survive the interpreter's clean-up


class _Server(socketserver.ForkingMixIn, socketserver.UnixStreamServer):
    block_on_close = False

    def service_actions(self) -> None:
        super().service_actions()
        if select.select([sys.stdin], [], [], 0)[0]:  # nothing is ever written there: it has been closed
            os._exit(0)


def main() -> None:
    import peft  # noqa: F401
    import transformers  # noqa: F401

    from orchestrator.engine import deepspeed_alone
    from orchestrator.planner import stage  # noqa: F401

    deepspeed_alone.load()
    gc.collect()
    gc.freeze()  # what the libraries left behind is neither looked through nor copied in the forks
    with _Server(sys.argv[1], _Answer) as server:
        server.serve_forever(poll_interval=0.2)


if __name__ == "__main__":
    main()
