"""What a forward and a backward compute and keep: the loss head."""

from __future__ import annotations

import importlib.util

from orchestrator.config.schema import LossConf, LossKind
from orchestrator.errors import Fault
from orchestrator.spec import PLAIN_HEADS, Cluster, Loss, Model

LIGER = "liger_kernel"


def gives_products(model: Model) -> bool:
    """Whether the logits of `model` are one product with its head, so that the loss can be made inside the head."""
    return model.shape is not None and model.shape.model_type in PLAIN_HEADS


def build_loss(conf: LossConf, model: Model) -> Loss:
    """The loss of a config without faults; "auto" is chunked wherever the model allows it."""
    kind = conf.kind
    if kind is LossKind.auto:
        kind = LossKind.chunked if gives_products(model) else LossKind.plain
    return Loss(str(kind.value), conf.chunk)


def loss_faults(conf: LossConf, cluster: Cluster, model: Model) -> list[Fault]:
    """A loss that the model, the machine or its packages cannot make."""
    if conf.kind in (LossKind.auto, LossKind.plain):
        return []
    faults = []
    if not gives_products(model):
        family = model.shape.model_type if model.shape is not None else "this model"
        problem = f"loss.kind={conf.kind.name} leaves the logits out, and what {family} does to its logits is not known here"
        faults.append(Fault("loss.kind", problem, f"use loss.kind=plain; the families known: {', '.join(PLAIN_HEADS)}"))
    if conf.kind is LossKind.liger and cluster.card.name == "cpu":
        problem = "Liger's kernel runs on NVIDIA cards, and this machine has none"
        faults.append(Fault("loss.kind", problem, "use loss.kind=chunked"))
    elif conf.kind is LossKind.liger and cluster.name == "local" and importlib.util.find_spec(LIGER) is None:
        remedy = "use loss.kind=chunked, or: pip install liger-kernel"
        faults.append(Fault("loss.kind", "loss.kind=liger, but the package liger-kernel is not installed", remedy))
    return faults
