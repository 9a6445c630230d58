"""Poison the samples of one step under every strategy: the run goes back, leaves them out, and is then the run without them.

    python tests/faults/spikes.py [--ranks 1 2 4] [--only STATE …] [--json FILE]

For each state (a strategy on a number of ranks): a run that meets the poison in step `POISONED` and goes back to its last
checkpoint; one whose data never held that step; and one that goes on from the checkpoint that the first has written after
its return, and must still leave the step out. SHA-256 of every tensor of the last checkpoint and the loss, rate and gradient
norm of every step must be equal.
"""

from __future__ import annotations

import json
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from kills import run as fork_ranks
from moves import MODEL, PATIENCE, WORDS, State, states
from record import by_state
from resumes import fingerprint

from orchestrator import data
from orchestrator.cluster.local import local_cluster
from orchestrator.config import compose
from orchestrator.data.batch import IGNORED, StepBatch
from orchestrator.spec import Health, RunSpec
from orchestrator.train.display import Display
from orchestrator.train.run import Run
from orchestrator.train.world import World

POISONED, TOTAL, EVERY = 12, 14, 4
WATCHED = Health(on_spike="rollback", spike_window=8, spike_deviations=3.0)
UNSEEN = 2049
"""A token that no sample holds: a trained model gives it next to no probability."""

LEARNING = ("tuning=full", f"run.steps={TOTAL}", f"checkpoint.every={EVERY}", "optimizer.lr=3e-2")


def poisoned(batch: StepBatch) -> StepBatch:
    """The same samples, with one unseen token in place of everything that is learned."""
    spoiled = [replace(m, labels=torch.where(m.labels == IGNORED, IGNORED, UNSEEN)) for m in batch.micro_batches]
    return replace(batch, micro_batches=tuple(spoiled))


@contextmanager
def altered(change: Callable[[StepBatch], StepBatch | None]) -> Iterator[list[int]]:
    """The steps that were taken; each is what `change` makes of it, and left out where that is None."""
    real: Callable[..., Iterator[StepBatch]] = data.steps
    taken: list[int] = []

    def told(*arguments: Any, **named: Any) -> Iterator[StepBatch]:
        for batch in real(*arguments, **named):
            changed = change(batch)
            if changed is not None:
                taken.append(batch.step + 1)
                yield changed

    data.steps = told
    try:
        yield taken
    finally:
        data.steps = real


def compared(state: State, folder: Path, world: World) -> dict[str, Any]:
    """What came of the three runs of `state`."""
    words = [*MODEL, *LEARNING, *WORDS[state.word], f"data.cache_dir={folder / 'cache'}"]
    spec = compose(words, ranks=world.size, local=local_cluster, strict=False)

    def train(name: str, change: Callable[[StepBatch], StepBatch | None], **other: Any) -> tuple[dict[str, str], list[int]]:
        whole: RunSpec = replace(spec, run=replace(spec.run, dir=str(folder / name / "run")), **other)
        with altered(change) as taken:
            Run(whole, world, Display(False)).execute()
        return fingerprint(folder / name) if world.first else {}, taken

    def poison(batch: StepBatch) -> StepBatch:
        return poisoned(batch) if batch.step + 1 == POISONED else batch

    expected, _ = train("without", lambda batch: None if batch.step + 1 == POISONED else batch)
    found, steps = train("poisoned", poison, health=WATCHED)
    saved = folder / "poisoned" / "run" / "checkpoints" / f"step-{POISONED - EVERY:06d}"
    again, later = train("resumed", poison, resume=str(saved))
    if not world.first:
        return {}
    again.pop("metrics")  # those of its own steps alone
    audit = [json.loads(line) for line in (folder / "poisoned" / "run" / "audit.jsonl").read_text().splitlines()]
    back = POISONED - EVERY
    return {
        "returns": [[line["step"], line["skipped"]] for line in audit],
        "steps": steps == [*range(1, POISONED + 1), *range(back + 1, POISONED), *range(POISONED + 1, TOTAL + 1)],
        "later": later == [*range(back + 1, POISONED), *range(POISONED + 1, TOTAL + 1)],
        "differ": sorted(key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key))[:5],
        "resumed_differ": sorted(key for key, value in again.items() if expected[key] != value)[:5],
        "loss": audit[0]["loss"], "median": audit[0]["median"], "limit": audit[0]["limit"], "compared": len(expected),
    }  # fmt: skip


def right(found: dict[str, Any]) -> bool:
    """Whether the run went back once, and nothing was different after that."""
    once = found.get("returns") == [[POISONED, [POISONED]]] and found["steps"] and found["later"]
    return bool(once) and not found["differ"] and not found["resumed_differ"]


def sweep(counts: Sequence[int], only: Sequence[str]) -> dict[str, Any]:
    """What came of every state."""
    told: dict[str, dict[str, Any]] = {}
    for state in states(counts, only):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name).resolve()

            def work(world: World, folder: Path = folder, state: State = state) -> None:
                try:
                    found = compared(state, folder, world)
                except Exception:
                    found = {"error": f"rank {world.rank}: {traceback.format_exc()[-2000:]}"}
                if found:
                    (folder / "found.json").write_text(json.dumps(found))

            fork_ranks(state.ranks, work, PATIENCE)
            written = folder / "found.json"
            told[state.name] = json.loads(written.read_text()) if written.exists() else {"error": "nothing was found"}
        print(f"{state.name}: {'same' if right(told[state.name]) else told[state.name]}", file=sys.stderr, flush=True)
    wrong = {name: found for name, found in told.items() if not right(found)}
    same = [found for found in told.values() if right(found)]
    return {"states": list(told), "same": len(same), "compared": sum(found["compared"] for found in same), "wrong": wrong}


if __name__ == "__main__":
    sys.exit(by_state(sweep))
