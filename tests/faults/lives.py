"""Kill a whole run at every change that it makes to the disk, and look whether it goes on to the same end.

    LD_PRELOAD=boundary.so python tests/faults/lives.py [--every 1] [--json FILE]

Not only its checkpoints: the preparation of the data, the folder, the metrics, the ledger and the export, too (boundary.c).
A run dies at its n-th change, or halfway through its n-th write, and is started again with resume=auto; every third one dies
once more, at a random change of its second life. In the end the SHA-256 of all tensors, metrics and exported weights must be
those of the run that nobody killed, and nothing unfinished may lie about. The lives are forks of one process that has torch
imported.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import os
import random
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

from disks import SMALL
from record import record
from resumes import fingerprint
from warm import warm

from orchestrator.config import compose
from orchestrator.train import failure
from orchestrator.train.run import Run
from orchestrator.train.world import join

WORDS = (*SMALL, "checkpoint.keep=2", "eval.every=2", "data.eval_fraction=0.1", "logging.every=1", "resume=auto")
UNFINISHED = (".tmp-", ".new", ".removed-", ".replaced-")
"""Parts of names that nothing may have when a run has ended."""


def live(folder: Path, at: int, torn: bool) -> int:
    """The exit code of a life that dies at its `at`-th change below `folder`; 0: it lives on."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.dup2(os.open(folder / "screen", os.O_CREAT | os.O_WRONLY | os.O_APPEND), 2)
    os.dup2(2, 1)
    spec = compose([*WORDS, f"run.dir={folder / 'all' / 'run'}", f"data.cache_dir={folder / 'all' / 'cache'}"], ranks=1)
    ctypes.CDLL(None).boundary_arm(str(folder / "all").encode(), at, int(torn))
    os._exit(failure.guarded(lambda: 0 if Run(spec, join("cpu")).execute().step == 3 else 1, lambda: None))


def end_of(folder: Path) -> dict[str, str]:
    """What a run that has ended has left, as far as it must be the same each time."""
    exported = {
        f"export {file.relative_to(folder / 'all' / 'run' / 'export')}": hashlib.sha256(file.read_bytes()).hexdigest()
        for file in (folder / "all" / "run" / "export").rglob("*.safetensors")
    }
    return fingerprint(folder / "all") | exported


def judge(folder: Path, code: int, expected: dict[str, str]) -> str | None:
    """What is wrong with the last life or with what it left, or None."""
    if code:
        return f"it ended with {code}: {(folder / 'screen').read_text()[-800:]}"
    found = end_of(folder)
    apart = sorted(key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key))
    if apart:
        return f"{len(apart)} differ: {apart[:4]}"
    if not (folder / "all" / "run" / "done").exists():
        return "nothing says that it is done"
    left = [path.name for path in (folder / "all").rglob("*") if any(part in path.name for part in UNFINISHED)]
    return f"left behind: {left[:4]}" if left else None


def sweep(every: int, seed: int) -> dict[str, Any]:
    """What came of killing at each `every`-th change and halfway through each `every`-th write."""
    generator = random.Random(seed)
    kills, wrong = {"changes": 0, "writes": 0, "second lives": 0}, []
    with tempfile.TemporaryDirectory() as name:
        place = Path(name).resolve()
        (place / "whole").mkdir()
        if live(place / "whole", 0, False):
            raise RuntimeError((place / "whole" / "screen").read_text())
        expected = end_of(place / "whole")
        for kind, torn in (("changes", False), ("writes", True)):
            at = every
            while True:
                folder = place / f"{kind}-{at}"
                folder.mkdir()
                if live(folder, at, torn) != -signal.SIGKILL:
                    break
                kills[kind] += 1
                if kills[kind] % 3 == 0:
                    kills["second lives"] += live(folder, generator.randrange(1, 200), False) == -signal.SIGKILL
                problem = judge(folder, live(folder, 0, False), expected)
                if problem:
                    wrong.append({"kind": kind, "at": at, "problem": problem})
                    print(wrong[-1], file=sys.stderr, flush=True)
                at += every
            print(f"{kind}: {kills}", file=sys.stderr, flush=True)
    return {"kills": kills, "wrong": wrong, "every": every, "seed": seed, "compared": len(expected)}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    warm()
    result = sweep(asked.every, asked.seed)
    record(result, asked.json)
    return 1 if result["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
