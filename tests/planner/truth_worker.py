"""One rank of the truth: performs the named cases under the tracer and writes each trace of rank 0 as JSON.

Arguments: "real" or "rehearsed", the number of ranks, a folder, names. Real ranks are that many processes in a gloo group; a
rehearsal is one process that plays rank 0.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from truth_cases import Case, all_cases, run_spec

from orchestrator.planner.performance import Performance
from orchestrator.planner.stage import play
from orchestrator.planner.trace import Trace
from orchestrator.planner.tracer import Tracer


def perform(case: Case, rank: int) -> Trace:
    """The trace of a real rank."""
    tracer = Tracer({"cpu": "gpu"})
    Performance(run_spec(case), torch.device("cpu"), tracer).run(rank)
    return tracer.trace()


def main(kind: str, ranks: int, folder: Path, names: list[str]) -> None:
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    if kind == "real" and ranks > 1:
        dist.init_process_group("gloo")
    # zero.Init leaves its own linear layer behind in torch.nn.functional, which keeps the input of frozen ones too: last.
    for case in sorted(all_cases(ranks), key=lambda case: case.strategy.startswith("zero3")):
        if case.name not in names:
            continue
        trace = perform(case, rank) if kind == "real" else play(run_spec(case), 0)
        if rank == 0:
            (folder / f"{kind}-{ranks}-{case.name}.json").write_text(json.dumps(trace.to_json()))
        gc.collect()
    if kind == "real" and ranks > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
    sys.stdout.flush()
    os._exit(0)  # neither fake tensors nor gloo's threads always survive the interpreter's clean-up; the traces are written
