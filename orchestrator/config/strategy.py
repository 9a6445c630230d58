"""From the groups zero, fsdp, tensor and offload, and a number of ranks, to one Strategy."""

from __future__ import annotations

from orchestrator.config.schema import FsdpConf, FsdpKind, GradientDtype, OffloadConf, RootConf, TensorConf, ZeroConf
from orchestrator.errors import Fault
from orchestrator.spec import ZERO_STAGES, Buckets, Cluster, Engine, Home, ModelShape, Shard, Strategy, parameters


def buckets(zero: ZeroConf, shape: ModelShape | None) -> Buckets:
    """DeepSpeed's knobs in elements, with what was left null filled in.

    No bucket is larger than the model: on a small one the defaults would be most of its memory. Persistence follows
    transformers' rule of 10 × hidden size (transformers/integrations/deepspeed.py), so that matrices are always sharded.
    """
    default = Buckets()
    whole = sum(p.numel for p in parameters(shape)) if shape is not None and shape.known else default.reduce
    bucket = min(default.reduce, whole)
    persistence = min(default.persistence, 10 * shape.hidden_size) if shape is not None else default.persistence
    reduce = bucket if zero.reduce_bucket is None else zero.reduce_bucket
    return Buckets(
        reduce=reduce,
        allgather=reduce if zero.allgather_bucket is None else zero.allgather_bucket,
        prefetch=min(bucket, reduce) if zero.prefetch_bucket is None else zero.prefetch_bucket,
        persistence=persistence if zero.persistence_threshold is None else zero.persistence_threshold,
        max_live=zero.max_live_parameters,
        max_reuse=zero.max_reuse_distance,
        sub_group=zero.sub_group_size,
        overlap_comm=zero.overlap_comm,
    )


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
    optimizer_home = Home.CPU if conf.offload.optimizer else Home.GPU
    parameter_home = Home.CPU if conf.offload.parameters else Home.GPU
    pin = pinned(conf.offload, cluster)
    if conf.zero.stage is not None:
        return Strategy(
            engine=Engine.DEEPSPEED,
            shard=ZERO_STAGES[conf.zero.stage],
            dp_shard=ranks,
            optimizer_home=optimizer_home,
            parameter_home=parameter_home,
            pin_memory=pin,
            buckets=buckets(conf.zero, shape),
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
