"""ZeRO: what each stage keeps on a rank, and the DeepSpeed JSON that makes it so.

Read from deepspeed 0.19.8: runtime/zero/stage_1_and_2.py, runtime/zero/stage3.py, runtime/zero/config.py,
runtime/fp16/unfused_optimizer.py. Every knob that costs memory is written out; nothing is "auto".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator.layout import swap
from orchestrator.layout.moments import Held, moment_rows, update_buffer, whole
from orchestrator.layout.rows import STEPPED, Buffer, Row
from orchestrator.spec import ZERO_STAGES, Batch, Buckets, Engine, Home, Nvme, Optimizer, Parameter, RunSpec, Shard, Strategy
from orchestrator.units import align_up, ceil_div, dtype_bytes

NEVER = 2**31 - 1
FLAT_ALIGNMENT = 2  # nccl_start_alignment_factor, elements per rank (stage_1_and_2.py)
MASTER = "fp32"
OWN = "orchestrator"
"""The section of the JSON for what this project does itself."""


def _buckets(strategy: Strategy) -> Buckets:
    assert strategy.buckets is not None, "a DeepSpeed strategy carries its buckets"
    return strategy.buckets


def _split(table: Sequence[Parameter]) -> tuple[list[Parameter], list[Parameter], str]:
    """Trainable parameters, frozen ones, and the line that the trainable ones are shown under."""
    trainable = [p for p in table if p.trainable]
    return trainable, [p for p in table if not p.trainable], "adapters" if any(p.adapter for p in trainable) else "weights"


def rows(
    strategy: Strategy,
    table: Sequence[Parameter],
    compute: str,
    optimizer: Optimizer,
    accumulation: int,
    rank: int,
    host_computes: bool,
) -> tuple[Row, ...]:
    """Every tensor class at rest on rank `rank` of `dp_shard`. ZeRO pads its partitions, so ranks are alike but for gradients.
    `host_computes`: there is no card, so what is offloaded rests where it is used."""
    trainable, frozen, line = _split(table)
    moments = moment_rows(optimizer, _held(strategy, trainable), strategy.optimizer_home, _parts(strategy))
    if strategy.shard is Shard.PARAMETERS:
        at_rest = _stage3_rows(strategy, trainable, frozen, line, compute, host_computes, rank)
        return at_rest if strategy.optimizer_home is Home.NVME else at_rest + moments
    if strategy.shard is Shard.NONE:
        return _stage0_rows(trainable, frozen, line, compute) + moments
    at_rest = _stage12_rows(strategy, trainable, frozen, line, compute) + moments
    # With `gradients` set it adds up in the fp32 gradient of its partition instead.
    adds_whole = strategy.shard is Shard.GRADIENTS and strategy.gradients is None
    if adds_whole and strategy.optimizer_home is not Home.GPU and accumulation > 1:
        whole = _touched(trainable, strategy.dp_shard, rank)
        at_rest += (Row("gradients", compute, strategy.optimizer_home, whole, strategy.dp_shard, since=STEPPED),)
    return at_rest


def _parts(strategy: Strategy) -> int:
    return 1 if strategy.shard is Shard.NONE else strategy.dp_shard


def _held(strategy: Strategy, trainable: Sequence[Parameter]) -> tuple[Held, ...]:
    """What the optimizer of one rank sees: whole parameters under stage 0, its partition of one flat buffer under 1 and 2, and
    under 3 one flat buffer of parts for each sub-group (stage3.py, _create_fp16_sub_groups)."""
    ranks, total = strategy.dp_shard, sum(p.numel for p in trainable)
    if strategy.shard is Shard.NONE:
        return whole(trainable)
    if strategy.shard is not Shard.PARAMETERS:
        flat = align_up(total, FLAT_ALIGNMENT * ranks)
        return (Held((flat // ranks,), padding=flat - total),)
    most = _buckets(strategy).sub_group
    groups: list[list[Parameter]] = [[]]
    for parameter in trainable:
        if sum(ceil_div(p.numel, ranks) for p in groups[-1]) >= most:
            groups.append([])
        groups[-1].append(parameter)
    sizes = [(sum(ceil_div(p.numel, ranks) for p in group), sum(p.numel for p in group)) for group in groups]
    return tuple(Held((own,), padding=own * ranks - numel) for own, numel in sizes)


def _touched(trainable: list[Parameter], ranks: int, rank: int) -> int:
    """Elements of the parameters that reach into this rank's partition of the flat buffer, each counted whole.

    Stage 2 with its optimizer offloaded adds up micro-batches in one host buffer for each of them and keeps it
    (stage_1_and_2.py, async_accumulate_grad_in_cpu_via_gpu: accumulated_grads_in_cpu).
    """
    part = align_up(sum(p.numel for p in trainable), FLAT_ALIGNMENT * ranks) // ranks
    first, last, offset, whole = rank * part, (rank + 1) * part, 0, 0
    for parameter in trainable:
        if offset < last and offset + parameter.numel > first:
            whole += parameter.numel
        offset += parameter.numel
    return whole


def _stage0_rows(trainable: list[Parameter], frozen: list[Parameter], line: str, compute: str) -> tuple[Row, ...]:
    total = sum(p.numel for p in trainable)
    base = [
        Row("frozen", compute, Home.GPU, sum(p.numel for p in frozen)),
        Row(line, compute, Home.GPU, total),
    ]
    return tuple(base if compute == MASTER else [*base, Row("master", MASTER, Home.GPU, total)])


def _stage12_rows(
    strategy: Strategy, trainable: list[Parameter], frozen: list[Parameter], line: str, compute: str
) -> tuple[Row, ...]:
    """One flat buffer of all trainable parameters; this rank's fp32 partition of it is a clone, also in fp32 runs."""
    ranks, home = strategy.dp_shard, strategy.optimizer_home
    total = sum(p.numel for p in trainable)
    flat = align_up(total, FLAT_ALIGNMENT * ranks)
    part = flat // ranks
    padding = flat - total
    base = [
        Row("frozen", compute, Home.GPU, sum(p.numel for p in frozen)),
        Row(line, compute, Home.GPU, flat, padding=padding),
        Row("master", MASTER, home, part, ranks, padding),
    ]
    if home is Home.GPU:
        return tuple(base)
    largest = max(p.numel for p in trainable)
    return (
        *base,
        Row("gradients", MASTER, home, part, ranks, padding),
        Row("staging", compute, home, part + largest, ranks),  # param_buffer_of_bit16_…, temp_grad_buffer_for_cpu_offload
        Row("staging", compute, Home.GPU, largest),  # temp_grad_buffer_for_gpu_offload
    )


def _stage3_rows(
    strategy: Strategy, trainable: list[Parameter], frozen: list[Parameter], line: str, compute: str, host_computes: bool,
    rank: int,
) -> tuple[Row, ...]:  # fmt: skip
    """Each parameter is split in `dp_shard` equal parts, padded one by one; small ones also stay whole on every rank, unless
    the only part already is the whole and rests on the device that computes (partition_parameters.py, NoGatherHandle)."""
    ranks, buckets = strategy.dp_shard, _buckets(strategy)
    optimizer_home, parameter_home = strategy.optimizer_home, strategy.parameter_home
    own = sum(ceil_div(p.numel, ranks) for p in trainable)
    own_frozen = sum(ceil_div(p.numel, ranks) for p in frozen)
    padding = own * ranks - sum(p.numel for p in trainable)
    small = [p.numel for p in (*trainable, *frozen) if p.numel <= buckets.persistence]
    kept_whole = sum(ceil_div(numel, ranks) * ranks for numel in small)  # views of whole parts, _allgather_params_coalesced
    if ranks == 1 and (parameter_home is Home.GPU or host_computes):
        kept_whole = 0
    if parameter_home is Home.NVME:
        weights = (
            *swap.weight_rows(strategy, frozen, "frozen", compute),
            *swap.weight_rows(strategy, trainable, line, compute),
        )
    else:
        weights = (
            Row("frozen", compute, parameter_home, own_frozen, ranks),
            Row(line, compute, parameter_home, own, ranks, padding),
        )
    if optimizer_home is Home.NVME:
        states = swap.state_rows(strategy, trainable, rank)
    else:
        held = 0 if optimizer_home is Home.GPU else own
        states = (
            Row("master", MASTER, optimizer_home, own, ranks, padding),
            Row("gradients", MASTER, optimizer_home, held, ranks, padding),  # fp32_partitioned_groups_flat[i].grad
        )
    return (
        *weights,
        Row("persistent", compute, Home.GPU, kept_whole, padding=kept_whole and kept_whole - sum(small), since=STEPPED),
        *states,
        Row(
            "gradients", strategy.gradients or compute, optimizer_home.in_memory, own, ranks, padding
        ),  # grad_partitions_flat_buffer
        Row("bucket", compute, Home.GPU, buckets.reduce),  # IPGBucketZ3.buffer
        *swap.buffer_rows(strategy, trainable, compute),
    )


def buffers(
    strategy: Strategy, table: Sequence[Parameter], compute: str, optimizer: Optimizer, rank: int = 0
) -> tuple[Buffer, ...]:
    """What comes and goes inside a step, from the library's source; activations are the rehearsal's business."""
    trainable, _, _ = _split(table)
    own = update_buffer(optimizer, trainable, _held(strategy, trainable), strategy.optimizer_home)
    return (*_moving(strategy, table, compute, rank), *own)


def _moving(strategy: Strategy, table: Sequence[Parameter], compute: str, rank: int) -> tuple[Buffer, ...]:
    trainable, _, _ = _split(table)
    total, size, knobs = sum(p.numel for p in trainable), dtype_bytes(compute), _buckets(strategy)
    ranks = strategy.dp_shard
    backward, step = ("backward",), ("step",)
    if strategy.shard is Shard.PARAMETERS:
        live = min(sum(p.numel for p in table), knobs.max_live + knobs.prefetch)
        if not (knobs.prefetch or knobs.max_reuse):  # each weight is fetched for its own layer and let go behind it
            live = max((p.numel for p in table), default=0)
        gathered = Buffer("gathered", Home.GPU, live * size, ("forward", *backward), "stage3.py max_live_parameters, prefetch")
        if strategy.optimizer_home is not Home.NVME:
            return (gathered,)
        # A bucket's parts, as they were reduced, as they come back from the flat buffer, and in fp32 for the disk
        # (partition_grads, _offload_grad_partition_at_boundary).
        reduced = max(knobs.reduce, max((p.numel for p in trainable), default=0)) // ranks * (2 * size + 4)
        return (gathered, Buffer("bucket", Home.GPU, reduced, backward, "stage3.py partition_grads"))
    if strategy.shard is Shard.NONE:
        cast = total * 4 if size < 4 else 0
        return (
            Buffer("gradients", Home.GPU, total * size, backward, "engine.py allreduce_gradients"),
            Buffer("gradients", Home.GPU, total * size + cast, step, "fp16/unfused_optimizer.py step, fp32_groups' gradients"),
        )
    part = align_up(total, FLAT_ALIGNMENT * ranks) // ranks
    bucket = knobs.reduce * size * (2 if knobs.overlap_comm else 1)
    moving = [Buffer("bucket", Home.GPU, bucket, backward, "stage_1_and_2.py setup_buckets")]
    if strategy.optimizer_home is Home.GPU:
        each = dtype_bytes(strategy.gradients or compute)
        own = _touched(trainable, ranks, rank)  # the partition's are parts of whole gradients; the others go after the backward
        held = own if strategy.shard is Shard.GRADIENTS else total
        joined = part * (4 + (each if each < 4 else 0))  # flattened, then cast
        moving.append(Buffer("gradients", Home.GPU, held * each, backward, "stage_1_and_2.py averaged_gradients"))
        moving.append(Buffer("gradients", Home.GPU, own * each + joined, step, "stage_1_and_2.py flat_grad_partition"))
    elif strategy.shard is Shard.OPTIMIZER:
        kept = _kept_beside(trainable, ranks, knobs.reduce)
        moving.append(Buffer("gradients", Home.GPU, kept * size, backward, "stage_1_and_2.py reduce_ipg_grads"))
    return tuple(moving)


def _kept_beside(trainable: Sequence[Parameter], ranks: int, bucket: int) -> int:
    """Elements of gradients that stay on the card to the end of the backward where the rest goes to the host as it comes: those
    of other ranks' parts that are too large to be copied into the bucket; all of them where there are no other ranks."""
    if ranks == 1:
        return sum(p.numel for p in trainable)
    large = sum(p.numel for p in trainable if p.numel > bucket)
    return large - large // ranks


def lower(spec: RunSpec) -> dict[str, Any]:
    """The DeepSpeed JSON of a spec, as `deepspeed.initialize`, transformers' Trainer and accelerate take it."""
    strategy, knobs, compute = spec.strategy, _buckets(spec.strategy), spec.precision.compute
    zero: dict[str, Any] = {
        "stage": strategy.stage,
        "contiguous_gradients": True,
        "reduce_scatter": True,
        "overlap_comm": knobs.overlap_comm,
        "reduce_bucket_size": knobs.reduce,
        "allgather_partitions": True,
        "allgather_bucket_size": knobs.allgather,
        "round_robin_gradients": False,
        "sub_group_size": knobs.sub_group,
    }
    if strategy.shard is Shard.PARAMETERS:
        zero |= {
            "stage3_prefetch_bucket_size": knobs.prefetch,
            "stage3_param_persistence_threshold": knobs.persistence,
            "stage3_max_live_parameters": knobs.max_live,
            "stage3_max_reuse_distance": knobs.max_reuse,
            "stage3_gather_16bit_weights_on_model_save": True,
            # Without it every linear layer keeps its gathered weight alive from forward to backward.
            "memory_efficient_linear": True,
        }
    for key, home in (("offload_optimizer", strategy.optimizer_home), ("offload_param", strategy.parameter_home)):
        if home is not Home.GPU:
            zero[key] = {"device": str(home), "pin_memory": strategy.pin_memory}
        if home is Home.NVME:
            zero[key] |= _swapping(strategy, key)
    aio = {"aio": _requests(strategy.nvme)} if strategy.nvme is not None else {}
    # DeepSpeed passes over a section that it does not know. Its own "tensor_parallel" would divide the layers once more.
    groups = {OWN: {"tensor": strategy.tp}} if strategy.tp > 1 else {}
    return {
        **aio,
        **groups,
        "train_batch_size": spec.batch.global_size,
        "train_micro_batch_size_per_gpu": spec.batch.micro,
        "gradient_accumulation_steps": spec.batch.accumulation,
        "gradient_clipping": spec.optimizer.clip,
        "bf16": {"enabled": compute == "bf16"},
        "fp16": {
            "enabled": compute == "fp16",
            "loss_scale": 0,
            "initial_scale_power": 16,
            "loss_scale_window": 1000,
            "hysteresis": 2,
            "min_loss_scale": 1,
        },
        "data_types": {"grad_accum_dtype": strategy.gradients or compute},
        "communication_data_type": compute,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": NEVER,
        "wall_clock_breakdown": False,
    }


def _swapping(strategy: Strategy, key: str) -> dict[str, Any]:
    """What `offload_optimizer` or `offload_param` says further where it means NVMe."""
    nvme = strategy.nvme
    assert nvme is not None, "a strategy with a home on NVMe says how it swaps"
    if key == "offload_optimizer":
        return {"nvme_path": nvme.path, "buffer_count": swap.STATE_BUFFERS, "fast_init": False}
    return {"nvme_path": nvme.path, "buffer_count": nvme.buffer_count, "buffer_size": nvme.buffer_size, "max_in_cpu": 0}


def _requests(nvme: Nvme) -> dict[str, Any]:
    return {
        "block_size": nvme.block_bytes,
        "queue_depth": nvme.queue_depth,
        "intra_op_parallelism": nvme.threads,
        "single_submit": nvme.single_submit,
        "overlap_events": nvme.overlap_events,
        "use_gds": False,
    }


def _nvme_of(lowered: Mapping[str, Any]) -> Nvme | None:
    """The inverse of `_swapping` and `_requests`; without parameters on NVMe their buffers read back as none."""
    if "aio" not in lowered:
        return None
    zero, aio = lowered["zero_optimization"], lowered["aio"]
    weights = zero.get("offload_param", {})
    return Nvme(
        path=zero["offload_optimizer"]["nvme_path"],
        buffer_size=weights.get("buffer_size", 0),
        buffer_count=weights.get("buffer_count", 0),
        block_bytes=aio["block_size"],
        queue_depth=aio["queue_depth"],
        threads=aio["intra_op_parallelism"],
        single_submit=aio["single_submit"],
        overlap_events=aio["overlap_events"],
    )


def read_back(lowered: Mapping[str, Any]) -> tuple[Strategy, Batch, str, float]:
    """(strategy, batch, compute dtype, gradient clip) that a lowered JSON stands for; the inverse of `lower`.

    What a stage does not use (the stage-3 knobs under stage 2) reads back as the default.
    """
    zero, defaults = lowered["zero_optimization"], Buckets()
    homes = {key: Home(zero[key]["device"]) if key in zero else Home.GPU for key in ("offload_optimizer", "offload_param")}
    batch = Batch(
        lowered["train_batch_size"], lowered["train_micro_batch_size_per_gpu"], lowered["gradient_accumulation_steps"]
    )
    compute = next((name for name in ("bf16", "fp16") if lowered[name]["enabled"]), "fp32")
    gradients = lowered["data_types"]["grad_accum_dtype"]
    strategy = Strategy(
        engine=Engine.DEEPSPEED,
        shard=ZERO_STAGES[zero["stage"]],
        dp_shard=batch.global_size // (batch.micro * batch.accumulation),
        tp=lowered.get(OWN, {}).get("tensor", 1),
        optimizer_home=homes["offload_optimizer"],
        parameter_home=homes["offload_param"],
        pin_memory=any(zero[key]["pin_memory"] for key in homes if key in zero),
        buckets=Buckets(
            reduce=zero["reduce_bucket_size"],
            allgather=zero["allgather_bucket_size"],
            prefetch=zero.get("stage3_prefetch_bucket_size", defaults.prefetch),
            persistence=zero.get("stage3_param_persistence_threshold", defaults.persistence),
            max_live=zero.get("stage3_max_live_parameters", defaults.max_live),
            max_reuse=zero.get("stage3_max_reuse_distance", defaults.max_reuse),
            sub_group=zero["sub_group_size"],
            overlap_comm=zero["overlap_comm"],
        ),
        gradients=None if gradients == compute else gradients,
        nvme=_nvme_of(lowered),
    )
    return strategy, batch, compute, lowered["gradient_clipping"]
