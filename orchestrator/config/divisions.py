"""Which tensor-parallel sizes a model, an engine and a cluster can do, and why there is no pipeline."""

from __future__ import annotations

from orchestrator.config.checks import quant_of
from orchestrator.config.schema import (
    LossConf,
    LossKind,
    OptimizerConf,
    PipelineConf,
    TensorConf,
    TuningConf,
    TuningKind,
    ZeroConf,
)
from orchestrator.errors import Fault
from orchestrator.spec import Cluster, ModelShape, sizes_that_divide, widths

FIELD = "tensor"


BESIDE = {
    0: ("stage 0 divides nothing beside it", "use tensor={size} alone, which holds the same, or zero=stage1 tensor={size}"),
    3: (
        "stage 3 divides whole parameters among all ranks as they are made, before their matrices could be divided",
        "use zero=stage1 tensor={size}, or fsdp=full_shard tensor={size}",
    ),
}
"""By ZeRO stage why it cannot stand beside tensor parallelism, and what to do."""


def _sizes(sizes: tuple[int, ...]) -> str:
    """What to type instead."""
    words = [f"tensor={size}" if size in (2, 4) else f"tensor.size={size}" for size in sizes]
    return ", ".join([*words, "tensor=none"])


def tensor_faults(tensor: TensorConf, zero: ZeroConf, ranks: int, cluster: Cluster) -> list[Fault]:
    """A group size that ranks or machines do not divide into, or an engine that does not divide matrices here."""
    size, faults = tensor.size, []
    if size == 1:
        return []
    if zero.stage in BESIDE:
        problem, remedy = BESIDE[zero.stage]
        faults.append(Fault(FIELD, f"tensor={size} with zero=stage{zero.stage}: {problem}", remedy.format(size=size)))
    if ranks % size:
        sizes = tuple(n for n in range(2, ranks + 1) if ranks % n == 0)
        many = "1 rank" if ranks == 1 else f"{ranks} ranks"
        remedy = f"use {_sizes(sizes)}, or start a multiple of {size} processes"
        faults.append(Fault(FIELD, f"{many} cannot form groups of {size}", remedy))
    elif ranks > cluster.cards_per_node > 0 and cluster.cards_per_node % size:
        problem = (
            f"groups of {size} ranks would reach across machines of {cluster.cards_per_node} cards, and every block sums its "
            "activations over the group four times"
        )
        sizes = tuple(n for n in range(2, cluster.cards_per_node + 1) if cluster.cards_per_node % n == 0)
        faults.append(Fault(FIELD, problem, f"use {_sizes(sizes)}; fsdp=full_shard spans machines better"))
    return faults


OPTIMIZERS = ("adamw", "adamw_bf16", "lion")
"""Those that treat each element by itself; the others make sums over matrices or blocks that would be cut otherwise."""


def company_faults(tensor: TensorConf, tuning: TuningConf, loss: LossConf, optimizer: OptimizerConf) -> list[Fault]:
    """What works on whole matrices alone."""
    faults = []
    if tensor.size > 1 and quant_of(tuning):
        what = "tuning=qlora" if tuning.kind is TuningKind.qlora else "tuning.quant"
        problem = f"tensor={tensor.size} with {what}: packed weights have no rows and columns to divide"
        faults.append(Fault(FIELD, problem, "use tuning=lora, or fsdp=full_shard tensor=none"))
    if tensor.size > 1 and loss.kind is LossKind.liger:
        problem = f"tensor={tensor.size} with loss.kind=liger: its kernel knows no divided vocabulary"
        faults.append(Fault(FIELD, problem, "use loss.kind=chunked"))
    if tensor.size > 1 and optimizer.name.value not in OPTIMIZERS:
        problem = f"tensor={tensor.size} with optimizer={optimizer.name.value}, which works on whole matrices or blocks of them"
        faults.append(Fault(FIELD, problem, f"use optimizer={', '.join(OPTIMIZERS)}, or tensor=none"))
    return faults


def width_faults(tensor: TensorConf, shape: ModelShape | None) -> list[Fault]:
    """Widths of the model that the group size does not divide, all of them, with the sizes that would do."""
    size = tensor.size
    if size == 1:
        return []
    if shape is None or not shape.known:
        family = "this model" if shape is None else f"the family {shape.model_type!r}"
        return [Fault(FIELD, f"how to divide the layers of {family} is not known here", "use fsdp=full_shard tensor=none")]
    wrong = [f"{name} {width}" for name, width in widths(shape).items() if width % size]
    if not wrong:
        return []
    return [Fault(FIELD, f"{size} does not divide {', '.join(wrong)}", f"use {_sizes(sizes_that_divide(shape))}")]


def pipeline_faults(pipeline: PipelineConf) -> list[Fault]:
    """Any pipeline."""
    if pipeline.stages == 1:
        return []
    problem = (
        f"pipeline={pipeline.stages} is not supported: torch's pipeline schedules take all micro-batches of a step in one call "
        "and hold a part of the blocks on each rank, where loop, Layout and checkpoints here know one model and one micro-batch"
    )
    return [Fault("pipeline", problem, "use fsdp=full_shard, or tensor=2, which also spread the weights; pipeline=none")]
