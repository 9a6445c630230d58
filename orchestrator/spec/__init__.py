"""Frozen values that say what a run is. Standard library only."""

from orchestrator.spec.cluster import Card, Cluster
from orchestrator.spec.codec import digest, from_json, to_json
from orchestrator.spec.division import Division, divided, divided_table, division, sizes_that_divide, widths
from orchestrator.spec.job import Job, Kubernetes, Slurm
from orchestrator.spec.model import (
    EMBEDDING,
    HEAD,
    KNOWN_FAMILIES,
    LINEARS,
    MAGNITUDE,
    PLAIN_HEADS,
    ROOT,
    ModelShape,
    Parameter,
    block_of,
    expand_targets,
    norms_of,
    only,
    owner,
    parameters,
    with_lora,
)
from orchestrator.spec.quant import INT8, NF4, NF4_DOUBLE, quantised, scale_elements, stored, stored_shape
from orchestrator.spec.run import (
    Batch,
    Checkpoint,
    Data,
    Evaluation,
    Export,
    Health,
    Logging,
    Loss,
    Model,
    Optimizer,
    Planning,
    Precision,
    Run,
    RunSpec,
    Schedule,
    Source,
    Tuning,
)
from orchestrator.spec.strategy import ZERO_STAGES, Buckets, Engine, Home, Nvme, Shard, Strategy

__all__ = [
    "EMBEDDING", "HEAD", "INT8", "KNOWN_FAMILIES", "LINEARS", "MAGNITUDE", "NF4", "NF4_DOUBLE", "PLAIN_HEADS", "ROOT",
    "ZERO_STAGES",
    "Batch", "Buckets", "Card", "Checkpoint", "Cluster", "Data", "Division", "Engine", "Evaluation", "Export", "Health", "Home",
    "Job", "Kubernetes", "Logging", "Loss", "Model", "ModelShape", "Nvme", "Optimizer", "Parameter", "Planning", "Precision",
    "Run", "RunSpec", "Schedule", "Shard", "Slurm", "Source", "Strategy", "Tuning", "block_of", "digest", "divided",
    "divided_table", "division", "expand_targets", "from_json", "norms_of", "only", "owner", "parameters", "quantised",
    "scale_elements", "sizes_that_divide", "stored", "stored_shape", "to_json", "widths", "with_lora",
]  # fmt: skip
