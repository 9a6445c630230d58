"""The optimizer of every engine, and its states as pieces of a checkpoint."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from orchestrator.engine.adafactor import Adafactor, Sum
from orchestrator.engine.blockwise import AdamW8bit, codebooks
from orchestrator.engine.census import local
from orchestrator.engine.muon import FirstRow, Joined, Muon
from orchestrator.engine.protocol import Piece
from orchestrator.engine.states import Codec, Elementwise, Fragment, Read, State, fill_run
from orchestrator.engine.updates import AdamWBf16, Lion, Rule, Updater, kernels
from orchestrator.spec import ROOT, Home, Optimizer, RunSpec, block_of, digest

MOMENTS = Elementwise(("exp_avg", "exp_avg_sq"))


@dataclass(frozen=True, slots=True)
class Parts:
    """How this rank's parts of matrices relate to those of other ranks; without an engine that cuts matrices they are whole."""

    total: Sum = lambda values: values
    first_row: FirstRow = lambda tensor: 0


WHOLE = Parts()

Make = Callable[[RunSpec, Parts], Rule]
RULES: dict[str, Make] = {
    "adamw_bf16": lambda spec, parts: AdamWBf16(spec.optimizer, spec.seed),
    "adamw_8bit": lambda spec, parts: AdamW8bit(spec.optimizer, paged=False),
    "paged_adamw_8bit": lambda spec, parts: AdamW8bit(spec.optimizer, paged=True),
    "adafactor": lambda spec, parts: Adafactor(spec.optimizer, parts.total),
    "lion": lambda spec, parts: Lion(spec.optimizer),
    "muon": lambda spec, parts: Muon(spec.optimizer, parts.first_row),
}
"""The optimizers that are not torch's own AdamW, by `Optimizer.name`."""


def prepare(spec: Optimizer) -> None:
    """Import what the optimizer needs, before anything is timed or traced."""
    if spec.name == "lion":
        kernels()
    elif spec.name.endswith("8bit"):
        codebooks()


def make_optimizer(named: Iterable[tuple[str, torch.Tensor]], spec: RunSpec, parts: Parts = WHOLE) -> torch.optim.Optimizer:
    """The optimizer of `spec` over the named tensors: whole parameters, DTensors, or what DeepSpeed will replace by flat
    buffers."""
    named = list(named)
    if spec.optimizer.name == "adamw":
        return _adamw([tensor for _, tensor in named], spec.optimizer)
    rule = RULES[spec.optimizer.name](spec, parts)
    if not isinstance(rule, Muon):
        return Updater([tensor for _, tensor in named], rule, spec.optimizer.lr)
    hidden = [tensor for name, tensor in named if tensor.dim() == 2 and block_of(name) != ROOT]
    others = [tensor for name, tensor in named if tensor.dim() != 2 or block_of(name) == ROOT]
    made: list[torch.optim.Optimizer] = [Updater(hidden, rule, spec.optimizer.lr)] if hidden else []
    return Joined([*made, *([_adamw(others, spec.optimizer)] if others else [])])


def _adamw(tensors: list[torch.Tensor], spec: Optimizer) -> torch.optim.Optimizer:
    """torch's AdamW in one group. Fused: one pass over the state, no parameter-sized temporary, on CPU and CUDA alike."""
    return torch.optim.AdamW(tensors, lr=spec.lr, betas=spec.betas, eps=spec.eps, weight_decay=spec.weight_decay, fused=True)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def _steps_taken(optimizer: torch.optim.Optimizer) -> int:
    """Number of updates that the optimizer's state has seen."""
    for state in optimizer.state.values():
        if "step" in state:
            return int(state["step"])
    return 0


def _geometry(spec: RunSpec) -> float:
    """A number that two runs share if they cut every tensor alike."""
    return float(zlib.crc32(digest(spec.strategy).encode()))


def scalars(optimizer: torch.optim.Optimizer, spec: RunSpec, loss_scale: float) -> dict[str, float]:
    """What a checkpoint keeps beside the pieces, alike on every rank."""
    return {"optimizer_steps": _steps_taken(optimizer), "loss_scale": loss_scale, "geometry": _geometry(spec)}


def _codec(optimizer: torch.optim.Optimizer) -> Codec:
    if isinstance(optimizer, Updater):
        return optimizer.rule.codec
    return Muon.codec if isinstance(optimizer, Joined) else MOMENTS


def _fresh_state(optimizer: torch.optim.Optimizer, tensor: torch.Tensor, step: int) -> State:
    """The state that the optimizer would have made for `tensor`, empty, with `step` updates counted."""
    if isinstance(optimizer, Joined):
        optimizer = optimizer.part_of(tensor)
    if isinstance(optimizer, Updater):
        return {"step": step, **optimizer.rule.fresh(tensor)}
    # Fused AdamW keeps its counter beside the parameter (torch/optim/adamw.py).
    counter = torch.tensor(float(step), dtype=torch.float32, device=tensor.device)
    empty = {kind: torch.zeros_like(tensor, memory_format=torch.preserve_format, requires_grad=False) for kind in MOMENTS.kinds}
    return {"step": counter, **empty}


def pieces(optimizer: torch.optim.Optimizer, fragments: Iterable[Fragment], owned: bool) -> Iterator[Piece]:
    """Weights and states of the fragments of this rank."""
    codec = _codec(optimizer)
    for fragment in fragments:
        flat = local(fragment.tensor.detach()).reshape(-1)
        weight = flat.narrow(0, fragment.offset, fragment.count)
        yield Piece(fragment.name, "weight", fragment.shape, fragment.start, weight, owned)
        state = optimizer.state.get(fragment.tensor)
        for kind, start, data in codec.saved(state, fragment) if state else ():
            yield Piece(fragment.name, kind, fragment.shape, start, data, owned)


@torch.no_grad()
def load(
    optimizer: torch.optim.Optimizer,
    spec: RunSpec,
    tensors: Iterable[torch.Tensor],
    fragments: Iterable[Fragment],
    read: Read,
    saved: dict[str, float],
) -> None:
    """Fill `tensors`, which consist of `fragments`, and their states from a checkpoint whose scalars are `saved`."""
    steps, same = int(saved["optimizer_steps"]), saved.get("geometry") == _geometry(spec)
    codec = _codec(optimizer)
    held: dict[int, list[Fragment]] = {}
    for fragment in fragments:
        held.setdefault(id(fragment.tensor), []).append(fragment)
    for tensor in tensors:
        own = held.get(id(tensor), [])
        flat = local(tensor.detach()).view(-1)
        for f in own:
            fill_run(flat.narrow(0, f.offset, f.count), read, f.name, "weight", f.start, f.width)
        if steps and flat.numel():
            state = _fresh_state(optimizer, tensor, steps)
            codec.restore(state, own, read, same)
            optimizer.state[tensor] = state


def live_states(optimizer: torch.optim.Optimizer, home: Home) -> list[tuple[str, Home, list[Any]]]:
    """Every tensor of the optimizer's states as classes of the census: those in `home`, and those that the driver may page out
    to the host. Counters are too small to be counted."""
    every = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
    paged = [value for value in every if getattr(value, "is_paged", False)]
    return [("moments", Home.CPU, paged), ("moments", home, [v for v in every if not getattr(v, "is_paged", False)])]
