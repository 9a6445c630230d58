"""Kill a training after each of its steps and resume it, and hold the result to the run that nobody killed, bit by bit.

    python tests/faults/resumes.py [--ranks 2] [--every 1] [--json FILE] [group=choice] [key=value] …

Every rank is a fork of one process that has the libraries imported; it trains as `launch/train.py` does, dies by SIGKILL as
soon as the metrics tell of the chosen step, and is started again with resume=auto, once, twice or three times. Compared are the
SHA-256 of all weights, moments and random states of the last checkpoint, the loss, rate and gradient norm of every step, and,
for every start, the next 50 batches that it would take, by the arguments with which the run itself asks for them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from ranks import free_port
from record import record
from safetensors import safe_open
from warm import warm

from orchestrator import data
from orchestrator.cluster.local import local_cluster
from orchestrator.config import compose
from orchestrator.data.batch import StepBatch
from orchestrator.train import commit
from orchestrator.train.run import Run
from orchestrator.train.world import join

PATIENCE = 1800.0
COLUMNS = ("step", "epoch", "loss", "lr", "grad_norm", "labelled_tokens", "finite")
AHEAD = 50
"""Batches beyond the run's last that are compared too, so that each start has as many before it."""

Steps = Callable[..., Iterator[StepBatch]]


def digest_of(batch: StepBatch) -> str:
    """SHA-256 of everything that the engine is given in a step."""
    found = hashlib.sha256(json.dumps([batch.step, batch.epoch, batch.labelled]).encode())
    for micro in batch.micro_batches:
        for tensor in (micro.input_ids, micro.labels):
            found.update(json.dumps(list(tensor.shape)).encode() + tensor.numpy().tobytes())
    return found.hexdigest()


def looking_ahead(real: Steps, folder: Path, rank: int) -> Steps:
    """`real`, which leaves the digests of the batches before `rank` in `folder` first, the run's and `AHEAD` beyond."""

    def told(*arguments: Any, start_step: int, total_steps: int, **named: Any) -> Iterator[StepBatch]:
        ahead = real(*arguments, start_step=start_step, total_steps=total_steps + AHEAD, **named)
        text = json.dumps({batch.step: digest_of(batch) for batch in ahead})
        fresh = folder / f"ahead-{rank}-{start_step:03d}.new"
        fresh.write_text(text)
        fresh.rename(fresh.with_suffix(".json"))  # the rank may be killed at any moment
        return real(*arguments, start_step=start_step, total_steps=total_steps, **named)

    return told


def live(rank: int, ranks: int, port: int, folder: Path, overrides: list[str]) -> None:
    """The life of one rank. It never returns."""
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(ranks),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    code = 1
    try:
        screen = os.open(folder / f"screen-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(screen, 1)
        os.dup2(screen, 2)
        data.steps = looking_ahead(data.steps, folder, rank)
        spec = compose([*overrides, f"run.dir={folder / 'run'}", "resume=auto"], ranks=ranks, local=local_cluster, strict=False)
        Run(spec, join("cpu")).execute()
        code = 0
    finally:
        os._exit(code)


def steps_told(folder: Path) -> int:
    """Steps that the metrics tell of."""
    try:
        return (folder / "run" / "metrics.jsonl").read_bytes().count(b"\n")
    except OSError:
        return 0


def train(ranks: int, folder: Path, overrides: list[str], until: int | None) -> None:
    """Train to the end, or until the metrics tell of step `until`, and then kill every rank."""
    port, children = free_port(), []
    for rank in range(ranks):
        child = os.fork()
        if not child:
            live(rank, ranks, port, folder, overrides)
        children.append(child)
    deadline, codes = time.monotonic() + PATIENCE, {}
    while len(codes) < ranks:
        if until is not None and steps_told(folder) >= until:
            for child in set(children) - set(codes):
                os.kill(child, signal.SIGKILL)
            until = None
        for child in set(children) - set(codes):
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                codes[child] = os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            for child in set(children) - set(codes):
                os.kill(child, signal.SIGKILL)
            raise TimeoutError(f"still training after {PATIENCE:.0f} s")
        time.sleep(0.001)
    if until is None and set(codes.values()) <= {0, -signal.SIGKILL}:
        return
    if set(codes.values()) != {0}:
        raise RuntimeError(f"codes {codes.values()}:\n{(folder / 'screen-0.txt').read_text()[-3000:]}")


def fingerprint(folder: Path) -> dict[str, str]:
    """SHA-256 of the tensors of the last checkpoint, by name, and of the columns of the metrics."""
    newest = commit.saved_steps(folder / "run" / "checkpoints")[-1]
    found = {"step": newest.name}
    for file in sorted(newest.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - it is no mapping
                data = tensors.get_tensor(name).view(torch.uint8).numpy().tobytes()
                found[f"{file.name} {name}"] = hashlib.sha256(data).hexdigest()
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    kept = json.dumps([[line[column] for column in COLUMNS] for line in lines])
    found["metrics"] = f"{len(lines)} lines {hashlib.sha256(kept.encode()).hexdigest()}"
    return found


def orders(folder: Path, rank: int) -> dict[int, dict[str, str]]:
    """The digests of the batches, by step, that `rank` had before it, by the step after which it began."""
    files = sorted(folder.glob(f"ahead-{rank}-*.json"))
    return {int(file.stem.rpartition("-")[2]): json.loads(file.read_text()) for file in files}


def compare_orders(folder: Path, whole: Path, ranks: int) -> tuple[int, list[str]]:
    """(batches compared, the starts in `folder` at which a rank had other ones before it than the run in `whole`)."""
    compared, other = 0, []
    for rank in range(ranks):
        uninterrupted = orders(whole, rank)[0]
        for start, found in orders(folder, rank).items():
            compared += len(found)
            if len(found) < AHEAD or found != {step: each for step, each in uninterrupted.items() if int(step) >= start}:
                other.append(f"the batches of rank {rank} after step {start}")
    return compared, other


def sweep(ranks: int, every: int, overrides: list[str]) -> dict[str, object]:
    """What came of killing at each `every`-th step once, and at every third of them twice and three times."""
    different: list[str] = []
    resumed, batches = 0, 0
    with tempfile.TemporaryDirectory() as name:

        def folder_of(label: str) -> Path:
            folder = Path(name) / label
            folder.mkdir()
            return folder

        whole = folder_of("whole")
        train(ranks, whole, overrides, None)
        expected, total = fingerprint(whole), steps_told(whole)
        plans = [(step,) for step in range(1, total, every)]
        plans += [(step, step + 1) for step in range(1, total - 1, 3 * every)]
        plans += [(step, step + 1, step + 3) for step in range(1, total - 3, 3 * every)]
        for plan in plans:
            folder = folder_of("-".join(map(str, plan)))
            for step in (*plan, None):
                train(ranks, folder, overrides, step)
            resumed += len(plan)
            found = fingerprint(folder)
            apart = sorted(key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key))
            compared, other = compare_orders(folder, whole, ranks)
            batches, apart = batches + compared, apart + other
            if apart:
                different.append(f"killed after {plan}: {len(apart)} differ, {', '.join(apart[:3])}")
            print(f"killed after {plan}: {'other' if apart else 'same'}", file=sys.stderr, flush=True)
    return {"steps": total, "plans": len(plans), "resumes": resumed, "compared": len(expected), "batches": batches,
            "different": different, "ranks": ranks, "overrides": overrides}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("overrides", nargs="*")
    asked = parser.parse_args()
    warm()
    overrides = [
        "model=tiny", "data.seq_len=64", "batch.global_size=32", "run.epochs=2", "checkpoint.every=1", "export.format=none",
        *asked.overrides,
    ]  # fmt: skip
    result = sweep(asked.ranks, asked.every, overrides)
    record(result, asked.json)
    return 1 if result["different"] else 0


if __name__ == "__main__":
    sys.exit(main())
