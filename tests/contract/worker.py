"""One rank of the contract suite: runs every case in one process group and writes what it saw as JSON.

Started by `test_contract.py` with RANK, WORLD_SIZE and MASTER_* set; the reference runs in rank 0's process alone.
"""

from __future__ import annotations

import gc
import json
import os
import re
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from contract.cases import (
    GLOBAL_SIZE,
    QUANTISED,
    STEPS,
    SWEEPS,
    Case,
    all_cases,
    deal,
    labelled,
    run_spec,
    works,
)
from strategies import strategies

from orchestrator import engine as engines
from orchestrator import model as models
from orchestrator import spec as s
from orchestrator.layout import LOADED, STEPPED, check_census, lay_out

CPU = torch.device("cpu")
UNSTEADY = "k_proj.bias"
"""Softmax hardly sees what is added to all keys alike: gradients near the rounding of sums, which Adam makes whole updates."""

RESUMED = ("fp32", 1)
"""Cases of this precision and accumulation are also saved after two steps, loaded into a new engine, and continued."""


def prepare(spec: s.RunSpec) -> tuple[engines.Engine, Any]:
    engine = engines.make(spec, CPU, models.loss_sum)
    module = models.build(spec, engine.building())
    table = models.table_of(module)
    engine.adopt(module, models.open_weights(spec, table))
    return engine, table


def advance(engine: engines.Engine, spec: s.RunSpec, steps: range, rank: int, ranks: int, *, reduce: bool) -> list[list[float]]:
    """[loss, grad norm] of each step."""
    seen = []
    tp = spec.strategy.tp
    for step in steps:
        count, batches = labelled(step), deal(step, spec.batch, rank // tp, ranks // tp)
        total = torch.zeros(())
        for index, batch in enumerate(batches):
            total += engine.forward_backward(batch, count, last=index == len(batches) - 1)
        if reduce:
            dist.all_reduce(total)
        result = engine.step(spec.optimizer.lr)
        seen.append([float(total) / (count * tp), result.grad_norm])
    return seen


def reference(case: Case, ranks: int) -> dict[str, Any]:
    spec = run_spec(case, ranks, reference=True)
    engine, _ = prepare(spec)
    steps = advance(engine, spec, range(STEPS), 0, 1, reduce=False)
    return {"steps": steps, "weights": dict(engine.full_tensors())}


def run(case: Case, rank: int, ranks: int) -> dict[str, Any]:
    spec = run_spec(case, ranks)
    engine, table = prepare(spec)
    layout = lay_out(spec, table, rank)
    check_census(layout, engine.census(), LOADED)
    steps = advance(engine, spec, range(1), rank, ranks, reduce=True)
    check_census(layout, engine.census(), STEPPED)
    steps += advance(engine, spec, range(1, 2), rank, ranks, reduce=True)
    resumed = (case.compute, case.accumulation) == RESUMED
    saved = gather_state(engine) if resumed else None
    steps += advance(engine, spec, range(2, STEPS), rank, ranks, reduce=True)
    check_census(layout, engine.census(), STEPPED)
    weights = dict(engine.full_tensors())
    engine.close()
    result: dict[str, Any] = {"steps": steps, "weights": weights}
    if saved is not None:
        again, _ = prepare(spec)
        again.load(saved[0], saved[1])
        result["resumed"] = advance(again, spec, range(2, STEPS), rank, ranks, reduce=True)
        again.close()
        if case.tuning in ("full", *QUANTISED):
            result["moved"] = move(case, saved, rank, ranks)
    return result


def move(case: Case, saved: tuple[Any, dict[str, float]], rank: int, ranks: int) -> list[list[float]]:
    """The same run continued under the next strategy of the list, from this one's state."""
    known = strategies(ranks)
    shape = run_spec(case, ranks).model.shape
    able = [name for name in known if known[name].tp == 1 or known[name].tp in s.sizes_that_divide(shape)]
    able = [name for name in able if works(case.optimizer, name)]
    following = able.index(case.strategy) + 1 if case.strategy in able else 0
    other = replace(case, strategy=able[following % len(able)])
    spec = run_spec(other, ranks)
    spec = replace(spec, model=replace(spec.model, shape=shape))
    engine, _ = prepare(spec)
    engine.load(saved[0], saved[1])
    steps = advance(engine, spec, range(2, STEPS), rank, ranks, reduce=True)
    engine.close()
    return steps


def gather_state(engine: engines.Engine) -> tuple[Any, dict[str, float]]:
    """Every rank's owned pieces put together into whole tensors, as a checkpoint's reader would serve them."""
    pieces, scalars = engine.save()
    own = [(p.name, p.kind, p.shape, p.start, p.columns, p.data.clone()) for p in pieces if p.owned]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    whole: dict[tuple[str, str], torch.Tensor] = {}
    for name, kind, shape, start, columns, data in (piece for held in everyone for piece in held):
        target = whole.setdefault((name, kind), torch.full((torch.Size(shape).numel(),), float("nan")))
        if columns is None:
            target[start : start + data.numel()] = data
        else:
            first, rows = start // shape[1], data.view(-1, columns[1] - columns[0])
            target.view(shape)[first : first + len(rows), slice(*columns)] = rows

    def read(name: str, kind: str, start: int, stop: int) -> torch.Tensor:
        return whole[name, kind][start:stop]

    return read, scalars


def compare(found: dict[str, Any], expected: dict[str, Any]) -> dict[str, float]:
    """Largest relative differences of the losses, the gradient norms and the final weights (norm of each tensor)."""

    def worst(column: int) -> float:
        return max(abs(f[column] - e[column]) / abs(e[column]) for f, e in zip(found["steps"], expected["steps"], strict=True))

    assert found["weights"].keys() == expected["weights"].keys(), "the engines train different tensors"
    apart = max(
        float((found["weights"][name].float() - tensor.float()).norm() / tensor.float().norm().clamp_min(1e-12))
        for name, tensor in expected["weights"].items()
        if not name.endswith(UNSTEADY)
    )
    result = {"loss": worst(0), "grad_norm": worst(1), "weights": apart}
    for key, name in (("resumed", "resume"), ("moved", "move")):
        if key in found:
            pairs = zip(found[key], found["steps"][2:], strict=True)
            result[name] = max(abs(a - b) / abs(b) for again, once in pairs for a, b in zip(again, once, strict=True))
    return result


def main(output: Path, only: str, cases: Callable[[int], list[Case]]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    assert GLOBAL_SIZE % ranks == 0
    results: dict[str, Any] = {}
    references: dict[tuple[str, str, s.ModelShape | None, str], dict[str, Any]] = {}
    for case in cases(ranks):
        if not re.search(only, case.name):
            continue
        key = (case.tuning, case.compute, run_spec(case, ranks).model.shape, case.optimizer)
        if rank == 0 and key not in references:
            references[key] = reference(case, ranks)
        try:
            found = run(case, rank, ranks)
            if rank == 0:
                results[case.name] = compare(found, references[key])
        except Exception:  # one broken case must not hide the others; the text is the test's failure message
            results[case.name] = {"error": traceback.format_exc()}
            print(f"rank {rank} {case.name}\n{results[case.name]['error']}", file=sys.stderr, flush=True)
        gc.collect()
        if rank == 0:
            output.write_text(json.dumps(results, indent=1))
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # torch's own teardown may end a process whose gloo threads still run; what was measured is written


if __name__ == "__main__":
    asked = "".join(sys.argv[2:])
    main(Path(sys.argv[1]), "" if asked in SWEEPS else asked, SWEEPS.get(asked, all_cases))
