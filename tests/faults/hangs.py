"""Let one rank stop the others in every way that we know; measure how long it takes until the run has ended, and who is named.

    python tests/faults/hangs.py [--seconds 10] [--ranks 2 3] [--launchers] [--json FILE]

The ranks are forks as in kills.py: a real gloo group, the real watch, steps of three collectives. The first or the last one
stops the others; the first also keeps the store in which they meet. As every launcher does, the first rank that ends takes the
others with it. All cases run side by side. `--launchers` then starts whole runs by torchrun and by deepspeed, one after the
other, of which either rank is stopped or killed, and waits until every process of theirs has ended.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import os
import signal
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from kills import live
from launched import LAUNCHERS, launched
from ranks import free_port
from record import record

from orchestrator.errors import DataError, Fault
from orchestrator.train import failure
from orchestrator.train.log import open_log
from orchestrator.train.watch import SAVE, Watch
from orchestrator.train.world import World

SLACK = 2.0
"""Seconds beyond the time limit in which a run must have ended."""

LAST = 1000
HANGS_AT = 3


@dataclass(frozen=True)
class Case:
    kind: str
    ranks: int
    victim: int


def stopped(world: World) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def asleep(world: World) -> None:
    time.sleep(3600)


def skipping(world: World) -> None:
    world.barrier()  # which the others do not come to: they wait for a sum


def raising(world: World) -> None:
    raise DataError(Fault("data.path", "row 7 cannot be read", "mend it"))


KINDS = {"stop": stopped, "sleep": asleep, "skip": skipping, "raise": raising, "no data": None, "late": None}
"""What the victim does in the middle of a step; without data it takes no further step and goes to save. So it does where a rank
that is `late` comes into that step when another has waited in it for half the time limit, and must not be named."""

APART = ("skip", "no data", "late")
"""Two ranks that wait for different collectives are both told: nothing says which of the two is wrong."""


def steps(case: Case, world: World, watch: Watch, began: Path, seconds: float) -> int:
    for step in range(1, LAST):
        watch.at(step, "waiting for the next samples")
        if case.kind == "late" and world.rank == (case.victim + 1) % case.ranks and step == HANGS_AT:
            time.sleep(seconds / 2)
            began.write_text(repr(time.monotonic()))
        if world.rank == case.victim and step == HANGS_AT:
            began.write_text(repr(time.monotonic()))
            act = KINDS[case.kind]
            if act is None:
                watch.at(step - 1, SAVE)
                world.gather(None)
            else:
                watch.at(step, "forward and backward 1 of 1")
                act(world)
        watch.at(step, "forward and backward 1 of 1")
        dist.all_reduce(torch.ones(64))
        watch.at(step, "the sum of the losses")
        dist.all_reduce(torch.ones(2))
        time.sleep(0.02)
    return 0


def train(case: Case, seconds: float, folder: Path, world: World) -> None:
    log = folder / "train.log"
    open_log(log, world.rank)
    os.dup2(os.open(folder / f"screen-{world.rank}", os.O_CREAT | os.O_WRONLY), 2)
    watch = Watch(world, seconds, log)
    os._exit(failure.guarded(lambda: steps(case, world, watch, folder / "began", seconds), lambda: log))


def start(case: Case, seconds: float, folder: Path) -> list[int]:
    """The processes of the ranks."""
    port, children = free_port(), []
    for rank in range(case.ranks):
        child = os.fork()
        if not child:
            live(rank, case.ranks, port, functools.partial(train, case, seconds, folder))
        children.append(child)
    return children


def alive(processes: list[int]) -> list[int]:
    """Those of `processes` that have not ended."""
    return [each for each in processes if os.waitpid(each, os.WNOHANG)[0] == 0]


def finish(case: Case, seconds: float, folder: Path, processes: list[int]) -> dict[str, Any]:
    """What was measured of `case` whose first rank has ended: the others are ended as a launcher does."""
    ended = time.monotonic()
    left = [each for each in processes if psutil.pid_exists(each)]
    for process in left:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    said = "".join(path.read_text() for path in sorted(folder.glob("screen-*")))
    hung = float((folder / "began").read_text())
    orphans = [each for each in processes if psutil.pid_exists(each)]
    # An error of one rank ends at once; which rank it was stands in the log of the run.
    named = "row 7 cannot be read" in said if case.kind == "raise" else f"rank {case.victim} on" in said
    took = round(ended - hung, 2)
    others = [rank for rank in range(case.ranks) if rank != case.victim and f"rank {rank} on" in said]
    if case.ranks == 2 and case.kind in APART:
        others = []
    return {**asdict(case), "seconds": took, "named": named, "others_named": others, "orphans": len(orphans),
            "sound": took <= seconds + SLACK and named and not others and not orphans, "said": said[:2000]}  # fmt: skip


def sweep(ranks: list[int], seconds: float) -> dict[str, Any]:
    """What came of every kind of hang in the first and in the last rank, side by side."""
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        waiting: dict[Case, tuple[Path, list[int]]] = {}
        for number, (kind, count, last) in enumerate(itertools.product(KINDS, ranks, (False, True))):
            folder = Path(name) / str(number)
            folder.mkdir()
            case = Case(kind, count, count - 1 if last else 0)
            waiting[case] = folder, start(case, seconds, folder)
        deadline = time.monotonic() + 10 * seconds + 120
        while waiting and time.monotonic() < deadline:
            for case, (folder, processes) in list(waiting.items()):
                living = alive(processes)
                if len(living) < len(processes):
                    found.append(finish(case, seconds, folder, living))
                    del waiting[case]
            time.sleep(0.01)
        for case, (_, processes) in waiting.items():
            for process in processes:
                os.kill(process, signal.SIGKILL)
                os.waitpid(process, 0)
            found.append({**asdict(case), "sound": False, "said": "it never ended"})
    wrong = [each for each in found if not each["sound"]]
    return {"limit_seconds": seconds, "slack_seconds": SLACK, "cases": [_brief(each) for each in found], "wrong": wrong}


def _brief(each: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in each.items() if name != "said"}


def commands(seconds: float) -> dict[str, Any]:
    """What came of whole runs, as a person starts them, whose rank is stopped or killed."""
    found = []
    for launcher, how, victim in itertools.product(LAUNCHERS, ("stop", "kill"), (0, 1)):
        with tempfile.TemporaryDirectory() as name:
            ended = launched(launcher, how, victim, Path(name), seconds)
        killed = {"torchrun": f"(local_rank: {victim})", "deepspeed": f"Rank {victim} on"}[launcher]
        named = (f"rank {victim} on" if how == "stop" else killed) in ended.screen
        sound = named and not ended.orphans and ended.code != 0 and ended.seconds <= seconds + SLACK
        found.append(
            {"launcher": launcher, "how": how, "victim": victim, "seconds": ended.seconds, "named": named,
             "launcher_seconds": ended.launcher_seconds, "orphans": ended.orphans, "sound": sound}
            | ({} if sound else {"said": ended.screen[-1500:]})
        )  # fmt: skip
        print(found[-1], file=sys.stderr, flush=True)
    return {"commands": found, "wrong_commands": [each for each in found if not each["sound"]]}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--launchers", action="store_true")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    result = sweep(asked.ranks, asked.seconds)
    if asked.launchers:
        result |= commands(asked.seconds)
    record(result, asked.json)
    return 1 if result["wrong"] or result.get("wrong_commands") else 0


if __name__ == "__main__":
    sys.exit(main())
