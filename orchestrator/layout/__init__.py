"""The only description of a strategy: rows at rest, buffers that move, and the lowering that must honour both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator.layout import deepspeed, fsdp, plain
from orchestrator.layout.moments import saved_bytes
from orchestrator.layout.rows import LOADED, STEPPED, Buffer, Layout, Row, check_census, merge
from orchestrator.spec import (
    HEAD,
    Batch,
    Engine,
    Home,
    Parameter,
    RunSpec,
    Strategy,
    divided_table,
    only,
    parameters,
    quantised,
    scale_elements,
    stored,
    with_lora,
)

__all__ = [
    "LOADED", "STEPPED", "Buffer", "Layout", "Row", "accelerate_config", "check_census", "lay_out", "lower", "merge",
    "parameter_table", "read_back", "saved_bytes",
]  # fmt: skip

accelerate_config = fsdp.accelerate_config


def parameter_table(spec: RunSpec) -> tuple[Parameter, ...] | None:
    """The parameters of the spec's model as they are trained, or None where only the module itself can tell."""
    shape = spec.model.shape
    if shape is None or not shape.known:
        return None
    table = quantised(parameters(shape), spec.tuning.form)
    if spec.tuning.adapters:
        return with_lora(table, spec.tuning.rank, spec.tuning.targets, spec.tuning.modules, spec.tuning.dora)
    return only(table, (HEAD,)) if spec.tuning.kind == "head" else table


def lay_out(spec: RunSpec, table: Sequence[Parameter], rank: int = 0) -> Layout:
    """The Layout of rank `rank` for the parameters in `table` (from `parameter_table` or from the module itself)."""
    strategy, compute = spec.strategy, spec.precision.compute
    scales = tuple(Row("scales", dtype, Home.GPU, count) for dtype, count in scale_elements(table).items())
    table = stored(table, compute)
    if strategy.engine is Engine.DEEPSPEED:
        table = divided_table(table, strategy.tp)
        host_computes = spec.cluster.card.name == "cpu"
        position = rank // strategy.tp
        rows = deepspeed.rows(strategy, table, compute, spec.optimizer, spec.batch.accumulation, position, host_computes)
        moving = deepspeed.buffers(strategy, table, compute, spec.optimizer, position)
    elif strategy.engine is Engine.FSDP:
        rows = fsdp.rows(strategy, table, compute, spec.optimizer, rank)
        moving = fsdp.buffers(strategy, table, compute, spec.optimizer)
    else:
        rows, moving = plain.rows(table, compute, spec.optimizer), plain.buffers(table, compute, spec.optimizer)
    return Layout(rank, strategy.ranks, (*rows, *scales), moving)


def lower(spec: RunSpec) -> dict[str, Any]:
    """The strategy as the engine takes it: a DeepSpeed JSON, an FSDP2 policy, or the plain policy."""
    if spec.strategy.engine is Engine.DEEPSPEED:
        return deepspeed.lower(spec)
    return fsdp.lower(spec) if spec.strategy.engine is Engine.FSDP else plain.lower(spec)


def read_back(lowered: Mapping[str, Any]) -> tuple[Strategy, Batch, str, float]:
    """(strategy, batch, compute dtype, gradient clip) of a lowered strategy: `read_back(lower(s))` gives back s."""
    if "zero_optimization" in lowered:
        return deepspeed.read_back(lowered)
    return fsdp.read_back(lowered) if lowered["engine"] == "fsdp2" else plain.read_back(lowered)
