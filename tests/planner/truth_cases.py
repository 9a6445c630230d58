"""Small runs whose memory is traced twice: by real gloo ranks, and by a rehearsal."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import strategies as sharded

from orchestrator import spec as s

SHAPE = s.ModelShape(
    model_type="llama", vocab_size=257, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, head_dim=12, max_position_embeddings=64, tie_word_embeddings=False,
)  # fmt: skip
"""257 and 48 do not divide evenly by 4 ranks, so every padding rule has its share of the memory."""

HALVES = replace(SHAPE, vocab_size=258)
QUARTERS = replace(SHAPE, vocab_size=260, num_attention_heads=8, num_key_value_heads=4, head_dim=6)
"""What tensor parallelism divides in two and in four."""


CHUNK = 16
"""Tokens that go through the head at once: four chunks in a micro-batch."""

LORA = s.Tuning("lora", rank=4, alpha=8, targets=("q_proj", "v_proj", "down_proj"))
TUNINGS = {
    "full": s.Tuning("full"),
    "lora": LORA,
    "nf4": replace(LORA, kind="qlora", quant="nf4"),
    "nf4x2": replace(LORA, kind="qlora", quant="nf4", double_quant=True),
    "int8": replace(LORA, kind="qlora", quant="int8"),
    "dora": replace(LORA, dora=True),
    "head": s.Tuning("head"),
    "untied": s.Tuning("head", untie=True),
    "packed_head": s.Tuning("head", quant="nf4"),
    "modules": replace(LORA, modules=("embed_tokens", "lm_head", "norm")),
}


@dataclass(frozen=True)
class Case:
    ranks: int
    strategy: str
    tuning: str
    compute: str
    recompute: str
    accumulation: int
    loss: str = "chunked"
    optimizer: str = "adamw"
    gradients: str | None = None
    attention: str = "sdpa"

    @property
    def name(self) -> str:
        words = [self.strategy, self.tuning, self.compute, self.recompute, self.loss, f"x{self.accumulation}"]
        words += [word for word in (self.optimizer, self.attention) if word not in ("adamw", "sdpa")]
        return "-".join([*words, *([f"{self.gradients}_gradients"] if self.gradients else [])])


def strategies(ranks: int) -> dict[str, s.Strategy]:
    """Every strategy on `ranks` ranks; on one, the plain engine."""
    return sharded.strategies(ranks) if ranks > 1 else {"plain": s.Strategy(s.Engine.PLAIN, s.Shard.NONE)}


OTHERS = [
    Case(2, "zero1", "full", "bf16", "none", 1, "plain"),
    Case(2, "full_shard", "lora", "fp32", "none", 2, "plain"),
    Case(1, "plain", "lora", "bf16", "selective", 1),
    Case(2, "zero3", "full", "bf16", "selective", 1),
    Case(2, "zero2", "lora", "fp32", "every_n", 1),
    Case(2, "full_shard", "full", "bf16", "selective", 1),
    Case(2, "full_shard", "full", "bf16", "every_n", 2),
    Case(2, "full_shard_cpu", "lora", "bf16", "offload", 1),
    Case(1, "plain", "int8", "bf16", "full", 1),
    *(Case(2, name, "int8", "bf16", "none", 2) for name in ("zero2", "zero3", "full_shard")),
    *(Case(2, name, "dora", "bf16", "full", 1) for name in ("zero1", "zero3", "full_shard")),
    *(Case(2, name, tuning, "bf16", "none", 1) for name in ("zero1", "zero3", "full_shard") for tuning in ("head", "modules")),
    *(Case(2, name, "packed_head", "bf16", "none", 1) for name in ("zero1_optimizer", "zero3", "full_shard")),
    *(Case(2, name, "full", "bf16", "none", 2, gradients="fp32") for name in ("zero2", "zero2_optimizer", "zero3")),
    *(Case(2, name, "full", "fp16", "none", 1) for name in ("zero1", "zero3", "full_shard")),
    *(Case(1, "plain", tuning, "fp16", "none", 1, optimizer="adafactor") for tuning in ("full", "head")),
    *(Case(1, "plain", tuning, "bf16", "every_n", 1) for tuning in ("modules", "packed_head", "dora")),
    *(Case(2, name, "lora", "bf16", "offload", 1) for name in ("zero2", "zero3_cpu")),
    *(Case(1, "plain", tuning, "bf16", "offload", 1) for tuning in ("full", "lora")),
    *(Case(2, name, "lora", "bf16", "selective", 1) for name in ("zero3", "full_shard")),
    *(Case(ranks, name, "untied", "bf16", "none", 1) for ranks, name in ((1, "plain"), (2, "zero3"), (2, "full_shard"))),
    *(Case(2, "zero1_tensor2", tuning, "bf16", "full", 1) for tuning in ("head", "modules")),
    *(Case(4, "zero2_tensor2", tuning, "fp16", "every_n", 2) for tuning in ("full", "lora")),
    Case(2, "zero1", "lora", "bf16", "none", 1, attention="eager"),
    Case(2, "tensor2", "full", "fp32", "every_n", 2),
    *(Case(2, "tensor2", tuning, "bf16", recompute, 1) for tuning in ("head", "modules") for recompute in ("none", "full")),
    *(
        Case(4, name, tuning, "bf16", "every_n", 2)
        for name in ("tensor4", "full_shard_tensor2")
        for tuning in ("lora", "modules")
    ),
    *(Case(4, name, tuning, "bf16", "full", 1) for name in ("zero3", "hybrid_shard") for tuning in ("int8", "dora")),
    *(Case(2, "tensor2", "full", "bf16", "none", 1, optimizer=optimizer) for optimizer in ("lion", "adamw_bf16")),
]


def all_cases(ranks: int) -> list[Case]:
    """Every strategy with half of the product of the other choices on one and two ranks, with two of them on four; and what
    is not crossed with everything."""
    product = [
        ("full", "bf16", "none", 1),
        ("full", "fp32", "full", 2),
        ("lora", "bf16", "full", 1),
        ("lora", "fp32", "none", 2),
    ]
    product += [("nf4x2", "bf16", "full", 1), ("nf4", "fp32", "none", 2)]
    if ranks == 4:
        product = [("full", "bf16", "none", 2), ("lora", "bf16", "full", 1), ("nf4x2", "bf16", "none", 1)]
    runs = itertools.product(strategies(ranks).items(), product)
    # config/divisions.py refuses a packed base that is divided among cards.
    cases = [Case(ranks, name, *rest) for (name, way), rest in runs if way.tp == 1 or rest[0] in ("full", "lora")]
    shardwise = ["plain"] if ranks == 1 else ["zero1", "zero2_optimizer", "zero3", "full_shard", "full_shard_cpu"]
    matrices = ["plain"] if ranks == 1 else ["full_shard", "full_shard_cpu", "hybrid_shard"]
    small = [(o, name) for o in ("adamw_bf16", "adamw_8bit", "lion") for name in shardwise]
    small += [(o, name) for o in ("adafactor", "muon") for name in matrices]
    cases += [Case(ranks, name, "full", "bf16", "none", 1, optimizer=optimizer) for optimizer, name in small]
    return cases + [case for case in OTHERS if case.ranks == ranks]


SAMPLE = [
    Case(1, "plain", "full", "bf16", "none", 1),
    Case(2, "zero1", "full", "bf16", "none", 1, "plain"),
    Case(2, "zero2", "lora", "bf16", "full", 1),
    Case(2, "zero3", "full", "fp32", "full", 2),
    Case(2, "zero3_cpu", "full", "bf16", "none", 1),
    Case(2, "full_shard", "full", "bf16", "selective", 1),
    Case(2, "shard_grad_op", "lora", "fp32", "none", 2),
    Case(2, "zero3", "nf4x2", "bf16", "full", 1),
    Case(2, "full_shard", "nf4x2", "bf16", "full", 1),
    Case(1, "plain", "full", "bf16", "none", 1, optimizer="adamw_8bit"),
    Case(2, "zero1", "full", "bf16", "none", 1, optimizer="adamw_bf16"),
    Case(2, "full_shard", "full", "bf16", "none", 1, optimizer="muon"),
    Case(2, "tensor2", "full", "bf16", "none", 1),
    Case(2, "tensor2", "lora", "bf16", "full", 1),
    Case(4, "full_shard_tensor2", "full", "bf16", "none", 2),
    Case(4, "full_shard_tensor2", "lora", "bf16", "full", 1),
]
"""What continuous integration checks; each is also in `all_cases`."""


def run_spec(case: Case, shape: s.ModelShape | None = None) -> s.RunSpec:
    """The spec of a case: two samples a rank and micro-batch, 32 tokens each; without a `shape` one that can be divided."""
    strategy = replace(strategies(case.ranks)[case.strategy], gradients=case.gradients)
    shape = shape or {1: SHAPE, 2: HALVES, 4: QUARTERS}[strategy.tp]
    micro = 2
    card = s.Card("cpu", 2**34, 0.1, 10.0, 5.0, bf16=True)
    return s.RunSpec(
        run=s.Run(None, 2, 1), seed=7, model=s.Model("small", None, False, shape),
        tuning=TUNINGS[case.tuning], strategy=strategy,
        batch=s.Batch(micro * strategy.dp * case.accumulation, micro, case.accumulation), data=s.Data(None, 32),
        optimizer=s.Optimizer(case.optimizer, lr=1e-3), schedule=s.Schedule("constant", 0), recompute=case.recompute,
        precision=s.Precision(case.compute), cluster=s.Cluster("local", 1, case.ranks, card),
        checkpoint=s.Checkpoint(0, 1), resume="none", eval=s.Evaluation(0), export=s.Export("hf", False),
        logging=s.Logging(1, "none"), plan=s.Planning("ignore"), loss=s.Loss(case.loss, CHUNK),
        attention=case.attention,
    )  # fmt: skip
