"""How a rank that fails says so: once, last on the screen, with a code that ends the whole run.

Three launchers, three ways. Bare python: the error goes to stderr. torchrun: it also goes to $TORCHELASTIC_ERROR_FILE, which
torchrun's closing summary quotes (torch/distributed/elastic/multiprocessing/errors). deepspeed: its launcher prints lines of
its own after the rank's death, so a detached process holds the error back until the launcher has ended.
"""

from __future__ import annotations

import json
import logging
import os
import select
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import psutil

from orchestrator.errors import OrchestratorError
from orchestrator.train import storage
from orchestrator.train.launcher import PeerFailure

if TYPE_CHECKING:
    from orchestrator.train.world import World  # which needs torch, and a refusal may come before that is imported

LOG = logging.getLogger("orchestrator")

PEER_PATIENCE = 10.0
"""Seconds that a rank whose peer has died waits to be ended by the launcher, before it speaks for itself."""

FIRST_SPEAKS = 3.0
"""Seconds for which the other ranks leave an error of the user's input to rank 0, whose error is most likely the same."""

LAUNCHER_PATIENCE = 120.0
CLOCK_SLACK = 2.0
"""Seconds by which the kernel's start time of a process and a file's time may disagree."""

KILLED = (
    "{who} ended without a word: it was killed. Return code -9 (SIGKILL) most often means that the machine ran out of memory\n"
    "    -> look at the last memory line in train.log and at dmesg; lower batch.micro or data.seq_len, or rest less on the host"
)

_BROKEN_LINE = (
    "connection closed by peer", "connection reset by peer", "connection refused", "broken pipe", "gloo/transport", "pair.cc",
    "nccl", "store is not available", "tcpstore", "socket closed", "timed out waiting",
)  # fmt: skip


def is_peers_fault(error: BaseException) -> bool:
    """Whether `error` only says that another rank has gone: a collective that broke."""
    if isinstance(error, PeerFailure):
        return True
    text = f"{type(error).__name__}: {error}".lower()
    network = isinstance(error, (RuntimeError, ConnectionError)) and not isinstance(error, OrchestratorError)
    return network and any(sign in text for sign in _BROKEN_LINE)


def describe(error: BaseException, rank: int, size: int, log: Path | None) -> str:
    """The text for the screen: the report of an error that a user can mend, else where it happened and what it says."""
    if isinstance(error, OrchestratorError):
        return error.report()
    who = f"rank {rank}: " if size > 1 else ""
    frames = traceback.extract_tb(error.__traceback__)
    text = f"{who}{type(error).__name__}: {error}".rstrip(": ")
    if log is None or not log.exists():
        return "".join(traceback.format_exception(error)).rstrip() + (f"\n{text}" if who else "")
    place = f"  at {frames[-1].filename}:{frames[-1].lineno} in {frames[-1].name}\n" if frames else ""
    return f"{place}  the whole traceback is in {log}\n{text}"


def _write_elastic_file(text: str) -> None:
    """Leave `text` where torchrun looks for the reason of a failure."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return
    message = {"message": text, "extraInfo": {"py_callstack": text, "timestamp": str(int(time.time()))}}
    try:
        Path(path).write_text(json.dumps({"message": message}), encoding="utf-8")
    except OSError as error:
        LOG.warning("torchrun's error file %s cannot be written: %s", path, error)


def _launched_by_deepspeed(parent: int) -> bool:
    try:
        command = Path(f"/proc/{parent}/cmdline").read_bytes()
    except OSError:
        return False
    return b"deepspeed.launcher.launch" in command or b"deepspeed/launcher/launch.py" in command


def print_after(parent: int, text: str, unless: Path | None = None) -> bool:
    """Whether a detached process was left behind that prints `text` to stderr when the process `parent` has ended.

    With `unless`, it prints only if it is the first to make that file, so that one of several speaks.
    """
    try:
        watched = os.pidfd_open(parent)
    except (OSError, AttributeError):
        return False
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        os.close(watched)
        return True
    os.setsid()
    if os.fork():
        os._exit(0)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    since = _started(parent)
    select.select([watched], [], [], LAUNCHER_PATIENCE)
    if unless is None or _claim(unless, since):
        os.write(2, f"\n{text}\n".encode())
    for descriptor in (0, 1, 2):  # whoever reads the run's output need not wait for the rest
        os.close(descriptor)
    time.sleep(1.0)  # by then the other watchers have looked
    _spoken(parent).unlink(missing_ok=True)
    os._exit(0)


def _spoken(parent: int) -> Path:
    """The file that says that a rank started by `parent` has told why it fails."""
    return Path(tempfile.gettempdir()) / f"orchestrator-{os.getuid()}-{parent}.spoken"


def _started(pid: int) -> float:
    """When the process `pid` began, in seconds since the epoch; 0 where it has ended."""
    try:
        return float(psutil.Process(pid).create_time())
    except psutil.Error:
        return 0.0


def _claim(mark: Path, since: float) -> bool:
    """Whether this process is the one that made `mark`. One from before `since` was left by a run that crashed."""
    try:
        if mark.stat().st_mtime < since - CLOCK_SLACK:
            mark.unlink(missing_ok=True)
    except OSError:
        pass  # there is none
    try:
        os.close(os.open(mark, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except OSError:
        return False
    return True


def _speak(text: str, *, alike: bool) -> None:
    """Tell the screen and the launcher. Of errors that are `alike` on several ranks one is enough: the first speaks."""
    _write_elastic_file(text)
    sys.stdout.flush()
    parent = os.getppid()
    held_back = False
    if _launched_by_deepspeed(parent):
        first = _claim(_spoken(parent), _started(parent))
        if alike and not first:
            return
        held_back = print_after(parent, text)
    if not held_back:
        print(text, file=sys.stderr, flush=True)


def _ended(pid: int) -> bool:
    """Whether the process `pid` of this machine has ended, be its parent told or not."""
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return True


def _gone(world: World | None) -> str:
    """The ranks of this machine whose processes have ended, for a person; "A rank" where none is known."""
    known = zip(world.hosts, world.pids, strict=True) if world is not None else ()
    named = [
        f"rank {rank} on {host} (process {pid})"
        for rank, (host, pid) in enumerate(known)
        if world is not None and host == world.host and _ended(pid)
    ]
    return " and ".join(named).replace("rank", "Rank", 1) or "A rank"


def _suspect_a_killed_peer(who: str) -> None:
    """Under the deepspeed launcher, have it said at the end that `who` was killed, unless they give a reason themselves."""
    parent = os.getppid()
    if _launched_by_deepspeed(parent):
        print_after(parent, KILLED.format(who=who), unless=_spoken(parent))


def notice(error: BaseException, world: World) -> None:
    """Where `error` says that another rank has gone, have that said in any case: the launcher may end this process before it
    comes to its own report."""
    if world.size > 1 and is_peers_fault(error):
        _suspect_a_killed_peer(_gone(world))


def _wait_to_be_ended(seconds: float) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    time.sleep(seconds)


def report(error: BaseException, log: Path | None, world: World | None = None) -> int:
    """The exit code for `error`, after it was told to the log and the screen as this rank's part in the run allows."""
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    error = storage.refusal(error) or error
    peers_fault = size > 1 and is_peers_fault(error)
    who = _gone(world) if peers_fault else ""
    if isinstance(error, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    if log is None:
        pass  # nothing to log into yet; the screen gets everything
    elif isinstance(error, OrchestratorError):
        LOG.error("%s", error.report())
    elif peers_fault:
        LOG.warning("a collective broke because another rank has gone (%s): %s", who, str(error).splitlines()[0])
    else:
        LOG.error("%s: %s", type(error).__name__, error, exc_info=error)
    if peers_fault:
        _suspect_a_killed_peer(who)
        _wait_to_be_ended(PEER_PATIENCE)
    elif rank and isinstance(error, OrchestratorError):
        _wait_to_be_ended(FIRST_SPEAKS)
    _speak(describe(error, rank, size, log), alike=isinstance(error, OrchestratorError))
    return error.exit_code if isinstance(error, OrchestratorError) else 1


def abandon(error: OrchestratorError | None, log: Path | None, last: Callable[[], None] = lambda: None) -> NoReturn:
    """End this process from any of its threads, where it waits for what will not come; say `error` before, if there is one,
    and do what comes `last`."""
    if error is not None:
        LOG.error("%s", error.report())
        _speak(describe(error, 0, 1, log), alike=True)
    last()
    logging.shutdown()
    sys.stderr.flush()
    os._exit(1)


def guarded(work: Callable[[], int], log: Callable[[], Path | None], world: Callable[[], World | None] = lambda: None) -> int:
    """What `work` returns. An error that it raises is reported and ends the process with the code of the error.

    `log` tells where the run's log is, once there is one, and `world` of the other ranks. The process ends at once after an
    error, without destructors: a process group that has lost a member would wait for it there.
    """
    try:
        return work()
    except BaseException as error:
        code = report(error, log(), world())
        logging.shutdown()
        sys.stderr.flush()
        os._exit(code)
