"""FSDP2 and tensor parallelism: what a rank keeps, the wrap policy that makes it so, and accelerate's way to say the same.

Read from torch 2.13 torch/distributed/fsdp/_fully_shard/_fsdp_param.py (dim-0 chunks, padded to the first rank's).
Trainable parameters rest in fp32 and are their own master; frozen ones rest in the compute dtype. Weights are gathered
in the compute dtype and gradients reduced in fp32. Under tensor parallelism all of this holds for a rank's part of each
parameter (`spec/division.py`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator.layout.moments import Held, hidden_matrix, moment_rows, update_buffer
from orchestrator.layout.rows import Buffer, Row, quantisation
from orchestrator.spec import (
    ROOT,
    Batch,
    Division,
    Engine,
    Home,
    Optimizer,
    Parameter,
    RunSpec,
    Shard,
    Strategy,
    divided_table,
    division,
)
from orchestrator.units import ceil_div, dtype_bytes

MASTER = "fp32"


def _chunk(parameter: Parameter, ranks: int, rank: int) -> tuple[int, int]:
    """(elements of this rank's storage, elements of it that are real): torch.chunk over dim 0, padded to the first chunk."""
    rows, rest = parameter.shape[0], math.prod(parameter.shape[1:])
    stride = ceil_div(rows, ranks)
    real = max(0, min(rows - rank * stride, stride))
    return stride * rest, real * rest


def _held(parameters: Sequence[Parameter], ranks: int, position: int) -> tuple[Held, ...]:
    """The trained parameters as the optimizer of one rank sees them: without the padding of their storage."""
    rows = [_chunk(p, ranks, position)[1] // math.prod(p.shape[1:]) for p in parameters]
    return tuple(Held((own, *p.shape[1:]), hidden_matrix(p)) for p, own in zip(parameters, rows, strict=True))


def rows(strategy: Strategy, table: Sequence[Parameter], compute: str, optimizer: Optimizer, rank: int) -> tuple[Row, ...]:
    """Every tensor class at rest on rank `rank`; its position on the shard axis is that of its group, modulo `dp_shard`."""
    ranks, home = strategy.dp_shard, strategy.parameter_home
    position = rank // strategy.tp % ranks
    table = divided_table(table, strategy.tp)
    line = "adapters" if any(p.adapter for p in table) else "weights"
    result: list[Row] = []
    for name, dtype, members in (
        ("frozen", compute, [p for p in table if not p.trainable]),
        (line, MASTER, [p for p in table if p.trainable]),
    ):
        chunks = [_chunk(p, ranks, position) for p in members]
        held, real = sum(c[0] for c in chunks), sum(c[1] for c in chunks)
        result.append(Row(name, dtype, home, held, ranks * strategy.tp, held - real))
        if dtype == MASTER and name == line:
            result += moment_rows(optimizer, _held(members, ranks, position), home, ranks * strategy.tp)
    return tuple(result)


def buffers(strategy: Strategy, table: Sequence[Parameter], compute: str, optimizer: Optimizer) -> tuple[Buffer, ...]:
    """Gathered weights and reduce-scatter inputs, by group (each block, and the root with embeddings and head)."""
    groups: dict[int, int] = {}
    learned: dict[int, int] = {}
    table = divided_table(table, strategy.tp)
    for parameter in table:
        groups[parameter.block] = groups.get(parameter.block, 0) + parameter.numel
        learned[parameter.block] = learned.get(parameter.block, 0) + (parameter.numel if parameter.trainable else 0)
    trained = [p for p in table if p.trainable]
    size = dtype_bytes(compute)
    root = groups.get(ROOT, 0)
    block = max((numel for index, numel in groups.items() if index != ROOT), default=0)
    ahead = 2 if strategy.dp_shard > 1 else 1  # a group of one has nothing to fetch ahead
    gathered = sum(groups.values()) if not strategy.reshard_after_forward else root + ahead * block
    scatter = max(learned.values(), default=0) * 4
    trainable = sum(learned.values())
    own = ceil_div(trainable, strategy.dp_shard) * 4
    partial = sum(p.numel for p in table if p.trainable and division(p.name) is Division.SUMMED)
    summed = ceil_div(partial, strategy.dp_shard) * 4 if strategy.tp > 1 else 0
    held = Buffer("gradients", strategy.parameter_home, own, ("backward", "step"), "_fsdp_param.py sharded gradients, fp32")
    return (
        Buffer("gathered", Home.GPU, gathered * size, ("forward", "backward"), "_fsdp_param_group.py unshard and prefetch"),
        Buffer("reduce_scatter", Home.GPU, scatter, ("backward",), "_fsdp_collectives.py foreach_reduce, reduce_dtype fp32"),
        held,
        *update_buffer(optimizer, trained, _held(trained, strategy.dp_shard, 0), strategy.parameter_home),
        Buffer("summed", Home.GPU, summed, ("step",), "engine/tensor_parallel.py add_up: partial gradients in one message"),
    )


def lower(spec: RunSpec) -> dict[str, Any]:
    """The FSDP2 policy of a spec: mesh, wrapping, dtypes and homes, as plain data; `engine.fsdp` carries it out."""
    strategy = spec.strategy
    return {
        "engine": "fsdp2",
        "mesh": {"dp_replicate": strategy.dp_replicate, "dp_shard": strategy.dp_shard, "tp": strategy.tp},
        "wrap": ["block", "root"],
        "reshard_after_forward": strategy.reshard_after_forward,
        "mixed_precision": {
            "param_dtype": spec.precision.compute,
            "reduce_dtype": MASTER,
            "rest_trainable": MASTER,
            "rest_frozen": spec.precision.compute,
        },
        "offload": {"device": str(strategy.parameter_home), "pin_memory": strategy.pin_memory},
        "batch": {
            "global_size": spec.batch.global_size,
            "micro": spec.batch.micro,
            "accumulation": spec.batch.accumulation,
        },
        "gradient_clipping": spec.optimizer.clip,
        **quantisation(spec),
    }


def read_back(policy: Mapping[str, Any]) -> tuple[Strategy, Batch, str, float]:
    """(strategy, batch, compute dtype, gradient clip) that a policy stands for; the inverse of `lower`."""
    home = Home(policy["offload"]["device"])
    strategy = Strategy(
        engine=Engine.FSDP,
        shard=Shard.PARAMETERS,
        **policy["mesh"],
        optimizer_home=home,
        parameter_home=home,
        pin_memory=policy["offload"]["pin_memory"],
        reshard_after_forward=policy["reshard_after_forward"],
    )
    return strategy, Batch(**policy["batch"]), policy["mixed_precision"]["param_dtype"], policy["gradient_clipping"]


def accelerate_config(spec: RunSpec) -> dict[str, Any]:
    """The same strategy as the file that `accelerate launch --config_file` reads (accelerate 1.15, FSDP version 2)."""
    strategy, compute = spec.strategy, spec.precision.compute
    config: dict[str, Any] = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "FSDP",
        "mixed_precision": "no" if compute == MASTER else compute,
        "num_machines": spec.cluster.nodes,
        "num_processes": strategy.ranks,
        "machine_rank": 0,
        "main_training_function": "main",
        "rdzv_backend": "static",
        "same_network": True,
        "use_cpu": spec.cluster.card.name == "cpu",
        "fsdp_config": {
            "fsdp_version": 2,
            "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "fsdp_reshard_after_forward": strategy.reshard_after_forward,
            "fsdp_offload_params": strategy.parameter_home is not Home.GPU,
            "fsdp_cpu_ram_efficient_loading": True,
            "fsdp_state_dict_type": "SHARDED_STATE_DICT",
            "fsdp_activation_checkpointing": spec.recompute == "full",
        },
    }
    if strategy.dp_replicate > 1:
        config["parallelism_config"] = {
            "parallelism_config_dp_replicate_size": strategy.dp_replicate,
            "parallelism_config_dp_shard_size": strategy.dp_shard,
        }
    return config
