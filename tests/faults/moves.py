"""Resume every strategy's checkpoint under every other strategy and number of ranks, and hold it to the uninterrupted run.

    python tests/faults/moves.py [--ranks 1 2 4] [--only STATE …] [--tunings full lora] [--chains 60] [--json FILE]

The reference is one plain process that trains to the end. Each state (a strategy on a number of ranks) leaves a checkpoint
after `BROKEN` steps, and each state then goes on from each of these: the same real runs that launch/train.py makes, on forks
of one process that has the libraries imported, the ranks of one state in one gloo group. Compared are the samples of every
step as the engines get them, the loss of every step after the move, and the weights at the end. A chain moves twice.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import itertools
import json
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from kills import run as fork_ranks
from record import record
from warm import warm

from orchestrator import data
from orchestrator.cluster.local import local_cluster
from orchestrator.config import compose
from orchestrator.data.batch import IGNORED, StepBatch
from orchestrator.spec import RunSpec
from orchestrator.train.display import Display
from orchestrator.train.metrics import read_metrics
from orchestrator.train.resume import Reader
from orchestrator.train.run import Run
from orchestrator.train.world import World

BROKEN, TOTAL = 2, 4
"""Steps before the move, and in all."""

LOSS_APART = 1e-6
"""What the losses may differ by, relative to the reference: the sums of fp32 are taken in another order."""

PATIENCE = 900.0

WORDS = {
    "plain": ("zero=none", "fsdp=none"),
    "zero1": ("zero=stage1",),
    "zero2": ("zero=stage2",),
    "zero3": ("zero=stage3",),
    "zero3_cpu": ("zero=stage3", "offload=cpu"),
    "full_shard": ("fsdp=full_shard",),
    "hybrid_shard": ("fsdp=hybrid_shard",),
    "tensor2": ("tensor=2",),
    "zero1_tensor2": ("zero=stage1", "tensor=2"),
    "zero2_tensor2": ("zero=stage2", "tensor=2"),
}
TUNINGS = {"full": ("tuning=full",), "lora": ("tuning=lora", "tuning.rank=3")}
MODEL = (
    "model=tiny", "model.hidden_size=36", "model.head_dim=10", "model.intermediate_size=70", "model.num_hidden_layers=2",
    "model.vocab_size=2050", "data.seq_len=64", "batch.global_size=8", "precision=fp32",
    f"run.steps={TOTAL}", "export.format=none", "optimizer.lr=1e-3", "optimizer.weight_decay=0.01", "checkpoint.keep=9",
)  # fmt: skip
"""Odd sizes: their parts on two and four ranks are unequal, so that every rule of padding has its turn."""


@dataclass(frozen=True)
class State:
    """A strategy on a number of ranks."""

    word: str
    ranks: int

    @property
    def name(self) -> str:
        return f"{self.word}@{self.ranks}"


REFERENCE = State("plain", 1)


def states(counts: Sequence[int], only: Sequence[str]) -> list[State]:
    """Every state that exists on `counts` ranks: one process is not divided, and several are not plain."""
    found = []
    for ranks, word in itertools.product(counts, WORDS):
        grouped = word == "hybrid_shard" or word.endswith("tensor2")
        exists = ranks > 1 if grouped else word != "plain" or ranks == 1
        if exists and (not only or {word, State(word, ranks).name} & set(only)):
            found.append(State(word, ranks))
    return found


@dataclass(frozen=True)
class Move:
    """`target` goes on from the checkpoint at `source`, which `path` came to; its run lies in `folder`."""

    path: tuple[State, ...]
    target: State
    tuning: str
    source: Path | None
    folder: Path
    kept: bool

    @property
    def name(self) -> str:
        return " → ".join(state.name for state in (*self.path, self.target)) + f", {self.tuning}"


def samples_of(batch: StepBatch) -> list[str]:
    """A digest of each row that learns something, without what fills it up."""
    rows = []
    for micro in batch.micro_batches:
        for ids, labels in zip(micro.input_ids, micro.labels, strict=True):
            learned = (labels != IGNORED).nonzero()
            if len(learned):
                stop = int(learned[-1]) + 1
                rows.append(hashlib.sha256(ids[:stop].numpy().tobytes()).hexdigest()[:16])
    return rows


@functools.cache
def composed(target: State, tuning: str, cache: Path) -> RunSpec:
    """The spec of a state. One rank accumulates twice, several once."""
    words = [*MODEL, *WORDS[target.word], *TUNINGS[tuning], f"data.cache_dir={cache}"]
    words += ["batch.micro=4"] if target.ranks == 1 else []
    return compose(words, ranks=target.ranks, local=local_cluster, strict=False)


def train(move: Move, cache: Path, world: World) -> dict[str, Any]:
    """The samples of each step over all ranks, in no order, the losses, and the final weights on rank 0."""
    spec = composed(move.target, move.tuning, cache)
    spec = replace(
        spec, run=replace(spec.run, dir=str(move.folder)), resume=str(move.source or "none"),
        checkpoint=replace(spec.checkpoint, every=1 if move.kept else TOTAL),
    )  # fmt: skip
    seen: dict[int, list[str]] = {}
    real: Callable[..., Iterator[StepBatch]] = data.steps

    def told(*arguments: Any, **named: Any) -> Iterator[StepBatch]:
        for batch in real(*arguments, **named):
            seen[batch.step + 1] = samples_of(batch) if world.rank % spec.strategy.tp == 0 else []
            yield batch

    data.steps = told
    try:
        Run(spec, world, Display(False)).execute()
    finally:
        data.steps = real
    ranks = world.gather(seen)
    result: dict[str, Any] = {
        "samples": {step: sorted(row for rank in ranks for row in rank[step]) for step in seen},
        "losses": {line["step"]: line["loss"] for line in read_metrics(move.folder / "metrics.jsonl")} if world.first else {},
    }
    if world.first:
        reader = Reader(move.folder / "checkpoints" / f"step-{TOTAL:06d}")
        shapes = {name: torch.Size(shape) for name, shape in reader.shapes.items()}
        result["weights"] = {name: reader.read(name, "weight", 0, shape.numel()).clone() for name, shape in shapes.items()}
        reader.close()
    return result


def apart(found: dict[str, Any], expected: dict[str, Any]) -> tuple[float, float, str | None]:
    """(largest relative difference of a loss, largest of a weight's norm, what else differs) from the reference."""
    loss = max(abs(value - expected["losses"][step]) / expected["losses"][step] for step, value in found["losses"].items())
    weights = max(
        float((tensor - expected["weights"][name]).norm() / expected["weights"][name].norm())
        for name, tensor in found["weights"].items()
    )
    other = None
    if found["weights"].keys() != expected["weights"].keys():
        other = "other tensors are trained"
    elif sorted(found["losses"]) != list(range(min(found["losses"]), TOTAL + 1)):
        other = f"steps {sorted(found['losses'])} were taken"
    elif any(expected["samples"][step] != rows for step, rows in found["samples"].items()):
        other = "other samples"
    return loss, weights, other


def together(target: State, moves: Sequence[Move], folder: Path, expected: dict[str, Any]) -> list[dict[str, Any]]:
    """What came of `moves`, all of them to `target`, in one life of its ranks."""
    notes = folder / "notes.jsonl"
    notes.unlink(missing_ok=True)

    def work(world: World) -> None:
        for move in moves:
            note: dict[str, Any] = {"move": move.name}
            if move.source is not None and not move.source.exists():
                continue
            try:
                begun = time.perf_counter()
                found = train(move, folder / "cache", world)
                note["seconds"] = time.perf_counter() - begun
                if world.first:
                    loss, weights, other = apart(found, expected[move.tuning])
                    wrong = other or (f"a loss differs by {loss:.1e}" if not loss <= LOSS_APART else None)
                    note |= {"loss": loss, "weights": weights, "wrong": wrong}
            except Exception as error:
                traceback.print_exc()
                note["wrong"] = f"rank {world.rank}: {type(error).__name__}: {error}"
                with notes.open("a") as file:
                    file.write(json.dumps(note) + "\n")
                raise
            if world.first:
                with notes.open("a") as file:
                    file.write(json.dumps(note) + "\n")
                if not move.kept:
                    shutil.rmtree(move.folder)

    codes = fork_ranks(target.ranks, work, PATIENCE)
    told = [json.loads(line) for line in notes.read_text().splitlines()] if notes.exists() else []
    untried = {move.name for move in moves} - {note["move"] for note in told}
    return told + [{"move": name, "wrong": f"not tried; the ranks ended with {codes}"} for name in sorted(untried)]


def reference(folder: Path, tunings: Sequence[str]) -> dict[str, Any]:
    """The uninterrupted run of each tuning, taken in another process and read back."""
    kept = folder / "reference.pt"

    def work(world: World) -> None:
        moves = {tuning: Move((), REFERENCE, tuning, None, folder / f"reference-{tuning}", True) for tuning in tunings}
        torch.save({tuning: train(move, folder / "cache", world) for tuning, move in moves.items()}, kept)

    codes = fork_ranks(1, work, PATIENCE)
    if any(codes):
        raise RuntimeError(f"the reference ended with {codes}")
    result: dict[str, Any] = torch.load(kept, weights_only=True)
    return result


def sweep(counts: Sequence[int], only: Sequence[str], tunings: Sequence[str], chains: int, seed: int) -> dict[str, Any]:
    """What came of every move among the states, and of `chains` random moves over three of them."""
    every, generator = states(counts, only), random.Random(seed)
    told: list[dict[str, Any]] = []

    def go(target: State, moves: Sequence[Move]) -> None:
        found = together(target, moves, folder, expected) if moves else []
        told.extend(found)
        wrong = sum(note["wrong"] is not None for note in found)
        worst = max((note.get("loss", 0.0) for note in found), default=0.0)
        print(f"{len(found)} to {target.name}: {wrong} wrong, losses {worst:.1e} apart", file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        expected = reference(folder, tunings)

        def place(*parts: str) -> Path:
            return folder.joinpath("-".join(parts))

        def left_by(state: State, tuning: str) -> Path:
            return place(state.name, tuning) / "checkpoints" / f"step-{BROKEN:06d}"

        for state in every:
            go(state, [Move((), state, tuning, None, place(state.name, tuning), True) for tuning in tunings])
        begun = len(told)
        triples = [
            (generator.choice(every), generator.choice(every), generator.choice(every), generator.choice(tunings))
            for _ in range(chains)
        ]
        between = {(a, b, tuning) for a, b, _, tuning in triples}
        for b in every:
            go(b, [
                Move((a,), b, tuning, left_by(a, tuning), place(a.name, b.name, tuning), (a, b, tuning) in between)
                for a, tuning in itertools.product(every, tunings)
            ])  # fmt: skip
        moved = len(told)
        for c in every:
            go(c, [
                Move((a, b), c, tuning, place(a.name, b.name, tuning) / "checkpoints" / f"step-{BROKEN + 1:06d}",
                     place(str(number), "chain"), False)
                for number, (a, b, last, tuning) in enumerate(triples) if last == c
            ])  # fmt: skip
    return {
        "states": [state.name for state in every], "tunings": list(tunings), "uninterrupted": begun,
        "moves": moved - begun, "chains": len(told) - moved,
        "loss_apart": max((note["loss"] for note in told if "loss" in note), default=None),
        "weights_apart": max((note["weights"] for note in told if "weights" in note), default=None),
        "wrong": [{key: note[key] for key in ("move", "wrong")} for note in told if note["wrong"]],
        "seconds_each": round(sum(note.get("seconds", 0.0) for note in told) / max(1, len(told)), 2), "seed": seed,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--only", nargs="+", default=[], help="strategies (zero3) or states (zero3@2)")
    parser.add_argument("--tunings", nargs="+", default=list(TUNINGS), choices=list(TUNINGS))
    parser.add_argument("--chains", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    warm()
    result = sweep(asked.ranks, asked.only, asked.tunings, asked.chains, asked.seed)
    record(result, asked.json)
    return 1 if result["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
