"""One rank whose peer gets a loss that is not a number: writes what its engine made of it.

Arguments: the output file. For each strategy one good step, then one in which rank 1's loss is nan, then a good one again.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from contract.cases import Case, deal, labelled, run_spec
from torch import nn

from orchestrator import engine as engines
from orchestrator import model as models
from orchestrator.data.batch import MicroBatch

CASES = [
    *(Case(name, "full", "fp32", 1) for name in ("zero0", "zero1", "zero2", "zero2_optimizer", "zero3", "zero3_cpu")),
    *(Case(name, "full", "bf16", 1) for name in ("zero1", "zero3", "full_shard")),
    Case("full_shard", "full", "fp32", 1),
    Case("hybrid_shard", "full", "fp32", 1),
    Case("full_shard", "full", "fp32", 1, optimizer="adamw_8bit"),
    Case("zero2", "full", "fp32", 1, optimizer="lion"),
]


def run(case: Case, rank: int, ranks: int) -> dict[str, Any]:
    spoiled = False

    def loss_sum(model: nn.Module, batch: MicroBatch) -> torch.Tensor:
        loss = models.loss_sum(model, batch)
        return loss * float("nan") if spoiled and rank == 1 else loss

    spec = run_spec(case, ranks)
    engine = engines.make(spec, torch.device("cpu"), loss_sum)
    module = models.build(spec, engine.building())
    engine.adopt(module, models.open_weights(spec, models.table_of(module)))

    def step(number: int) -> Any:
        (batch,) = deal(number, spec.batch, rank, ranks)
        engine.forward_backward(batch, labelled(number), last=True)
        return engine.step(spec.optimizer.lr)

    def state() -> dict[str, torch.Tensor]:
        return {f"{p.name} {p.kind}": p.data.clone() for p in engine.save()[0]}

    good = step(0)
    before = state()
    spoiled = True
    bad = step(1)
    after = state()
    spoiled = False
    again = step(1)
    changed = [name for name, tensor in before.items() if not torch.equal(tensor, after[name])]
    engine.close()
    return {"finite": [good.finite, bad.finite, again.finite], "changed": len(changed), "held": len(before)}


def main(output: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    found = {case.name: run(case, rank, ranks) for case in CASES}
    output.with_suffix(f".{rank}").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    sys.stdout.flush()
    os._exit(0)  # gloo's threads do not always survive the interpreter's clean-up; what was found is written
