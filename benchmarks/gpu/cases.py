"""What is measured on one card: the cross of models, strategies, tunings, lengths and recompute that tells most apart.

No Hydra here: the image that this runs on may lack it. Dimensions come from conf/model, the rest is written out.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import yaml

from orchestrator import spec as s
from orchestrator.units import GIB

CONF = Path(__file__).resolve().parents[2] / "conf"
BUCKETS = s.Buckets()
LORA = s.Tuning("lora", rank=16, alpha=32, targets=s.expand_targets(("all-linear",)))
INT8 = replace(LORA, kind="qlora", quant="int8")
NF4 = replace(LORA, kind="qlora", quant="nf4", double_quant=True)
FULL = s.Tuning("full")
A10_BYTES = int(22.5 * GIB)


def shape(model: str) -> s.ModelShape:
    """The dimensions of conf/model/<model>.yaml."""
    fields = yaml.safe_load((CONF / "model" / f"{model}.yaml").read_text())
    return s.ModelShape(**{name: value for name, value in fields.items() if name in s.ModelShape.__slots__})


def strategies(ranks: int) -> dict[str, s.Strategy]:
    """By the words of their labels."""
    zero = {
        f"zero{stage}": s.Strategy(s.Engine.DEEPSPEED, shard, dp_shard=ranks, buckets=BUCKETS, pin_memory=True)
        for stage, shard in s.ZERO_STAGES.items()
        if stage
    }
    fsdp = s.Strategy(s.Engine.FSDP, s.Shard.PARAMETERS, dp_shard=ranks, pin_memory=True)
    cpu = s.Home.CPU
    return {
        "plain": s.Strategy(s.Engine.PLAIN, s.Shard.NONE),
        **zero,
        "zero2_optimizer": replace(zero["zero2"], optimizer_home=cpu),
        "zero3_cpu": replace(zero["zero3"], optimizer_home=cpu, parameter_home=cpu),
        "full_shard": fsdp,
        "shard_grad_op": replace(fsdp, reshard_after_forward=False),
        "full_shard_cpu": replace(fsdp, optimizer_home=cpu, parameter_home=cpu),
        "tensor": replace(fsdp, dp_shard=1, tp=ranks),
        "full_shard_tensor2": replace(fsdp, dp_shard=ranks // 2, tp=2),
        "zero1_tensor2": replace(zero["zero1"], dp_shard=ranks // 2, tp=2),
    }


def case(
    model: str,
    strategy: str,
    tuning: s.Tuning,
    seq_len: int,
    recompute: str,
    *,
    ranks: int = 4,
    micro: int = 1,
    capped: bool = False,
) -> tuple[str, s.RunSpec]:
    """(name, spec). `capped`: the card is held to the memory of an A10."""
    ranks = 1 if strategy == "plain" else ranks
    chosen = strategies(ranks)[strategy]
    words = tuning.kind if tuning.quant == "none" else f"{tuning.kind}_{tuning.quant}"
    card = s.Card("capped" if capped else "whole", A10_BYTES if capped else 2**50, 0.0, 0.0, 0.0, bf16=True)
    name = f"{model}-{strategy}-{words}-{seq_len}x{micro}-{recompute}-{ranks}ranks{'-a10' if capped else ''}"
    spec = s.RunSpec(
        run=s.Run(None, 2, 1), seed=0, model=s.Model(model, None, False, shape(model)), tuning=tuning,
        strategy=chosen, batch=s.Batch(micro * chosen.dp, micro, 1), data=s.Data(None, seq_len),
        optimizer=s.Optimizer("adamw", lr=1e-5), schedule=s.Schedule("constant", 0), recompute=recompute,
        precision=s.Precision("bf16"), cluster=s.Cluster("one card", 1, ranks, card), checkpoint=s.Checkpoint(0, 1),
        resume="none", eval=s.Evaluation(0), export=s.Export("none", False), logging=s.Logging(1, "none"),
        plan=s.Planning("ignore"), loss=s.Loss("chunked"),
    )  # fmt: skip
    return name, spec


def all_cases() -> dict[str, s.RunSpec]:
    """Fifty-two runs, the ones that say most first, in case the time runs out."""
    found = []
    for strategy in (
        "zero1",
        "zero2",
        "zero3",
        "full_shard",
        "shard_grad_op",
        "zero2_optimizer",
        "zero3_cpu",
        "full_shard_cpu",
    ):
        found.append(case("llama32_1b", strategy, FULL, 2048, "none"))
        found.append(case("llama32_1b", strategy, LORA, 2048, "full"))
    for strategy in ("zero2", "zero3", "full_shard"):
        found += [case("llama3_8b", strategy, LORA, length, "full") for length in (512, 4096)]
        found.append(case("llama3_8b", strategy, LORA, 2048, "none"))
    found += [case("llama3_8b", strategy, FULL, 2048, "full") for strategy in ("zero3", "full_shard", "zero3_cpu")]
    for strategy in ("plain", "zero1", "zero3", "full_shard"):
        found += [case("qwen25_0_5b", strategy, FULL, length, "none", micro=2) for length in (1024, 8192)]
    found += [case("qwen_7b", strategy, LORA, 2048, "full", capped=True) for strategy in ("zero2", "zero3", "full_shard")]
    found += [case("llama3_8b", "plain", LORA, 1024, recompute, capped=True) for recompute in ("full", "none")]
    found += [
        case("llama32_1b", "zero3", FULL, 4096, "full", ranks=8),
        case("llama32_1b", "full_shard", FULL, 4096, "full", ranks=8),
    ]
    found += [
        case("llama32_1b", "plain", NF4, 2048, "none"),
        case("llama32_1b", "zero3", NF4, 2048, "full"),
        case("llama32_1b", "full_shard", INT8, 2048, "full"),
        case("llama32_1b", "tensor", FULL, 2048, "none", ranks=2),
        case("llama32_1b", "zero1_tensor2", LORA, 2048, "full"),
        case("llama32_1b", "full_shard_tensor2", FULL, 2048, "none"),
        case("llama3_8b", "plain", NF4, 2048, "full", capped=True),
        case("llama3_8b", "tensor", LORA, 4096, "full"),
        case("llama3_8b", "zero3", LORA, 8192, "full"),
    ]
    return dict(found)


def smoke_cases() -> dict[str, s.RunSpec]:
    """The same kinds of run in miniature, for a machine without a card."""
    small = replace(shape("tiny"), vocab_size=512, num_hidden_layers=2)
    kept = {}
    for name, spec in all_cases().items():
        if spec.cluster.card.name == "whole" and spec.model.name in ("llama32_1b", "qwen25_0_5b") and spec.data.seq_len <= 2048:
            card = replace(spec.cluster.card, name="cpu")
            strategy = replace(spec.strategy, pin_memory=False)
            if strategy.buckets is not None:
                strategy = replace(strategy, buckets=replace(BUCKETS, reduce=100_000, allgather=100_000, persistence=500))
            kept[f"smoke-{name}"] = replace(
                spec, model=replace(spec.model, shape=small), data=replace(spec.data, seq_len=64), strategy=strategy,
                cluster=replace(spec.cluster, card=card),
            )  # fmt: skip
    return kept
