"""One rank of the NVMe suite: the run from a disk beside the one from memory, and what becomes of a checkpoint between them.

Started by `test_nvme.py` with RANK, WORLD_SIZE and MASTER_* set. Arguments: a folder, a number format, what is trained.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from contract.cases import SHAPE, Case, run_spec
from contract.worker import advance, gather_state, prepare
from strategies import strategies

from orchestrator import spec as s
from orchestrator.layout import LOADED, STEPPED, check_census, lay_out

LARGE = replace(SHAPE, vocab_size=8192, hidden_size=516, intermediate_size=1024, head_dim=128)
"""Parts of 1 MiB and more, which DeepSpeed swaps, beside smaller ones, which stay in memory. 516 ÷ 2 elements of a norm
put what follows them in a sub-group where no sector begins."""

STEPS = 4
HALFWAY = 2


def specs(folder: Path, compute: str, tuning: str) -> dict[str, s.RunSpec]:
    """The run under each strategy of this suite, on two ranks."""
    base = run_spec(Case("zero3", tuning, compute, 1), 2)
    base = replace(base, model=replace(base.model, shape=LARGE))
    memory = strategies(2)["zero3_cpu"]
    # Sub-groups from below 1 MiB on: some rest on the disk and some in memory.
    assert memory.buckets is not None
    memory = replace(memory, buckets=replace(memory.buckets, prefetch=0, max_reuse=0, sub_group=100_000))
    largest = LARGE.vocab_size * LARGE.hidden_size // 2
    disk = replace(memory, optimizer_home=s.Home.NVME, parameter_home=s.Home.NVME, nvme=s.Nvme(str(folder / "swap"), largest))
    half = replace(disk, parameter_home=s.Home.GPU, nvme=s.Nvme(str(folder / "swap"), 0, 0))
    chosen = {"memory": memory, "nvme": disk, "nvme_optimizer": half, "fsdp": strategies(2)["full_shard"]}
    return {name: replace(base, strategy=strategy) for name, strategy in chosen.items()}


def whole_run(spec: s.RunSpec, rank: int) -> tuple[dict[str, Any], Any]:
    """(what the run came to, its state after HALFWAY steps)."""
    engine, table = prepare(spec)
    layout = lay_out(spec, table, rank)
    check_census(layout, engine.census(), LOADED)
    seen = advance(engine, spec, range(HALFWAY), rank, 2, reduce=True)
    check_census(layout, engine.census(), STEPPED)
    saved = gather_state(engine)
    seen += advance(engine, spec, range(HALFWAY, STEPS), rank, 2, reduce=True)
    check_census(layout, engine.census(), STEPPED)
    weights = {name: tensor.double().sum().item() for name, tensor in engine.full_tensors() if rank == 0}
    rows = {f"{row.line} {row.dtype} {row.home}": row.bytes for row in engine.census()}
    engine.close()
    gc.collect()
    return {"steps": seen, "weights": weights, "rows": rows}, saved


def resumed(spec: s.RunSpec, saved: Any, rank: int) -> list[list[float]]:
    """[loss, gradient norm] of the steps after HALFWAY, from `saved`."""
    engine, _ = prepare(spec)
    engine.load(saved[0], saved[1])
    seen = advance(engine, spec, range(HALFWAY, STEPS), rank, 2, reduce=True)
    engine.close()
    gc.collect()
    return seen


def main(folder: Path, compute: str, tuning: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    runs = specs(folder, compute, tuning)
    found: dict[str, Any] = {}
    states = {}
    for name in ("memory", "nvme", "nvme_optimizer"):
        found[name], states[name] = whole_run(runs[name], rank)
    found["resumed"] = resumed(runs["nvme"], states["nvme"], rank)
    found["from memory"] = resumed(runs["nvme"], states["memory"], rank)
    found["to memory"] = resumed(runs["memory"], states["nvme"], rank)
    found["to fsdp"] = resumed(runs["fsdp"], states["nvme"], rank)
    found["left"] = sorted(str(path) for path in folder.glob("swap/*"))
    if rank == 0:
        (folder / "found.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
    sys.stdout.flush()
    os._exit(0)  # gloo's threads do not always survive the interpreter's clean-up; the result is written
