"""What a forward and a backward compute and keep: the loss head, recompute and attention."""

from __future__ import annotations

import importlib.util
import shutil

from orchestrator.config.checks import quant_of
from orchestrator.config.schema import (
    AttentionConf,
    AttentionKind,
    CompileKind,
    LossConf,
    LossKind,
    RecomputeConf,
    RecomputeKind,
    RootConf,
)
from orchestrator.errors import Fault
from orchestrator.spec import PLAIN_HEADS, Cluster, Loss, Model

LIGER = "liger_kernel"
FLASH = "flash_attn"


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


def recompute_faults(conf: RecomputeConf, tensor: int) -> list[Fault]:
    """Recompute that would change the result: tensor parallelism adds the parts of a product up in place, and the kept product
    would be added up once more in the backward (seen: gradient norm off by 28 %)."""
    if conf.kind is not RecomputeKind.selective or tensor == 1:
        return []
    problem = f"recompute=selective keeps matrix products, and tensor={tensor} adds their parts up in place"
    return [Fault("recompute", problem, "use recompute=full or recompute=every_n")]


def compile_faults(conf: RootConf, cluster: Cluster) -> list[Fault]:
    """Compiled blocks where something must happen between their operations, or where nothing can compile them."""
    if conf.compile.kind is CompileKind.none:
        return []
    faults = []
    inside = (
        (conf.zero.stage == 3, "zero=stage3", "fetches each layer's weights by hooks inside the block", "zero=stage2"),
        (conf.tensor.size > 1, f"tensor={conf.tensor.size}", "sums over the ranks inside the block", "tensor=none"),
        (bool(quant_of(conf.tuning)), "a packed base", "unpacks weights by operations that are not compiled", "tuning=lora"),
        (conf.tuning.dora, "tuning.dora=true", "has not been tried compiled", "tuning.dora=false"),
        (
            conf.recompute.kind in (RecomputeKind.selective, RecomputeKind.offload),
            f"recompute={conf.recompute.kind.name}",
            "looks at the operations of a block, which are gone when it is compiled",
            "recompute=full",
        ),
    )
    for found, what, reason, remedy in inside:
        if found:
            problem = f"compile=block with {what}, which {reason}"
            faults.append(Fault("compile", problem, f"use {remedy}, or compile=none"))
    if cluster.card.name == "cpu" and shutil.which("g++") is None:
        problem = "compile=block on the CPU needs a C++ compiler, and there is no g++"
        faults.append(Fault("compile", problem, "apt-get install g++, or compile=none"))
    return faults


def attention_faults(conf: AttentionConf, cluster: Cluster, compute: str, packing: str) -> list[Fault]:
    """An attention kernel that the machine, its packages, the number format or the data cannot use."""
    if conf.kind is not AttentionKind.flash:
        return []
    remedy = "use attention=sdpa, which takes torch's own flash kernel where the card has one"
    card = cluster.card
    if card.name == "cpu":
        return [Fault("attention", "attention=flash runs on NVIDIA cards, and this machine has none", remedy)]
    faults = []
    if not card.bf16:
        faults.append(Fault("attention", f"attention=flash needs an Ampere card or newer, and this is a {card.name}", remedy))
    if compute == "fp32":
        faults.append(Fault("attention", "attention=flash computes in half precision, and this run in fp32", remedy))
    if packing != "none":
        problem = "attention=flash with packed rows is not tested here: documents could see each other"
        faults.append(Fault("attention", problem, "use attention=sdpa, or data.packing=none"))
    if cluster.name == "local" and importlib.util.find_spec(FLASH) is None:
        faults.append(Fault("attention", "attention=flash, but the package flash-attn is not installed", remedy))
    return faults
