"""What makes a run the same run: what a resume must share with the run that saved, and what it may change and is told of."""

from __future__ import annotations

from typing import Any

from orchestrator.spec import RunSpec, to_json

MOMENTS_OF = {"adamw_bf16": "adamw", "adamw_8bit": "adamw", "paged_adamw_8bit": "adamw"}
"""Optimizers whose states are those of another, kept in fewer bits: a checkpoint of one resumes under the other."""


def identity(spec: RunSpec) -> dict[str, Any]:
    """What a resumed run must share with the run that saved: the model, what of it is trained, and the seed, which decides
    random weights, the order of samples and what is held out. Strategies may differ, and the bits of AdamW's states."""
    same: dict[str, Any] = {"model": spec.model.name, "tuning": spec.tuning.kind, "seed": spec.seed}
    same["optimizer"] = MOMENTS_OF.get(spec.optimizer.name, spec.optimizer.name)
    if spec.model.shape is not None:
        same |= {f"model.{name}": value for name, value in to_json(spec.model.shape).items()}
    if spec.tuning.adapters:
        same |= {"tuning.rank": spec.tuning.rank, "tuning.targets": list(spec.tuning.targets)}
        same |= {"tuning.modules": list(spec.tuning.modules), "tuning.rslora": spec.tuning.rslora}
        same |= {"tuning.dora": True} if spec.tuning.dora else {}
    if spec.tuning.form:
        same |= {"tuning.quant": spec.tuning.quant, "tuning.double_quant": spec.tuning.double_quant}
    return same


def course(spec: RunSpec, prepared: Any) -> dict[str, Any]:
    """What decides, with the seed, which samples make up a step."""
    packed = {"data.packing": spec.data.packing} if spec.data.packing != "none" else {}
    weighted = {"data.sources": [source.weight for source in spec.data.sources]} if spec.data.sources else {}
    return {
        "data": prepared.digest,
        "data.eval_fraction": spec.data.eval_fraction,
        **packed,
        **weighted,
        "batch.global_size": spec.batch.global_size,
    }
