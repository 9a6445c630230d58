"""One of two ranks that take one step on packed rows under each engine; rank 0 writes [loss, gradient norm] of each as JSON."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from orchestrator import data, engine, model
from orchestrator.config import compose
from orchestrator.data.rows import rows_of
from orchestrator.spec import Batch, Data
from orchestrator.train.world import join, leave

STRATEGIES = ("fsdp=full_shard", "zero=stage2", "zero=stage3")
MODEL = (
    "model=tiny", "model.hidden_size=32", "model.head_dim=8", "model.intermediate_size=64", "model.num_hidden_layers=2",
    "precision=fp32", "batch.global_size=2",
)  # fmt: skip


def step(words: tuple[str, ...], prepared: data.Prepared, rank: int, ranks: int) -> list[float]:
    """[loss per token, gradient norm] of one step over all rows of `prepared`."""
    spec = compose([*MODEL, *words], ranks=ranks)
    forwards = -(-len(rows_of(prepared)) // ranks)
    batch = Batch(forwards * ranks, 1, forwards)
    spec = replace(spec, batch=batch)
    made = engine.make(spec, torch.device("cpu"), model.loss_sum)
    module = model.build(spec, made.building())
    made.adopt(module, model.open_weights(spec, model.table_of(module)))
    (of_rank,) = data.steps(prepared, batch, seed=0, rank=rank, ranks=ranks, pad_id=0, total_steps=1)
    total = torch.zeros((), dtype=torch.float64)
    for number, micro in enumerate(of_rank.micro_batches, start=1):
        total += made.forward_backward(micro, of_rank.labelled, last=number == forwards).double()
    if ranks > 1:
        dist.all_reduce(total)
    norm = made.step(1e-3).grad_norm
    made.close()
    return [float(total) / of_rank.labelled, norm]


def main(folder: Path) -> int:
    world = join("cpu")
    wanted = Data(None, 128, packing="best_fit", eval_fraction=0.6)
    tokenizer = data.load_tokenizer(wanted, None)
    packed = world.on_first(lambda: data.prepare(wanted, tokenizer, 0, folder) and True) and data.prepare(
        wanted, tokenizer, 0, folder
    )
    found = {words: step((words,), packed, world.rank, world.size) for words in STRATEGIES}
    if world.first:
        found["plain, packed"] = step((), packed, 0, 1)
        found["plain"] = step((), replace(packed, packing="none"), 0, 1)
        (folder / "found.json").write_text(json.dumps(found))
    leave()
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
