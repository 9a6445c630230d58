"""Ask the real CUDA caching allocator, without a card, what the model of it should say, and record its answers.

The allocator is that of libc10_cuda.so out of torch's CUDA wheel, on a CUDA runtime that only counts (mock/). Wanted once:

    pip download torch==2.13.0 'nvidia-cuda-runtime>=13.0,<13.1' 'nvidia-cuda-crt>=13.0,<13.1' --no-deps -d WHEELS
    python benchmarks/memory/oracle.py WHEELS

(527 MB; the CPU wheel has no such library.) g++ is needed. The answers go to benchmarks/results/allocator_oracle.json with the
sequences themselves, and tests/planner/test_allocator.py holds `replay` to them to the byte.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import random
import subprocess
import tempfile
import zipfile
import zlib
from array import array
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from orchestrator.config import compose
from orchestrator.planner.rehearsal import rehearse
from orchestrator.units import MIB

HERE = Path(__file__).resolve().parent
ANSWERS = HERE.parent / "results" / "allocator_oracle.json"
LAYERS = 3
MODES = {"default": "", "expandable": "expandable_segments:True"}

RUNS = (
    ("cluster=1xa10", "tuning=full"), ("cluster=1xa10", "tuning=lora", "recompute=full"), ("zero=stage1",),
    ("zero=stage2", "offload=optimizer"), ("zero=stage3",), ("zero=stage3", "offload=cpu", "tuning=lora"),
    ("fsdp=full_shard",), ("fsdp=full_shard", "offload=cpu", "recompute=full"), ("fsdp=shard_grad_op", "tuning=lora"),
)  # fmt: skip
"""Rehearsed with three layers of qwen25_0_5b on cluster=4xa10 unless said otherwise."""

RANDOM = 7


def rehearsed(overrides: tuple[str, ...]) -> array[int]:
    """The card's events of a rehearsal as (block, bytes, stream) triples."""
    spec = compose(["model=qwen25_0_5b", "cluster=4xa10", "data.seq_len=512", *overrides])
    assert spec.model.shape is not None
    spec = replace(spec, model=replace(spec.model, shape=replace(spec.model.shape, num_hidden_layers=LAYERS)))
    triples = array("q")
    for block, size, note in rehearse(spec).trace:
        if note.home == "gpu":
            triples.extend((block, size, note.stream))
    return triples


def drawn(seed: int) -> array[int]:
    """A random sequence: sizes from 1 B to 256 MiB, about 60 blocks alive, on one to three streams."""
    draw = random.Random(seed)
    triples, alive, block = array("q"), {}, 0
    for _ in range(3000):
        if alive and draw.random() < min(0.9, len(alive) / 120):
            gone = draw.choice(list(alive))
            triples.extend((-gone, *alive.pop(gone)))
        else:
            block += 1
            alive[block] = (int(2 ** draw.uniform(0, 28)), draw.randrange(1 + seed % 3))
            triples.extend((block, *alive[block]))
    return triples


def sequences() -> Iterator[tuple[str, array[int]]]:
    for overrides in RUNS:
        yield " ".join(overrides), rehearsed(overrides)
    for seed in range(RANDOM):
        yield f"random {seed}", drawn(seed)


def build(wheels: Path, folder: Path) -> dict[str, str]:
    """Unpack the libraries and headers, compile the mock and the driver; the environment in which `folder/drive` runs."""
    for wheel in wheels.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            wanted = [n for n in archive.namelist() if "/include/" in n or Path(n).name in ("libc10.so", "libc10_cuda.so")]
            archive.extractall(folder, wanted)
    libraries = folder / "torch" / "lib"
    headers = [f"-I{path}" for path in (*folder.glob("nvidia/*/include"), folder / "torch" / "include")]
    mock = HERE / "mock"
    commands = [
        ["gcc", "-O1", "-fPIC", "-c", mock / "rest.c", "-o", "rest.o"],
        ["g++", "-O1", "-shared", "-fPIC", "-std=c++20", *headers, mock / "cudart.cpp", "rest.o", "-o", "libcudart.so.13",
         "-Wl,-soname,libcudart.so.13", f"-Wl,--version-script,{mock / 'versions.map'}"],
        ["gcc", "-shared", "-fPIC", mock / "nvml.c", "-o", "libnvidia-ml.so.1"],
        ["g++", "-O1", "-std=c++20", *headers, mock / "drive.cpp", "-o", "drive", libraries / "libc10_cuda.so",
         libraries / "libc10.so", "-L.", "-l:libcudart.so.13"],
    ]  # fmt: skip
    for command in commands:
        subprocess.run([str(word) for word in command], cwd=folder, check=True)
    return {**os.environ, "LD_LIBRARY_PATH": f"{folder}:{libraries}"}


def ask(triples: array[int], mode: str, folder: Path, environment: dict[str, str], budget: int | None = None) -> dict[str, Any]:
    """What the real allocator says: peak allocated and reserved, retries, and whether everything fitted."""
    (folder / "sequence").write_bytes(triples.tobytes())
    settings = {"PYTORCH_ALLOC_CONF": MODES[mode], "CARD_BYTES": str(budget or 1 << 45)}
    done = subprocess.run(
        [str(folder / "drive"), str(folder / "sequence")],
        env={**environment, **settings}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer | {"budget": budget}


def record(name: str, triples: array[int], folder: Path, environment: dict[str, str]) -> dict[str, Any]:
    """The sequence with every answer: without a limit, and under budgets from the allocated peak to the reserved one."""
    answers: dict[str, list[dict[str, Any]]] = {}
    for mode in MODES:
        free = ask(triples, mode, folder, environment)
        slack = free["reserved"] - free["allocated"]
        budgets = sorted({free["allocated"] + slack * part // 4 // (2 * MIB) * 2 * MIB for part in (1, 2, 3)})
        answers[mode] = [free, *(ask(triples, mode, folder, environment, budget) for budget in budgets)]
    packed = base64.b85encode(zlib.compress(triples.tobytes(), 9)).decode()
    return {"name": name, "events": len(triples) // 3, "answers": answers, "sequence": packed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheels", type=Path, help="folder with the three wheels")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        environment = build(arguments.wheels.resolve(), folder)
        torch_wheel = next(wheel.name for wheel in arguments.wheels.glob("torch-*.whl"))
        cases = [record(name, triples, folder, environment) for name, triples in sequences()]
    ANSWERS.parent.mkdir(parents=True, exist_ok=True)
    ANSWERS.write_text(json.dumps({"library": torch_wheel, "cases": cases}, indent=1) + "\n")
    print(f"{len(cases)} sequences recorded in {ANSWERS}")


if __name__ == "__main__":
    main()
