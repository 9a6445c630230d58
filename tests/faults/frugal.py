"""Save and resume a model under every strategy, and hold what each rank allocates for that to far less than the model.

    python tests/faults/frugal.py [--ranks 1 2 4] [--only STATE …] [--json FILE]

The ranks of a state (a strategy on a number of ranks) are forks that form a real gloo group and hold a real engine after a real
step. They save, in the foreground and in the background, and resume what they have saved and what the state before them has,
whatever that was. Every allocation of torch is traced, with the pages of files that are mapped left out, and the process's own
anonymous memory is read every millisecond beside it. A save may take one chunk of the writer, in the background the rank's own
share and a chunk; a resume, beyond what rests on the rank afterwards, one read. The whole training state is many times that.
"""

from __future__ import annotations

import gc
import itertools
import json
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from kills import run as fork_ranks
from moves import WORDS, State, states
from record import by_state

from orchestrator import engine as engines
from orchestrator import model as models
from orchestrator.cluster.local import local_cluster
from orchestrator.config import compose
from orchestrator.data.batch import MicroBatch
from orchestrator.engine import Engine
from orchestrator.engine import states as reading
from orchestrator.layout import STEPPED, lay_out
from orchestrator.planner.predict import by_layout
from orchestrator.planner.tracer import Tracer
from orchestrator.spec import RunSpec
from orchestrator.train import checkpoint
from orchestrator.train.resume import Reader, bring_back
from orchestrator.train.saving import Saver
from orchestrator.train.world import World
from orchestrator.units import MIB

MODEL = (
    "model=tiny", "model.hidden_size=256", "model.head_dim=32", "model.intermediate_size=768", "model.num_hidden_layers=6",
    "model.vocab_size=4096", "data.seq_len=32", "precision=fp32", "tuning=full", "plan.on_misfit=ignore",
)  # fmt: skip
CHUNK, READ = MIB, 2**18
"""Bytes that the writer gathers and elements that a resume reads at once, as 1 GiB and 2²² in a run."""

SLACK = MIB // 2
"""Bytes of small tensors: counters, random states, sums."""

PATIENCE = 600.0


class MemoryTracer(Tracer):
    """Traces what is allocated; pages of files, which the kernel takes back when it likes, are no allocation."""

    def _born(self, storage: torch.UntypedStorage, home: str, op: str, layer: int) -> None:
        if not _of_a_file(storage.data_ptr()):
            super()._born(storage, home, op, layer)


def _of_a_file(address: int) -> bool:
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, last = (int(end, 16) for end in line.split(" ", 1)[0].split("-"))
        if first <= address < last:
            return line.endswith(".safetensors")
    return False


@dataclass(frozen=True)
class Taken:
    """Bytes that were allocated at once and that were left of them, by torch's storages, and by the process's anonymous
    memory."""

    traced: int
    left: int
    anonymous: int
    anonymous_left: int


def _anonymous() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon:"))
    return int(line.split()[1]) * 1024


def taken(tracer: Tracer, work: Callable[[], None]) -> Taken:
    """What `work` allocates. The tracer has been listening from the start: it knows what was there before."""
    gc.collect()
    over, before = threading.Event(), _anonymous()
    highest = [before]

    def look() -> None:
        while not over.wait(0.001):
            highest[0] = max(highest[0], _anonymous())

    looking = threading.Thread(target=look, daemon=True)
    looking.start()
    tracer.enter_phase("save")
    begun = len(tracer.trace())
    work()
    gc.collect()
    over.set()
    looking.join()
    held = peak = 0
    for event in itertools.islice(tracer.trace(), begun, None):
        held += event.bytes if event.block > 0 else -event.bytes
        peak = max(peak, held)
    return Taken(peak, held, highest[0] - before, _anonymous() - before)


def prepared(spec: RunSpec) -> tuple[Engine, Any]:
    """(the engine of `spec` with its model, the table of its parameters)."""
    engine = engines.make(spec, torch.device("cpu"), models.loss_sum)
    module = models.build(spec, engine.building())
    table = models.table_of(module)
    engine.adopt(module, models.open_weights(spec, table))
    return engine, table


def step(engine: Engine, spec: RunSpec) -> None:
    """One optimizer step, after which all states are there."""
    ids = torch.arange(spec.batch.micro * 32).view(spec.batch.micro, 32) % 4096
    for index in range(spec.batch.accumulation):
        engine.forward_backward(
            MicroBatch(ids, ids.clone()), 31 * spec.batch.global_size, last=index + 1 == spec.batch.accumulation
        )
    engine.step(1e-3)


def save(engine: Engine, folder: Path, world: World, *, background: bool) -> None:
    """This rank's part of the checkpoint `folder`/step-000001."""
    moment = checkpoint.Moment(1, 0, 1, "digest", {})
    saver = Saver(world, lambda done: None, background=background)
    pieces, scalars = engine.save()
    saver.save(pieces, partial(checkpoint.save, folder, moment, scalars=scalars, keep=1, expected_bytes=0))
    saver.wait()


def resumed(spec: RunSpec, source: Path, world: World, tracer: Tracer) -> Taken:
    """What a rank takes to bring a fresh engine to the checkpoint `source`."""
    engine, _ = prepared(spec)
    found = taken(tracer, lambda: bring_back(engine, Reader(source), world))
    engine.close()
    return found


def measured(state: State, folder: Path, before: Path | None, world: World) -> dict[str, Any]:
    """What this rank took, beside the bounds."""
    words = [*MODEL, *WORDS[state.word], "batch.global_size=4", *(("batch.micro=2",) if state.ranks == 1 else ())]
    spec = compose(words, ranks=state.ranks, local=local_cluster, strict=False)
    found: dict[str, Any] = {"rank": world.rank}
    with MemoryTracer({"cpu": "gpu"}) as tracer:
        tracer.enter_phase("load")
        engine, table = prepared(spec)
        step(engine, spec)
        pieces = [piece.data.nbytes for piece in engine.save()[0] if piece.owned]
        for name, background in (("save", False), ("background", True)):
            found[name] = asdict(taken(tracer, partial(save, engine, folder / name, world, background=background)))
        engine.close()
        del engine
        own = folder / "save" / "step-000001"
        for name, source in (("resume", own), ("move", before or own)):
            found[name] = asdict(resumed(spec, source, world, tracer))
    planned = by_layout(spec, table, world.rank).memory.allocated
    rest = sum(row.bytes for row in lay_out(spec, table, world.rank).at(STEPPED))
    whole, share = Reader(own).bytes, sum(pieces)
    return found | {"whole": whole, "share": share, "largest": max(pieces, default=0), "rest": rest, "planned": planned}


def wrong(found: dict[str, Any]) -> list[str]:
    """The bounds that a rank went beyond."""
    bounds = {"save": CHUNK + SLACK, "background": found["share"] + CHUNK + SLACK}
    reads = READ * 4 + SLACK
    took = {name: found[name]["traced"] for name in bounds}
    took |= {name: found[name]["traced"] - found[name]["left"] for name in ("resume", "move")}
    bounds |= {"resume": reads, "move": reads}
    beyond = [f"{name}: {took[name]} B of {bound}" for name, bound in bounds.items() if took[name] > bound]
    for name in ("save", "resume", "move"):
        extra = found[name]["anonymous"] - (found[name]["anonymous_left"] if name != "save" else 0)
        if extra > found["whole"] / 3:
            beyond.append(f"{name}: {extra} B of anonymous memory, where the whole is {found['whole']}")
        if found["rest"] + took[name] > found["planned"] + CHUNK:
            beyond.append(f"{name}: {found['rest'] + took[name]} B, where {found['planned']} were planned")
    return beyond


def sweep(counts: Sequence[int], only: Sequence[str]) -> dict[str, Any]:
    """What came of every state; each also resumes the checkpoint of the one before it."""
    checkpoint.CHUNK_BYTES, reading.READ_AT_ONCE = CHUNK, READ
    told: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        before: Path | None = None
        for state in states(counts, only):
            folder = Path(name) / state.name
            folder.mkdir()

            def work(world: World, folder: Path = folder, state: State = state, before: Path | None = before) -> None:
                try:
                    found = measured(state, folder, before, world)
                except Exception:
                    found = {"error": traceback.format_exc()[-2000:]}
                (folder / f"found-{world.rank}.json").write_text(json.dumps(found))

            fork_ranks(state.ranks, work, PATIENCE)
            ranks = [json.loads(file.read_text()) for file in sorted(folder.glob("found-*.json"))]
            problems = [problem for found in ranks for problem in ([found["error"]] if "error" in found else wrong(found))]
            problems += [] if len(ranks) == state.ranks else [f"{len(ranks)} ranks came to an end"]
            told[state.name] = {"wrong": problems} | (_brief(ranks) if not any("error" in found for found in ranks) else {})
            before = folder / "save" / "step-000001"
            print(f"{state.name}: {told[state.name]}", file=sys.stderr, flush=True)
    return {"chunk": CHUNK, "read": READ * 4, "states": told, "wrong": [name for name, found in told.items() if found["wrong"]]}


def _brief(ranks: Sequence[dict[str, Any]]) -> dict[str, int]:
    """The whole training state, and the most that any rank took for each thing, in bytes."""
    highest = {"whole": ranks[0]["whole"], "share": max(found["share"] for found in ranks)}
    for name in ("save", "background"):
        highest[name] = max(found[name]["traced"] for found in ranks)
    for name in ("resume", "move"):
        highest[name] = max(found[name]["traced"] - found[name]["left"] for found in ranks)
    return highest | {"anonymous": max(found["save"]["anonymous"] for found in ranks)}


if __name__ == "__main__":
    sys.exit(by_state(sweep))
