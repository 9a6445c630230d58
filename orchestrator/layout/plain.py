"""One process, one card, nothing sharded: the reference that every other strategy is held to.

In half precision the module works on a half-precision copy of the trainable weights; the optimizer owns an fp32 master,
and gradients are added up in fp32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator.layout.moments import moment_rows, update_buffer, whole
from orchestrator.layout.rows import Buffer, Row, quantisation
from orchestrator.spec import Batch, Engine, Home, Optimizer, Parameter, RunSpec, Shard, Strategy
from orchestrator.units import dtype_bytes

MASTER = "fp32"


def rows(table: Sequence[Parameter], compute: str, optimizer: Optimizer) -> tuple[Row, ...]:
    """Every tensor class at rest."""
    total = sum(p.numel for p in table if p.trainable)
    line = "adapters" if any(p.adapter for p in table) else "weights"
    base = [
        Row("frozen", compute, Home.GPU, sum(p.numel for p in table if not p.trainable)),
        Row(line, compute, Home.GPU, total),
        *moment_rows(optimizer, whole([p for p in table if p.trainable]), Home.GPU),
    ]
    return tuple(base if compute == MASTER else [*base, Row("master", MASTER, Home.GPU, total)])


def buffers(table: Sequence[Parameter], compute: str, optimizer: Optimizer) -> tuple[Buffer, ...]:
    """The fp32 gradients, in half precision the one gradient that is being produced, and what the update needs."""
    trainable = [p.numel for p in table if p.trainable]
    moving = [Buffer("gradients", Home.GPU, sum(trainable) * 4, ("backward", "step"), "engine/plain.py")]
    if compute != MASTER:
        largest = max(trainable, default=0) * dtype_bytes(compute)
        moving.append(Buffer("gradients", Home.GPU, largest, ("backward",), "engine/plain.py post-accumulate hook"))
    trained = [p for p in table if p.trainable]
    return (*moving, *update_buffer(optimizer, trained, whole(trained), Home.GPU))


def lower(spec: RunSpec) -> dict[str, Any]:
    """The policy as plain data, for the run folder."""
    return {
        "engine": "plain",
        "param_dtype": spec.precision.compute,
        "master_dtype": MASTER,
        "batch": {
            "global_size": spec.batch.global_size,
            "micro": spec.batch.micro,
            "accumulation": spec.batch.accumulation,
        },
        "gradient_clipping": spec.optimizer.clip,
        **quantisation(spec),
    }


def read_back(policy: Mapping[str, Any]) -> tuple[Strategy, Batch, str, float]:
    """The inverse of `lower`."""
    strategy = Strategy(Engine.PLAIN, Shard.NONE)
    return strategy, Batch(**policy["batch"]), policy["param_dtype"], policy["gradient_clipping"]
