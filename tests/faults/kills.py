"""Kill ranks inside a save, at every change that it makes to the disk, and look what is left.

    LD_PRELOAD=boundary.so python tests/faults/kills.py --ranks 1 2 4 [--every 1] [--random 100] [--json FILE]

The ranks are forks of one process that has torch imported already: real processes, a real gloo group, real files. They save a
first checkpoint, then the victims are armed (boundary.c), then all save a second one. Whatever is selected afterwards must be
whole, by its digests and by its contents, and a further save must succeed in what is left.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from ranks import free_port
from record import record

from orchestrator.engine.protocol import Piece
from orchestrator.train import checkpoint, commit
from orchestrator.train.resume import Reader
from orchestrator.train.saving import Saver
from orchestrator.train.world import World, join, leave

ELEMENTS = 3000
PATIENCE = 60.0
GRACE = 5.0
"""Seconds after the first death in which the others may notice by themselves; then they are ended, as every launcher does."""

ARM = {"first": lambda rank, ranks: rank == 0, "last": lambda rank, ranks: rank == ranks - 1, "all": lambda rank, ranks: True}


@dataclass(frozen=True)
class Case:
    """`again`: the second save is of the same step. `at`: the change at which victims die; 0: after `delay` seconds."""

    ranks: int
    background: bool
    victims: str
    again: bool
    torn: bool
    at: int
    delay: float = 0.0


def content(attempt: int, start: int, stop: int) -> torch.Tensor:
    return torch.arange(start, stop, dtype=torch.float32) + attempt * 10.0**5


def save(folder: Path, world: World, step: int, attempt: int, *, background: bool) -> None:
    """This rank's part of a checkpoint with two kinds of tensor, of which the others hold the rest."""
    bounds = [ELEMENTS * rank // world.size for rank in (world.rank, world.rank + 1)]
    data = content(attempt, *bounds)
    pieces = [Piece("w", kind, (ELEMENTS,), bounds[0], data.clone()) for kind in ("weight", "exp_avg")]
    moment = checkpoint.Moment(step, 0, 1, "digest", {"attempt": attempt})
    saver = Saver(world, lambda saved: None, background=background)
    saver.save(
        iter(pieces),
        lambda taken, beside: checkpoint.save(folder, moment, taken, beside, scalars={}, keep=1, expected_bytes=0),
    )
    saver.wait()


def attempts(case: Case, folder: Path, world: World) -> None:
    """Save one checkpoint in peace and another one armed."""
    save(folder, world, 1, 1, background=case.background)
    world.barrier()
    if ARM[case.victims](world.rank, world.size):
        if case.at:
            ctypes.CDLL(None).boundary_arm(str(folder).encode(), case.at, int(case.torn))
        else:
            signal.setitimer(signal.ITIMER_REAL, case.delay)  # the default action of SIGALRM ends the process at once
    save(folder, world, 1 if case.again else 2, 2, background=case.background)
    signal.setitimer(signal.ITIMER_REAL, 0)


def live(rank: int, ranks: int, port: int, work: Callable[[World], None]) -> None:
    """The life of one rank. It never returns."""
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(ranks),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what survivors say of their dead peers
        work(join("cpu"))
        leave()
        code = 0
    finally:
        os._exit(code)


def run(ranks: int, work: Callable[[World], None], patience: float = PATIENCE) -> list[int]:
    """The exit codes of `ranks` processes that do `work` together, within `patience` seconds."""
    port, children = free_port(), []
    for rank in range(ranks):
        child = os.fork()
        if not child:
            live(rank, ranks, port, work)
        children.append(child)
    deadline, codes = time.monotonic() + patience, {}
    while len(codes) < ranks:
        for child in set(children) - set(codes):
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                codes[child] = os.waitstatus_to_exitcode(status)
                if codes[child]:
                    deadline = min(deadline, time.monotonic() + GRACE)
        if time.monotonic() > deadline:
            for child in set(children) - set(codes):
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                codes[child] = -signal.SIGKILL
            if not any(codes.values()):
                raise TimeoutError(f"{ranks} ranks still ran after {patience:.0f} s")
        time.sleep(0.002)
    return list(codes.values())


def play(case: Case, folder: Path) -> bool:
    """Whether a victim died in it."""
    codes = run(case.ranks, lambda world: attempts(case, folder, world))
    died = {-signal.SIGKILL, -signal.SIGALRM} & set(codes)
    if not died and set(codes) != {0}:
        raise RuntimeError(f"{case}: codes {sorted(codes)}, though nobody was killed")
    return bool(died)


def judge(case: Case, folder: Path, killed: bool) -> str | None:
    """What is wrong with what was left behind, or None."""
    named = commit.named_steps(folder)
    if not named:
        return "no checkpoint is left"
    chosen = named[-1]
    damage = list(commit.problems(chosen))
    if damage:
        return f"{chosen.name} would be selected and is torn: {damage[0]}"
    reader = Reader(chosen)
    attempt = int(reader.about["attempt"])
    if not killed and attempt != 2:
        return "the second save ended well and is not there"
    for kind in ("weight", "exp_avg"):
        if not torch.equal(reader.read("w", kind, 0, ELEMENTS), content(attempt, 0, ELEMENTS)):
            return f"{chosen.name} holds other values than were saved"
    return None


def goes_on(folder: Path) -> str | None:
    """What keeps a further save from succeeding in what was left, or None."""
    codes = run(1, lambda world: save(folder, world, 9, 9, background=False))
    names = sorted(entry.name for entry in folder.iterdir())
    return None if codes == [0] and names == ["step-000009"] else f"a further save ended with {codes} and left {names}"


def boundaries(ranks: list[int], every: int) -> Iterator[Case]:
    """The first change of every combination; `sweep` goes on from there."""
    for count, background, again, torn in itertools.product(ranks, (False, True), (False, True), (False, True)):
        for victims in ("first",) if count == 1 else ("first", "last", "all"):
            yield Case(count, background, victims, again, torn, every)


def sweep(ranks: list[int], every: int, randomly: int, seed: int) -> dict[str, object]:
    """What came of killing at each `every`-th change, and `randomly` times at any instant."""
    kills, wrong = 0, []
    generator = random.Random(seed)

    def one(case: Case) -> bool:
        nonlocal kills
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name).resolve() / "checkpoints"
            killed = play(case, folder)
            problem = judge(case, folder, killed) or (goes_on(folder) if killed else None)
        kills += killed
        if problem:
            wrong.append({**asdict(case), "problem": problem})
        return killed

    for first in boundaries(ranks, every):
        at = every
        while one(Case(**{**asdict(first), "at": at})):
            at += every
        print(f"{first.ranks} ranks, {first.victims} die, background {first.background}, same step {first.again}, "
              f"torn {first.torn}: {at // every - 1} kills", file=sys.stderr)  # fmt: skip
    for _ in range(randomly):
        count = generator.choice(ranks)
        victims, flags = generator.choice(list(ARM)), [generator.random() < 0.5 for _ in range(2)]
        one(Case(count, flags[0], victims, flags[1], False, 0, generator.uniform(0.0005, 0.06)))
    return {"kills": kills, "wrong": wrong, "ranks": ranks, "every": every, "randomly": randomly, "seed": seed}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--random", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    result = sweep(asked.ranks, asked.every, asked.random, asked.seed)
    record(result, asked.json)
    return 1 if result["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
