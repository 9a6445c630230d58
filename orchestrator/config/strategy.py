"""From the groups zero, fsdp, tensor and offload, and a number of ranks, to one Strategy."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from orchestrator.config.schema import FsdpConf, FsdpKind, GradientDtype, OffloadConf, RootConf, TensorConf, ZeroConf
from orchestrator.errors import Fault
from orchestrator.spec import ZERO_STAGES, Buckets, Cluster, Engine, Home, ModelShape, Nvme, Shard, Strategy, parameters
from orchestrator.units import GIB, ceil_div

SWAPPED_AT_ONCE = 100_000_000
"""Elements of a rank that are updated at once where the optimizer rests on NVMe: four buffers of so many fp32 elements take
them in host memory (deepspeed/runtime/swap_tensor/utils.py, SwapBufferManager)."""

RUNS = Path("runs")

SWAP_FOLDER = ".swap"
"""Beside the folder of the run, where no other is named: jobs that died leave their files where the next one looks."""


def homes(offload: OffloadConf) -> tuple[Home, Home]:
    """(of the optimizer, of the parameters)."""
    optimizer = Home(offload.optimizer_home.value) if offload.optimizer else Home.GPU
    return optimizer, Home(offload.parameters_home.value) if offload.parameters else Home.GPU


def buckets(
    zero: ZeroConf, shape: ModelShape | None, optimizer_home: Home = Home.GPU, parameter_home: Home = Home.GPU
) -> Buckets:
    """DeepSpeed's knobs in elements, with what was left null filled in.

    Weights that come from NVMe are not fetched ahead and not kept: DeepSpeed would queue the first of them twice
    (partitioned_param_coordinator.py, __prefetch_nvme_param_partitions: "already assigned swap buffer").

    No bucket is larger than the model: on a small one the defaults would be most of its memory. Persistence follows
    transformers' rule of 10 × hidden size (transformers/integrations/deepspeed.py), so that matrices are always sharded.
    """
    default = Buckets()
    whole = sum(p.numel for p in parameters(shape)) if shape is not None and shape.known else default.reduce
    bucket = min(default.reduce, whole)
    persistence = min(default.persistence, 10 * shape.hidden_size) if shape is not None else default.persistence
    reduce = bucket if zero.reduce_bucket is None else zero.reduce_bucket
    ahead = 0 if parameter_home is Home.NVME else min(bucket, reduce)
    reuse = 0 if parameter_home is Home.NVME else default.max_reuse
    group = SWAPPED_AT_ONCE if optimizer_home is Home.NVME else default.sub_group
    return Buckets(
        reduce=reduce,
        allgather=reduce if zero.allgather_bucket is None else zero.allgather_bucket,
        prefetch=ahead if zero.prefetch_bucket is None else zero.prefetch_bucket,
        persistence=persistence if zero.persistence_threshold is None else zero.persistence_threshold,
        max_live=zero.max_live_parameters,
        max_reuse=reuse if zero.max_reuse_distance is None else zero.max_reuse_distance,
        sub_group=group if zero.sub_group_size is None else zero.sub_group_size,
        overlap_comm=zero.overlap_comm,
    )


def largest_part(shape: ModelShape | None, ranks: int) -> int:
    """Elements of a rank's part of the largest weight; 0 where the dimensions do not tell."""
    known = shape is not None and shape.known
    return ceil_div(max(p.numel for p in parameters(shape)), ranks) if shape is not None and known else 0


def nvme(offload: OffloadConf, shape: ModelShape | None, ranks: int, run_dir: str | None) -> Nvme | None:
    """How the run swaps; None where nothing rests on NVMe."""
    if Home.NVME not in homes(offload):
        return None
    weights = homes(offload)[1] is Home.NVME
    beside = Path(run_dir).expanduser().parent if run_dir is not None else RUNS
    size = offload.buffer_size or largest_part(shape, ranks)
    return Nvme(
        path=str(beside / SWAP_FOLDER if offload.path is None else Path(offload.path).expanduser()),
        buffer_size=size if weights else 0,
        buffer_count=offload.buffer_count if weights else 0,
        block_bytes=offload.aio.block_size,
        queue_depth=offload.aio.queue_depth,
        threads=offload.aio.threads,
        single_submit=offload.aio.single_submit,
        overlap_events=offload.aio.overlap_events,
    )


def see_disk(cluster: Cluster, nvme: Nvme | None) -> Cluster:
    """`cluster` with what is free now on the disk that `nvme` names, where the cluster is this machine and states nothing."""
    if nvme is None or cluster.name != "local" or cluster.nvme_bytes:
        return cluster
    folder = Path(nvme.path).absolute()
    there = next(path for path in (folder, *folder.parents) if path.is_dir())
    # Whole GiB: a plan is kept for the spec that it was made for.
    return replace(cluster, nvme_bytes=shutil.disk_usage(there).free // GIB * GIB)


def default_shard_size(ranks: int, cards_per_node: int) -> int:
    """Ranks of one shard group of hybrid_shard: those of a node; on a single node the largest proper part, half if even."""
    if ranks > cards_per_node > 0:
        return cards_per_node
    return next((ranks // part for part in range(2, ranks + 1) if ranks % part == 0), 1)


def shard_size(fsdp: FsdpConf, ranks: int, cluster: Cluster, tensor: int = 1) -> int:
    """Ranks of one shard group: all of the `ranks // tensor` data-parallel ones unless `fsdp` is hybrid, one without FSDP2."""
    if fsdp.kind is FsdpKind.none:
        return 1
    if fsdp.kind is not FsdpKind.hybrid_shard:
        return ranks // tensor
    if fsdp.shard_size is not None:
        return fsdp.shard_size
    return default_shard_size(ranks // tensor, cluster.cards_per_node // tensor)


def pinned(offload: OffloadConf, cluster: Cluster) -> bool:
    """Whether offloaded bytes are page-locked: never without an accelerator to copy them to."""
    if not (offload.optimizer or offload.parameters) or cluster.card.name == "cpu":
        return False
    return True if offload.pin_memory is None else offload.pin_memory


def build_strategy(conf: RootConf, ranks: int, cluster: Cluster, shape: ModelShape | None) -> Strategy:
    """The strategy of a config that the checks have passed, spread over `ranks`."""
    optimizer_home, parameter_home = homes(conf.offload)
    pin = pinned(conf.offload, cluster)
    if conf.zero.stage is not None:
        return Strategy(
            engine=Engine.DEEPSPEED,
            shard=ZERO_STAGES[conf.zero.stage],
            dp_shard=ranks // conf.tensor.size,
            tp=conf.tensor.size,
            optimizer_home=optimizer_home,
            parameter_home=parameter_home,
            pin_memory=pin,
            buckets=buckets(conf.zero, shape, optimizer_home, parameter_home),
            nvme=nvme(conf.offload, shape, ranks, conf.run.dir),
            gradients=None if conf.zero.gradients is GradientDtype.compute else conf.zero.gradients.value,
        )
    if conf.fsdp.kind is not FsdpKind.none or conf.tensor.size > 1:
        group = shard_size(conf.fsdp, ranks, cluster, conf.tensor.size)
        return Strategy(
            engine=Engine.FSDP,
            shard=Shard.PARAMETERS,
            dp_replicate=ranks // conf.tensor.size // group,
            dp_shard=group,
            tp=conf.tensor.size,
            optimizer_home=optimizer_home,
            parameter_home=parameter_home,
            pin_memory=pin,
            reshard_after_forward=conf.fsdp.kind is not FsdpKind.shard_grad_op,
        )
    return Strategy(engine=Engine.PLAIN, shard=Shard.NONE, dp_shard=ranks)


def require_strategy(zero: ZeroConf, fsdp: FsdpConf, tensor: TensorConf, ranks: int) -> list[Fault]:
    """A fault where several ranks run and nothing says how to spread the run over them."""
    if ranks == 1 or zero.stage is not None or fsdp.kind is not FsdpKind.none or tensor.size > 1:
        return []
    problem = f"{ranks} ranks run, but zero=none and fsdp=none: the plain engine is one process"
    return [Fault("zero, fsdp", problem, "add zero=stage2 or fsdp=full_shard, or start one process")]
