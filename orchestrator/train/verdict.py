"""Which rank hangs, by what all of them have last said: who, where, and what a person is told."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from orchestrator.errors import Fault, OrchestratorError
from orchestrator.units import format_seconds

LIBRARIES = ("/torch/", "/deepspeed/")
WAITING, ENGINE, ELSEWHERE = range(3)
"""Where a stack ends: in a collective, in torch or DeepSpeed, in other code. The rank that others wait for is further on."""

WAITED, OTHER = "the others wait for it", "it waits for another collective than the rest"


class HungRank(OrchestratorError):
    """A rank has not moved within run.timeout."""

    title = "A rank hangs, and the run is ended"


@dataclass(frozen=True, slots=True)
class State:
    """What a rank has last said of itself. `stack` lists "file:line in name", innermost last; empty: it does not answer."""

    rank: int
    host: str
    pid: int
    step: int
    phase: str
    order: int
    stack: tuple[str, ...] = ()

    @property
    def answers(self) -> bool:
        return bool(self.stack)

    @property
    def at(self) -> tuple[int, int, str]:
        """How far it has come, and the line that called what it waits in: ranks that differ here wait for different
        collectives."""
        callers = (entry for entry in reversed(self.stack) if not any(folder in entry for folder in LIBRARIES))
        return self.step, self.order, next(callers, "")

    @property
    def place(self) -> int:
        """WAITING, ENGINE or ELSEWHERE."""
        inner = self.stack[-1] if self.stack else ""
        if "/torch/distributed/" in inner or "/deepspeed/comm/" in inner:
            return WAITING
        return ENGINE if any(folder in inner for folder in LIBRARIES) else ELSEWHERE


def culprits(states: Sequence[State]) -> list[State]:
    """The ranks that the others wait for: those that do not answer; else those that are elsewhere than the rest; else the few
    that wait for another collective than most. All of them where none of this tells them apart."""
    silent = [state for state in states if not state.answers]
    if silent:
        return silent
    furthest = max(state.place for state in states)
    if any(state.place != furthest for state in states):
        return [state for state in states if state.place == furthest]
    where = Counter(state.at for state in states)
    few = min(where.values())
    return [state for state in states if where[state.at] == few]


def verdict(states: Sequence[State], seconds: float, log: Path | None) -> HungRank:
    """What to tell a person: who, where, and the innermost of its stack."""
    guilty = culprits(states)
    more = f"; the stacks of all ranks are in {log}" if log is not None else ""
    apart = len({state.at for state in states}) > 1
    if len(guilty) == len(states) > 1 and not apart:
        problem = f"all {len(states)} ranks wait for each other since {format_seconds(seconds)} in step {states[0].step}"
        return HungRank(Fault("ranks", problem, f"the network between them, or NCCL: set NCCL_DEBUG=INFO{more}"))
    faults = []
    for state in guilty:
        where = f"step {state.step}, {state.phase}"
        if not state.answers:
            problem = f"does not answer since {format_seconds(seconds)}; it was last in {where} (process {state.pid})"
            remedy = f"the process is stopped or its machine is gone: look at {state.host}{more}"
        else:
            problem = f"has not moved for {format_seconds(seconds)}: {where} (process {state.pid})"
            remedy = "\n       ".join(["it stands at", *state.stack[-6:]])
            remedy += f"\n    -> {OTHER if apart and state.place == WAITING else WAITED}{more}"
        faults.append(Fault(f"rank {state.rank} on {state.host}", problem, remedy))
    return HungRank(faults)


def silent_launcher(host: str, seconds: float, log: Path | None) -> HungRank:
    """What to tell a person where the store of torchrun on `host` answers nobody."""
    problem = f"does not answer since {format_seconds(seconds)}, and the ranks meet in its store"
    more = f"; where this rank stands is in {log}" if log is not None else ""
    return HungRank(Fault(f"torchrun on {host}", problem, f"it is stopped or its machine is gone: look at {host}{more}"))
