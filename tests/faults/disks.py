"""Let the disk refuse, at every change that a save makes to it and wherever else a run writes, and look what is said.

    LD_PRELOAD=boundary.so python tests/faults/disks.py [--every 1] [--runs] [--json FILE]

A full disk, a quota, a disk that has become read-only and one that fails: from the chosen call on every change below the folder
ends with that error (boundary.c). Root ignores the modes of files and the limits of quotas; these errors it meets as everybody.
The ranks are forks as in kills.py. `--runs` also trains whole runs whose metrics, export, prepared data or folder is refused.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import itertools
import os
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from kills import run, save
from record import record
from warm import warm

from orchestrator.errors import OrchestratorError
from orchestrator.train import commit
from orchestrator.train.resume import Reader
from orchestrator.train.storage import REMEDIES
from orchestrator.train.world import World

ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
VICTIMS = {"first": 0, "last": -1}
ENDED = 4
"""The exit code of a run whose disk refuses (orchestrator/errors.py)."""

DATA_ENDED = 2
"""That of data which cannot be prepared."""

SMALL = (
    "model=tiny", "model.hidden_size=32", "model.head_dim=8", "model.intermediate_size=64", "model.num_hidden_layers=1",
    "batch.global_size=4", "batch.micro=4", "data.seq_len=32", "run.steps=3", "checkpoint.every=1", "plan.on_misfit=ignore",
)  # fmt: skip

PLACES = {
    "metrics": ("run/metrics.jsonl", ENDED),
    "export": ("run/.tmp-export", ENDED),
    "data preparation": ("cache", DATA_ENDED),
    "ledger": ("run/.ledger", ENDED),
}
"""Where a whole run writes besides checkpoints, and the code with which it must end."""


@dataclass(frozen=True)
class Case:
    """A save of which the disk of one rank refuses everything from the `at`-th change on."""

    number: int
    ranks: int
    background: bool
    victim: str
    at: int


def refuse(path: Path, at: int, number: int) -> None:
    ctypes.CDLL(None).boundary_fail(str(path).encode(), at, number)


def attempts(case: Case, folder: Path, world: World) -> None:
    """Save one checkpoint in peace and another one refused; the rank ends with the code of what it says."""
    save(folder, world, 1, 1, background=case.background)
    world.barrier()
    if world.rank == VICTIMS[case.victim] % world.size:
        refuse(folder, case.at, case.number)
    code = 0
    try:
        save(folder, world, 2, 2, background=case.background)
    except OrchestratorError as error:
        code = error.exit_code
        (folder.parent / f"said-{world.rank}").write_text(error.report())
    reached = ctypes.CDLL(None).boundary_seen() >= case.at
    refuse(folder, 0, 0)
    if reached:
        (folder.parent / "reached").touch()
    os._exit(code)


def judge(case: Case, folder: Path, codes: list[int], seconds: float) -> str | None:
    """What is wrong with what was left behind and said, or None."""
    said = [path.read_text() for path in sorted(folder.parent.glob("said-*"))]
    if set(codes) not in ({0}, {ENDED}):
        return f"codes {codes}"
    whole = [path for path in commit.named_steps(folder) if not list(commit.problems(path))]
    if not whole or whole[-1] != commit.named_steps(folder)[-1]:
        return "the newest checkpoint is not whole"
    if set(codes) == {ENDED}:
        word, remedy = os.strerror(case.number), REMEDIES[case.number].partition(",")[0]
        if not said or any(word not in text or remedy[:4] not in text for text in said):
            return f"not said: {word}, {remedy}; but {said[:1]}"
    elif int(Reader(whole[-1]).about["attempt"]) != 2:
        return "the save was refused and nobody said so"
    return None if seconds < 30 else f"took {seconds:.0f} s"


def cases(every: int) -> Iterator[Case]:
    for number, ranks, background in itertools.product(ERRORS, (1, 2), (False, True)):
        for victim in ("first",) if ranks == 1 else VICTIMS:
            yield Case(number, ranks, background, victim, every)


def saves(every: int) -> dict[str, Any]:
    """What came of refusing at each `every`-th change of a save."""
    refused: Counter[str] = Counter()
    wrong, slowest = [], 0.0
    for first in cases(every):
        at, reached = every, True
        while reached:
            case = Case(**{**asdict(first), "at": at})
            with tempfile.TemporaryDirectory() as name:
                folder = Path(name).resolve() / "checkpoints"
                began = time.monotonic()
                codes = run(case.ranks, lambda world, case=case, folder=folder: attempts(case, folder, world))
                seconds = time.monotonic() - began
                slowest = max(slowest, seconds)
                problem = judge(case, folder, codes, seconds)
                reached = (folder.parent / "reached").exists()
            if reached:
                refused[errno.errorcode[case.number]] += 1
            if problem:
                wrong.append({**asdict(case), "problem": problem})
            at += every
    return {"refused": dict(refused), "wrong": wrong, "every": every, "slowest_seconds": round(slowest, 2)}


def train(folder: Path, place: str, at: int, number: int) -> None:
    """A whole run of one rank, as launch/train.py makes it, in which `place` is refused from its `at`-th change on."""
    from orchestrator.config import compose
    from orchestrator.train import failure
    from orchestrator.train.run import Run
    from orchestrator.train.world import join

    os.dup2(os.open(folder / "screen", os.O_CREAT | os.O_WRONLY), 2)
    spec = compose([*SMALL, f"run.dir={folder / 'run'}", f"data.cache_dir={folder / 'cache'}"], ranks=1)
    (folder / "cache").mkdir()
    refuse(folder / place, at, number)
    log = folder / "run" / "train.log"
    os._exit(failure.guarded(lambda: 0 if Run(spec, join("cpu")).execute() else 1, lambda: log if log.exists() else None))


def runs(every: int) -> dict[str, Any]:
    """What whole runs said whose disk refused one of PLACES."""
    tried: Counter[str] = Counter()
    wrong = []
    for (name, (place, code)), number in itertools.product(PLACES.items(), ERRORS):
        for at in range(1, 4, every):
            with tempfile.TemporaryDirectory() as temporary:
                folder = Path(temporary).resolve()
                child = os.fork()
                if not child:
                    try:
                        train(folder, place, at, number)
                    except BaseException:
                        traceback.print_exc()
                    finally:
                        os._exit(70)  # whatever it was, it is none of the parent's work
                ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
                screen = (folder / "screen").read_text()
                problem = None
                if ended != code or os.strerror(number) not in screen or "Traceback" in screen or "->" not in screen:
                    problem = f"code {ended}: {screen[-600:]}"
                elif name != "data preparation" and not sound(folder / "run" / "checkpoints", at if name == "metrics" else 1):
                    problem = "no sound checkpoint is left"
            tried[f"{name}, {errno.errorcode[number]}"] += 1
            if problem:
                wrong.append({"place": name, "error": errno.errorcode[number], "at": at, "problem": problem})
    return {"runs": tried.total(), "tried": dict(tried), "wrong": wrong}


def sound(checkpoints: Path, at: int) -> bool:
    """Whether the newest checkpoint is whole, or none could be there yet."""
    named = commit.named_steps(checkpoints)
    return not list(commit.problems(named[-1])) if named else at <= 2


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--runs", action="store_true")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.runs:
        warm()
    result: dict[str, Any] = {"saves": saves(asked.every)}
    if asked.runs:
        result["runs"] = runs(1)
    record(result, asked.json)
    return 1 if any(part["wrong"] for part in result.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
