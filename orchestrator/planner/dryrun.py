"""The dry run: the same performance as the rehearsal, on one real device with real tensors, as rank r of N.

The process group is the fake one, so the other ranks need not exist; memory is real. What it measures stands beside what
the rehearsal predicts, phase by phase and event by event, so that a difference points at an operation. For the life of the
process: run each in one of its own (`python -m orchestrator.planner.dryrun`, a request as JSON on stdin, the result on
stdout).
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from orchestrator import model as models
from orchestrator.cluster.local import host_bytes
from orchestrator.engine import deepspeed_alone
from orchestrator.engine.protocol import Engine, Weights
from orchestrator.errors import Fault, MisfitError, OrchestratorError
from orchestrator.planner import fake
from orchestrator.planner.blank import BlankWeights
from orchestrator.planner.device import CPU
from orchestrator.planner.performance import Performance
from orchestrator.planner.predict import by_layout
from orchestrator.planner.stage import without_files
from orchestrator.planner.trace import Trace
from orchestrator.planner.tracer import Tracer
from orchestrator.spec import Card, Parameter, RunSpec, from_json, to_json
from orchestrator.spec import Engine as Kind
from orchestrator.units import format_bytes

SHOWN_OPERATIONS = 8


@dataclass(frozen=True, slots=True)
class PhaseMemory:
    """Highest bytes of one phase: requested by the traced operations, and on CUDA what the allocator gave out (`allocated`),
    held (`reserved`) and what the driver saw used on the whole device at the end of the phase (`device_used`)."""

    phase: str
    requested: int
    allocated: int | None = None
    reserved: int | None = None
    device_used: int | None = None


@dataclass(frozen=True)
class DryRun:
    """What one rank really held. `error` is the out-of-memory message where there was one: a result, not an accident."""

    rank: int
    device: str
    phases: tuple[PhaseMemory, ...]
    step_seconds: float | None
    trace: Trace
    error: str | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "rank": self.rank, "device": self.device, "phases": [asdict(phase) for phase in self.phases],
            "step_seconds": self.step_seconds, "trace": self.trace.to_json(), "error": self.error,
        }  # fmt: skip

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> DryRun:
        """Inverse of `to_json`."""
        phases = tuple(PhaseMemory(**phase) for phase in data["phases"])
        trace = Trace.from_json(data["trace"])
        return cls(data["rank"], data["device"], phases, data["step_seconds"], trace, data["error"])


class DryRunError(OrchestratorError):
    """The dry run ended for another reason than memory."""

    title = "The dry run failed"


def check_host(spec: RunSpec) -> None:
    """Nothing, where the memory of this machine holds what one rank of `spec` would hold on a card and beside it.

    Raises:
        MisfitError: it does not, by the Layout: the kernel would end the process without a word.
    """
    made = by_layout(spec)
    need, there = made.memory.allocated + made.host.need, host_bytes()
    if need <= there:
        return
    problem = f"no card is used, and one rank holds {format_bytes(need)} in all, of {format_bytes(there)} of host memory"
    remedy = "launch/plan.py basis=rehearsal predicts it without that memory; or try it on a GPU, or with a smaller model"
    raise MisfitError(Fault("device=cpu", problem, remedy))


class _Nothing(Weights):
    """Zeros: the values of weights do not change what they weigh, and drawing billions of them takes minutes."""

    def __init__(self, table: tuple[Parameter, ...]) -> None:
        self._widths = {parameter.name: parameter.shape[-1] for parameter in table}

    def read(self, name: str, start: int, stop: int, columns: tuple[int, int] | None = None) -> torch.Tensor:
        count = stop - start if columns is None else (stop - start) // self._widths[name] * (columns[1] - columns[0])
        return torch.zeros(1).expand(count)


def _no_weights(spec: RunSpec, table: tuple[Parameter, ...]) -> Weights:
    return _Nothing(table)


def on_host(spec: RunSpec) -> RunSpec:
    """The same rank with its tensors in this machine's memory in place of a card's."""
    memory = host_bytes()
    card = Card(CPU, memory, half_tflops=0.0, memory_gb_per_s=0.0, link_gb_per_s=0.0, bf16=True, source="in place of a card")
    cluster = replace(spec.cluster, card=card, host_bytes=memory)
    return replace(spec, cluster=cluster, strategy=replace(spec.strategy, pin_memory=False))


class _Meter(Tracer):
    """A tracer that also reads the CUDA allocator's own peaks at the border of each phase, and clocks the steps."""

    def __init__(self, device: torch.device) -> None:
        cuda = device.type == "cuda"
        homes = {"cuda": "gpu", "cpu": "cpu"} if cuda else {"cpu": "gpu"}
        super().__init__(homes, (lambda: torch.cuda.current_stream().stream_id) if cuda else lambda: 0)
        self.device, self.cuda = device, cuda
        self.measured: dict[str, tuple[int, int, int]] = {}
        self.forwards: list[float] = []
        self.ended = 0.0

    def enter_phase(self, phase: str) -> None:
        self.close_phase()
        if phase == "forward":
            self.forwards.append(time.perf_counter())
        if phase == "save":
            self.ended = time.perf_counter()
        super().enter_phase(phase)

    def close_phase(self) -> None:
        """Take the peaks of the phase that ends."""
        if not self.cuda:
            return
        torch.cuda.synchronize()
        if self._segments:
            free, total = torch.cuda.mem_get_info()
            now = (torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved(), total - free)
            before = self.measured.get(self.phase, (0, 0, 0))
            self.measured[self.phase] = (max(now[0], before[0]), max(now[1], before[1]), max(now[2], before[2]))
        torch.cuda.reset_peak_memory_stats()


class _AlonePerformance(Performance):
    def make(self) -> Engine:
        engine = super().make()
        if self.spec.strategy.engine is Kind.DEEPSPEED:
            deepspeed_alone.agree_with_peers()
        return engine


def dry_run_here(spec: RunSpec, rank: int, device: torch.device) -> DryRun:
    """The dry run in this process, which afterwards is good for nothing else."""
    if spec.strategy.engine is not Kind.PLAIN and not dist.is_initialized():
        fake.join(rank, spec.strategy.ranks)
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        limit = spec.cluster.card.memory_bytes
        if spec.cluster.card.name != "cpu" and limit < total:
            torch.cuda.set_per_process_memory_fraction(limit / total, device)
    meter, error = _Meter(device), None
    try:
        source = models.open_weights if spec.model.path is None else BlankWeights
        _AlonePerformance(without_files(spec), device, meter, _no_weights if device.type == "cuda" else source).run(rank)
    except torch.OutOfMemoryError as caught:
        error = f"out of memory in {meter.phase}: {str(caught).splitlines()[0]}"
    meter.close_phase()
    trace = meter.trace()
    phases = tuple(PhaseMemory(phase, peak, *meter.measured.get(phase, ())) for phase, peak in trace.peaks("gpu").items())
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return DryRun(rank, name, phases, _last_step(meter, spec), trace, error)


def _last_step(meter: _Meter, spec: RunSpec) -> float | None:
    """Seconds of the last optimizer step, from its first forward to its end; None if it was not reached."""
    if not meter.ended or len(meter.forwards) < spec.batch.accumulation:
        return None
    return meter.ended - meter.forwards[-spec.batch.accumulation]


def dry_run(spec: RunSpec, rank: int = 0, device: str = "cuda", *, timeout: float = 600.0) -> DryRun:
    """What rank `rank` of `spec.strategy.ranks` really holds on `device` ("cuda" or "cpu"). Runs in a child process.

    Raises:
        DryRunError: the child ended for another reason than memory, or not within `timeout` seconds; carries its last words.
    """
    request = json.dumps({"spec": to_json(spec), "rank": rank, "device": device})
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    try:
        child = subprocess.run(
            [sys.executable, "-m", "orchestrator.planner.dryrun"],
            input=request, capture_output=True, text=True, timeout=timeout, env=environment, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        problem = f"two steps took longer than {timeout:.0f} s on {device}"
        remedy = "use fewer tokens (data.seq_len, batch.micro) or a smaller model"
        raise DryRunError(Fault(spec.strategy.label, problem, remedy)) from error
    if child.returncode == -signal.SIGKILL:
        problem = "the kernel ended it, mostly because the machine's memory was full"
        raise DryRunError(Fault(spec.strategy.label, problem, "use a smaller model, or launch/plan.py basis=rehearsal"))
    if child.returncode != 0:
        words = "\n".join(child.stderr.strip().splitlines()[-12:])
        raise DryRunError(f"{spec.strategy.label}: the dry run ended with code {child.returncode}\n{words}")
    return DryRun.from_json(json.loads(child.stdout.splitlines()[-1]))


def differing_operations(real: Trace, predicted: Trace) -> list[str]:
    """The operations whose allocations differ between two traces, by the bytes that they differ in, largest first."""

    def totals(trace: Trace) -> Counter[tuple[str, str]]:
        counted: Counter[tuple[str, str]] = Counter()
        for event in trace:
            if event.block > 0 and event.note.home == "gpu":
                counted[trace.segments[event.note.segment], event.note.op] += event.bytes
        return counted

    first, second = totals(real), totals(predicted)
    apart = {key: first[key] - second[key] for key in first.keys() | second.keys() if first[key] != second[key]}
    worst = sorted(apart.items(), key=lambda item: -abs(item[1]))[:SHOWN_OPERATIONS]
    return [f"{phase} {op} {difference:+,} B" for (phase, op), difference in worst]


def error_of(measured: int, predicted: int) -> float:
    """(predicted − measured) ÷ measured; nan where nothing was measured."""
    return (predicted - measured) / measured if measured else math.nan


def main() -> None:
    request = json.load(sys.stdin)
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print on stdout; the answer must be alone there
    spec = from_json(RunSpec, request["spec"])
    device = torch.device(request["device"], 0) if request["device"] == "cuda" else torch.device("cpu")
    json.dump(dry_run_here(spec, request["rank"], device).to_json(), answer)
    answer.flush()
    os._exit(0)  # fake groups do not survive the interpreter's clean-up


if __name__ == "__main__":
    main()
