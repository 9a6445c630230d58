"""One real rank: performs the named cases under the tracer; rank 0 writes each trace as JSON. Arguments: folder, names."""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from truth_cases import all_cases, run_spec

from orchestrator.planner.performance import Performance
from orchestrator.planner.tracer import Tracer


def main(folder: Path, names: list[str]) -> None:
    torch.set_num_threads(1)
    if int(os.environ["WORLD_SIZE"]) > 1:
        dist.init_process_group("gloo")
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    # zero.Init leaves its own linear layer behind in torch.nn.functional, which keeps the input of frozen ones too: last.
    for case in sorted(all_cases(ranks), key=lambda case: case.strategy.startswith("zero3")):
        if case.name not in names:
            continue
        tracer = Tracer({"cpu": "gpu"})
        Performance(run_spec(case), torch.device("cpu"), tracer).run(rank)
        if rank == 0:
            (folder / f"{ranks}-{case.name}.json").write_text(json.dumps(tracer.trace().to_json()))
        gc.collect()
    if ranks > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
