"""What offload costs: the disk of a swapping run against DeepSpeed's own handle, a step from host memory ÷ one without offload.

    python benchmarks/nvme.py [FOLDER] [RANKS] > benchmarks/results/nvme.md

Trains a model of about 110 M random weights for a few steps under ZeRO-3: without offload, with everything in host memory and
with offload=nvme in FOLDER, whose disk each run measures before it starts. Ranks that compute on the CPU fetch over no link, so
the predicted floor of offload=cpu is a step without it; what is left is DeepSpeed's own way of doing it.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

SHAPE = (
    "model.hidden_size=1024", "model.intermediate_size=4096", "model.vocab_size=16384", "model.num_hidden_layers=5",
    "model.num_attention_heads=8", "model.num_key_value_heads=8", "model.head_dim=128",
)  # fmt: skip
STEPS = 8
RUN = (
    "zero=stage3", "batch.global_size=2", "batch.micro=1", "data.seq_len=64", f"run.steps={STEPS}", "logging.every=1",
    "export.format=none", "zero.sub_group_size=4000000", "zero.reduce_bucket=4000000", "plan.on_misfit=ignore",
)  # fmt: skip


def run(folder: Path, ranks: int, *further: str) -> Path:
    """The run folder of a finished run on `ranks` ranks."""
    made = folder / "-".join(word.partition("=")[2].replace("/", "_") for word in further)
    command = [
        sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--master-port=29755",
        str(ROOT / "launch" / "train.py"), *SHAPE, *RUN, *further, f"run.dir={made}",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if ended.returncode:
        sys.exit(f"{ended.stdout[-2000:]}\n{ended.stderr[-3000:]}")
    (made / "screen.txt").write_text(ended.stdout + ended.stderr)
    return made


def seconds(made: Path) -> list[float]:
    """Length of every step after the first."""
    lines = [json.loads(line) for line in (made / "metrics.jsonl").read_text().splitlines()]
    return [line["step_seconds"] for line in lines if "step_seconds" in line][1:]


def held(made: Path) -> tuple[int, int]:
    """(resident peak of rank 0, bytes of its tensors outside the disk) after the last step."""
    account = json.loads((made / "ledger.json").read_text())["ranks"][0]
    inside = sum(row["bytes"] for row in account["measured"]["step"] if row["home"] != "nvme")
    return account["memory"]["resident_peak"], inside


def main(folder: Path, ranks: int) -> None:
    from orchestrator.units import GIB, format_bytes

    with tempfile.TemporaryDirectory(dir=folder) as place:
        inside = run(Path(place), ranks, "offload=none")
        memory = run(Path(place), ranks, "offload=cpu")
        disk = run(Path(place), ranks, "offload=nvme")
        found = re.search(r"reads ([\d.]+) and writes ([\d.]+) GB/s now; a step reads (\S+ \S+) and writes (\S+ \S+),",
                          (disk / "screen.txt").read_text())  # fmt: skip
        if found is None:
            sys.exit("the run said nothing of its disk")
        reads, writes = float(found[1]) * 1e9, float(found[2]) * 1e9
        sizes = {"GiB": GIB, "MiB": 2**20}
        read, written = (float(text.split()[0]) * sizes[text.split()[1]] for text in (found[3], found[4]))
        least, fast, slow = (statistics.median(seconds(made)) for made in (inside, memory, disk))
        floor = read / reads + written / writes
        rows = [
            ("the disk by DeepSpeed's handle, one process", f"{reads / 1e9:.2f} GB/s read, {writes / 1e9:.2f} written"),
            (f"a step of {ranks} ranks moves", f"{found[3]} read, {found[4]} written: {floor:.2f} s at that rate"),
            ("median step with offload=nvme", f"{slow:.2f} s"),
            ("median step with offload=cpu", f"{fast:.2f} s"),
            ("median step without offload", f"{least:.2f} s"),
            ("offload=cpu ÷ without, predicted floor 1.00 where nothing crosses a link", f"{fast / least:.2f}"),
            (
                "time that the disk adds, against that floor",
                f"{slow - fast:.2f} s, {floor / (slow - fast):.2f} of DeepSpeed's own rate",
            ),
            ("tensors of rank 0 in memory, offload=cpu", format_bytes(held(memory)[1])),
            ("tensors of rank 0 in memory, offload=nvme", format_bytes(held(disk)[1])),
            ("resident peak of rank 0, offload=cpu", format_bytes(held(memory)[0])),
            ("resident peak of rank 0, offload=nvme", format_bytes(held(disk)[0])),
        ]
    print("# A swapping run and its disk\n\n| what | measured |\n|---|---|")
    for name, value in rows:
        print(f"| {name} | {value} |")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."), int(sys.argv[2]) if len(sys.argv) > 2 else 2)
