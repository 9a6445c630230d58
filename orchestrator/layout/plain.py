"""One process, one card, nothing sharded: the reference that every other strategy is held to.

In half precision the module works on a half-precision copy of the trainable weights; the optimizer owns an fp32 master,
and gradients are added up in fp32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator.layout.rows import STEPPED, Buffer, Row, quantisation
from orchestrator.spec import Batch, Engine, Home, Parameter, RunSpec, Shard, Strategy
from orchestrator.units import dtype_bytes

MASTER = "fp32"


def rows(table: Sequence[Parameter], compute: str) -> tuple[Row, ...]:
    """Every tensor class at rest."""
    total = sum(p.numel for p in table if p.trainable)
    line = "adapters" if any(p.adapter for p in table) else "weights"
    base = [
        Row("frozen", compute, Home.GPU, sum(p.numel for p in table if not p.trainable)),
        Row(line, compute, Home.GPU, total),
        Row("moments", MASTER, Home.GPU, 2 * total, since=STEPPED),
    ]
    return tuple(base if compute == MASTER else [*base, Row("master", MASTER, Home.GPU, total)])


def buffers(table: Sequence[Parameter], compute: str) -> tuple[Buffer, ...]:
    """The fp32 gradients, and in half precision the one gradient that is being produced."""
    trainable = [p.numel for p in table if p.trainable]
    moving = [Buffer("gradients", Home.GPU, sum(trainable) * 4, ("backward", "step"), "engine/plain.py")]
    if compute != MASTER:
        largest = max(trainable, default=0) * dtype_bytes(compute)
        moving.append(Buffer("gradients", Home.GPU, largest, ("backward",), "engine/plain.py post-accumulate hook"))
    return tuple(moving)


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
