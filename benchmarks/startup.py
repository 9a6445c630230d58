"""What a person waits for before anything runs: help, the composed configuration, a cached plan; beside Python's own start.

    python benchmarks/startup.py [--rounds 7]

Every command in turn, each a process of its own; the ratio is to `python -c "import torch"` in the same round. Seconds of the
processor are those of an idle machine within what hyperthreads and caches share; seconds of the clock are not.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import account  # noqa: E402

REHEARSED = ("model=tiny", "cluster=4xa10", "fsdp=full_shard", "data.seq_len=128")
COMMANDS = {
    "python -c pass": ("-c", "pass"),
    "python -c 'import torch'": ("-c", "import torch"),
    "launch/train.py --help": ("launch/train.py", "--help"),
    "launch/train.py --cfg job": ("launch/train.py", "--cfg", "job"),
    "launch/plan.py, a cached rehearsal": ("launch/plan.py", *REHEARSED, "basis=rehearsal"),
}
BASE = "python -c 'import torch'"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    costs: dict[str, list[account.Cost]] = {name: [] for name in COMMANDS}
    with tempfile.TemporaryDirectory() as scratch:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": scratch, "OMP_NUM_THREADS": "1"}
        log = Path(scratch) / "log"
        for turn in range(rounds + 1):  # the first fills the caches, that of plans among them
            for name, words in COMMANDS.items():
                cost = account.timed([sys.executable, *words], environment, log, ROOT)
                costs[name] += [cost] if turn else []
    results = {}
    for name, found in costs.items():
        cpu = [cost.cpu for cost in found]
        results[name] = {
            "cpu_seconds": round(statistics.median(cpu), 3),
            "wall_seconds": round(statistics.median(cost.wall for cost in found), 3),
            "cpu_ratio_to_import_torch": account.ratio(cpu, [cost.cpu for cost in costs[BASE]]),
        }
        ratio = results[name]["cpu_ratio_to_import_torch"]["ratio"]
        print(f"{name:36s} processor {results[name]['cpu_seconds']:.2f} s, {ratio:.2f} × import torch; "
              f"clock {results[name]['wall_seconds']:.2f} s")  # fmt: skip
    packages = account.versions("torch", "hydra-core", "omegaconf")
    account.write("startup-cpu", f"python benchmarks/startup.py --rounds {rounds}", packages, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
