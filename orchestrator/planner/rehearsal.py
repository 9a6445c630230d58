"""The rehearsal: a run performed by the real engine code on fake tensors, as rank r of N, in a process of its own.

`rehearse(spec, rank)` is the door. `python -m orchestrator.planner.rehearsal` is the child: a spec as JSON on stdin, the
result as JSON on stdout.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from orchestrator.errors import OrchestratorError
from orchestrator.layout import parameter_table
from orchestrator.planner.habits import with_foreach, without_masters
from orchestrator.planner.programme import FULL, Programme
from orchestrator.planner.repeat import ENOUGH, SHORT, repeat
from orchestrator.planner.splice import splice
from orchestrator.planner.trace import Living, Note, Trace
from orchestrator.spec import ROOT, Engine, Home, RunSpec, Shard, from_json, stored, to_json
from orchestrator.units import GIB, ceil_div, dtype_bytes


@dataclass(frozen=True)
class Rehearsal:
    """What one rank would hold.

    Attributes:
        rank: the rank that was played.
        trace: every allocation and free, for `allocator.replay`.
        peaks: home ("gpu", "cpu") to phase to the largest sum of living bytes, as requested (not rounded).
        alive: what was alive at the peak of the device, largest first.
        peak_phase: the phase of that peak.
        seconds: how long the rehearsal took.
        basis: "full" where every layer was traced, "spliced" where some were repeated.
    """

    rank: int
    trace: Trace
    peaks: Mapping[str, Mapping[str, int]]
    alive: tuple[Living, ...]
    peak_phase: str
    seconds: float
    basis: str = "full"

    @property
    def peak_bytes(self) -> int:
        """Largest sum of living bytes on the device that computes, over all phases."""
        return max(self.peaks["gpu"].values(), default=0)

    @property
    def host_peak_bytes(self) -> int:
        """Largest sum of living tensor bytes on the host; 0 where the host is the device that computes."""
        return max(self.peaks["cpu"].values(), default=0)

    def to_json(self) -> dict[str, Any]:
        return {
            "rank": self.rank, "trace": self.trace.to_json(), "peaks": {h: dict(p) for h, p in self.peaks.items()},
            "alive": [list(item) for item in self.alive], "peak_phase": self.peak_phase, "seconds": self.seconds,
            "basis": self.basis,
        }  # fmt: skip

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Rehearsal:
        """Inverse of `to_json`."""
        return cls(
            data["rank"], Trace.from_json(data["trace"]), data["peaks"], tuple(Living(*item) for item in data["alive"]),
            data["peak_phase"], data["seconds"], data["basis"],
        )  # fmt: skip


class RehearsalError(OrchestratorError):
    """The rehearsal itself failed: our own bug, a new library version, or a model that cannot be traced."""

    title = "The run could not be rehearsed"


def summarize(rank: int, trace: Trace, seconds: float, basis: str = "full") -> Rehearsal:
    """The peaks of a trace and what was alive at the highest of the device."""
    at = trace.peak_position()
    phase = trace.segments[trace.notes[trace.note[at]].segment] if at >= 0 else "load"
    peaks = {home: trace.peaks(home) for home in ("gpu", "cpu")}
    return Rehearsal(rank, trace, peaks, trace.living(at), phase, seconds, basis)


def rehearse(
    spec: RunSpec, rank: int = 0, *, timeout: float = 600.0, whole: bool = False, programme: Programme = FULL
) -> Rehearsal:
    """What rank `rank` of `spec.strategy.ranks` allocates in load, the optimizer steps of `programme` (two of full samples)
    and save. Runs in a child process.

    Where it is exact, a few layers are traced and the others spliced in (`basis` says so), unless `whole` is set.

    Raises:
        RehearsalError: the child failed or took longer than `timeout` seconds; carries its last words.
    """
    request = json.dumps({"spec": to_json(spec), "rank": rank, "whole": whole, "programme": programme.to_json()})
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(sys.path)}
    try:
        child = subprocess.run(
            [sys.executable, "-m", "orchestrator.planner.rehearsal"],
            input=request, capture_output=True, text=True, timeout=timeout, env=environment, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise RehearsalError(f"{spec.strategy.label}: no result after {timeout:.0f} s") from error
    if child.returncode != 0:
        words = child.stderr.strip().splitlines()[-12:] or ["(it said nothing)"]
        raise RehearsalError(f"{spec.strategy.label}: the rehearsal ended with code {child.returncode}\n" + "\n".join(words))
    return Rehearsal.from_json(json.loads(child.stdout.splitlines()[-1]))


def rehearse_here(spec: RunSpec, rank: int = 0, *, whole: bool = False, programme: Programme = FULL) -> Rehearsal:
    """The same in this process, which afterwards is good for rehearsals alone (see `fake`); torch's default process group must
    not exist yet, or be the fake one with the same rank and size."""
    from orchestrator.planner.stage import play

    began = time.perf_counter()
    spec, programme = programme.fitted(spec)
    shortened = None if whole else _shortened(spec, rank, programme)
    trace = shortened or play(spec, rank, programme)
    trace = trace if spec.checkpoint.background else with_chunk(trace)
    trace = trace if programme.masters else without_masters(trace, spec.strategy.engine)
    trace = with_foreach(trace) if programme.foreach else trace
    return summarize(rank, trace, time.perf_counter() - began, "full" if shortened is None else "spliced")


SAVED_AT_ONCE = GIB
"""Bytes of pieces that a checkpoint gathers on the host before it writes them (train/checkpoint.py, CHUNK_BYTES)."""


def with_chunk(trace: Trace) -> Trace:
    """The trace with one more block at its end: the pieces that a checkpoint's writer holds on the host at once, to within one
    piece. Where the host is the device that computes, pieces are written from where they lie and nothing is added."""
    save = trace.segments.index("save")
    pieces = [e.bytes for e in trace if e.block > 0 and e.note.segment == save and e.note.home == "cpu"]
    if not pieces:
        return trace
    held = min(sum(pieces), max(SAVED_AT_ONCE, *pieces))
    number, note = max(trace.block) + 1, Note("checkpoint chunk", len(trace.segments) - 1, home="cpu")
    block = trace.block + array("q", (number, -number))
    size = trace.size + array("q", (held, held))
    index = trace.note + array("q", (len(trace.notes), len(trace.notes)))
    return Trace(trace.segments, (*trace.notes, note), block, size, index, trace.lines)


FEW = 4
"""Layers of the shallower of the two traces that are spliced: the two at each end are special, one of two repeats."""


def unit(spec: RunSpec) -> int:
    """Blocks of which each run of so many is like the next: one, but with `recompute=every_n`."""
    return spec.recompute_every if spec.recompute == "every_n" else 1


def shallow(spec: RunSpec) -> int | None:
    """Runs of like blocks (see `unit`) in the shallower of the two traces that are spliced; None where the whole depth is
    traced: it is no deeper, no multiple of the blocks that repeat, or the strategy's events are not those of the layers."""
    shape = spec.model.shape
    if shape is None or not shape.known or shape.num_hidden_layers % unit(spec):
        return None
    if spec.strategy.engine is Engine.DEEPSPEED:
        return _shallow_zero3(spec)
    return FEW if shape.num_hidden_layers > 2 * FEW * unit(spec) else None


WORTH = 3
"""ZeRO-3 is spliced where the whole depth is so many times the shallower trace's: two are made, and put together."""


def _shallow_zero3(spec: RunSpec) -> int | None:
    """The same under DeepSpeed: under ZeRO-3 with adapters, all on the card. Elsewhere flat buffers and buckets are filled by
    weights of several layers, and never at the same place of a layer.

    At both ends of a pass so many layers are special as the thresholds of gathering and of fetching ahead reach
    (`stage3_max_live_parameters` and others, in elements as they rest); those between are alike. The bucket must hold all
    gradients of the traced layers (see `buckets`).
    """
    strategy, knobs, table, shape = spec.strategy, spec.strategy.buckets, parameter_table(spec), spec.model.shape
    homes = (strategy.optimizer_home, strategy.parameter_home)
    able = strategy.shard is Shard.PARAMETERS and spec.tuning.adapters and homes == (Home.GPU, Home.GPU) and unit(spec) == 1
    able = able and strategy.gradients is None  # emptying into another dtype makes a copy of each gradient
    if not able or knobs is None or table is None or shape is None:
        return None
    block = [p for p in stored(table, spec.precision.compute) if p.block == 1]
    whole = sum(p.numel for p in block)
    reach = ceil_div(max(knobs.max_live, knobs.max_reuse) + knobs.prefetch, whole)
    layers = 2 * reach + 2
    outside, inside = (sum(p.numel for p in table if p.trainable and p.block == number) for number in (ROOT, 1))
    fits = outside + (layers + 1) * inside <= knobs.reduce
    fits = fits and outside + shape.num_hidden_layers * inside <= knobs.sub_group  # one flat buffer, whatever the depth
    return layers if fits and shape.num_hidden_layers >= WORTH * layers else None


def _shortened(spec: RunSpec, rank: int, programme: Programme) -> Trace | None:
    """The trace of a run with fewer layers or micro-batches, made as long as the whole one; None where that is not exact."""
    from orchestrator.planner.stage import play

    more = 0 if programme.lengths else min(spec.batch.accumulation, ENOUGH) - SHORT
    if more > 0:
        size = spec.strategy.dp * spec.batch.micro * SHORT
        spec = replace(spec, batch=replace(spec.batch, global_size=size, accumulation=SHORT))
    trace = _spliced(spec, rank, programme)
    if more <= 0:
        return trace
    return repeat(trace or play(spec, rank, programme), more)


def _spliced(spec: RunSpec, rank: int, programme: Programme) -> Trace | None:
    from orchestrator.planner.buckets import emptied_in_time
    from orchestrator.planner.stage import play

    few, shape, knobs = shallow(spec), spec.model.shape, spec.strategy.buckets
    if few is None or shape is None:
        return None

    def at(units: int) -> Trace:
        shallower = replace(spec.model, shape=replace(shape, num_hidden_layers=units * unit(spec)))
        return play(replace(spec, model=shallower), rank, programme, marked=knobs is not None)

    trace = splice(at(few), at(few + 1), shape.num_hidden_layers // unit(spec) - few)
    if trace is None or knobs is None:
        return trace
    trace = emptied_in_time(trace, knobs.reduce, dtype_bytes(spec.precision.compute))
    return None if trace is None else trace.settled()


def main() -> None:
    request = json.load(sys.stdin)
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print on stdout; the answer must be alone there
    spec, programme = from_json(RunSpec, request["spec"]), Programme.from_json(request["programme"])
    rehearsal = rehearse_here(spec, request["rank"], whole=request["whole"], programme=programme)
    json.dump(rehearsal.to_json(), answer)
    answer.flush()
    os._exit(0)  # fake tensors and fake groups do not survive the interpreter's clean-up


if __name__ == "__main__":
    main()
