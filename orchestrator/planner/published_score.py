"""A published measurement beside what the planner says of the same run."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from orchestrator.layout import LOADED, lay_out
from orchestrator.planner import store
from orchestrator.planner.activations import FP32, activations
from orchestrator.planner.device import WORKSPACE_BYTES
from orchestrator.planner.plan import LAYOUT, REHEARSAL, Plan
from orchestrator.planner.predict import by_layout, by_rehearsal, shape_for, table_for
from orchestrator.planner.programme import Programme
from orchestrator.planner.published import AFTER_FORWARD, ALLOCATED, DEVICE, FITS, LITGPT, RESERVED, express
from orchestrator.spec import RunSpec
from orchestrator.units import dtype_bytes


@dataclass(frozen=True, slots=True)
class Score:
    """One row's prediction. `error` is predicted ÷ measured − 1; for the meter "fits" `right` is all there is."""

    id: str
    meter: str
    predicted: int
    measured: int
    basis: str
    right: bool | None = None

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1

    @property
    def source(self) -> str:
        """Where the row comes from: its id without the number."""
        return self.id.rpartition("-")[0]


AS_LOADED = ("frozen", "scales", "weights", "adapters")
"""Lines of a model that no optimizer knows yet."""


def _after_forward(spec: RunSpec, plan: Plan) -> int:
    """Bytes allocated when the forward has returned its logits in fp32: weights, what autograd keeps, and those."""
    held = activations(spec, shape_for(spec))
    weights = sum(row.bytes for row in lay_out(spec, table_for(spec)).at(LOADED) if row.line in AS_LOADED)
    logits = spec.batch.micro * spec.data.seq_len * shape_for(spec).vocab_size * FP32
    return weights + held.saved + _inputs_kept(spec) + logits + WORKSPACE_BYTES["earlier"]


def _inputs_kept(spec: RunSpec) -> int:
    """What bitsandbytes before 0.43.2 kept of a quantised base beyond autograd: every linear layer's input, as an attribute
    that recompute does not free (release notes of 0.43.2; autograd/_functions.py of 0.43.1, MatMul4Bit `ctx.tensors = (A, B)`).
    q, k and v share theirs, so do gate and up; without recompute the inputs of q and of o are among the activations."""
    if not spec.tuning.form:
        return 0
    shape, c = shape_for(spec), dtype_bytes(spec.precision.compute)
    tokens = spec.batch.micro * spec.data.seq_len * shape.num_hidden_layers
    width = shape.hidden_size + shape.intermediate_size
    if spec.recompute != "none":
        width += shape.hidden_size + shape.num_attention_heads * shape.head_dim
    return tokens * c * width


Rehearse = Callable[[RunSpec, Programme], Plan]


def _in_child(spec: RunSpec, programme: Programme) -> Plan:
    return by_rehearsal(spec, programme=programme)


def score(row: Mapping[str, object], base: RunSpec, basis: str = LAYOUT, rehearse: Rehearse = _in_child) -> Score | str:
    """The prediction for one row beside its measurement, or why the project cannot make one. Under basis "layout" nothing is
    rehearsed, else all whose code is here: only a trace knows what the allocator keeps beyond what is alive.

    Raises:
        RehearsalError: the row was to be rehearsed, and that failed.
    """
    run = express(row, base)
    if isinstance(run, str):
        return run
    name = str(row.get("id") or "?")
    if run.meter == AFTER_FORWARD:
        return Score(name, run.meter, _after_forward(run.spec, by_layout(run.spec, loss=run.loss)), run.measured, LAYOUT)
    if run.programme is not None and basis != LAYOUT:
        plan = _kept(run.spec, run.programme, rehearse)
    elif run.countable:
        plan = by_layout(run.spec, loss=run.loss)
    else:
        return "only a rehearsal could tell"
    if run.meter == FITS:
        return Score(name, FITS, plan.memory.used, run.measured, plan.basis, plan.fits == run.fitted)
    kept = _inputs_kept(run.spec) if run.loss == LITGPT else 0  # measured in October 2023
    predicted = {ALLOCATED: plan.memory.allocated + kept, RESERVED: plan.memory.reserved, DEVICE: plan.memory.used}[run.meter]
    return Score(name, run.meter, predicted, run.measured, plan.basis)


def _kept(spec: RunSpec, programme: Programme, rehearse: Rehearse) -> Plan:
    """The rehearsed plan of the row, from the cache where it is there."""
    name = store.key(spec, json.dumps([REHEARSAL, programme.to_json()]))
    plan = store.recall([name]).get(name)
    if plan is None:
        plan = rehearse(spec, programme)
        store.keep(name, plan)
    return plan
