"""The cases of the contract suite: one strategy, one tuning, one precision, one accumulation each; and their batches."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import torch
from strategies import strategies

from orchestrator import spec as s
from orchestrator.data.batch import IGNORED, MicroBatch

SHAPE = s.ModelShape(
    model_type="llama", vocab_size=257, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=12, max_position_embeddings=64, tie_word_embeddings=False,
)  # fmt: skip
"""Odd sizes on purpose: 257 and 48 do not divide evenly by 4 ranks, so every padding rule is exercised."""

HALVES = replace(SHAPE, vocab_size=258)
QUARTERS = replace(SHAPE, vocab_size=260, num_attention_heads=8, num_key_value_heads=4, head_dim=6)
SHAPES: dict[str, s.ModelShape] = {
    "halves": HALVES,
    "quarters": QUARTERS,
    "biased": replace(HALVES, attention_bias=True),
    "qwen2": replace(HALVES, model_type="qwen2"),
    "qwen3": replace(HALVES, model_type="qwen3"),
    "gemma": replace(HALVES, model_type="gemma"),
}
"""What tensor parallelism divides in two and in four: the parts of 258 rows are odd again; and the families."""

WIDE = ("zero1", "zero2_optimizer", "zero3", "full_shard", "full_shard_cpu")
"""The strategies that differ in what they do with a tensor that is trained or frozen."""

BESIDE = "zero2_optimizer_tensor2"
"""Left to four ranks, where its optimizer is divided as well."""

DORA = ("zero0", *WIDE)
"""DoRA looks at a frozen weight from outside the layer that holds it: sharding must have it whole there."""

PLAIN = s.Strategy(s.Engine.PLAIN, s.Shard.NONE)
"""One process, nothing divided: the reference, and the strategy of the cases called "plain"."""

GLOBAL_SIZE, STEPS, SEED = 8, 4, 7
CHUNK = 11
"""Labelled tokens that go through the head at once: a micro-batch is several chunks, and in the short step none or one. The
reference makes whole logits."""

SHORT_STEP = 2
"""In this step only three samples are real: whole micro-batches of some ranks learn nothing."""


TUNINGS = {
    "full": s.Tuning("full"),
    "lora": s.Tuning("lora", rank=4, alpha=8, targets=("q_proj", "v_proj", "down_proj")),
    "nf4": s.Tuning("qlora", rank=4, alpha=8, targets=("q_proj", "v_proj", "down_proj"), quant="nf4"),
    "nf4x2": s.Tuning("qlora", rank=4, alpha=8, targets=s.LINEARS, quant="nf4", double_quant=True),
    "int8": s.Tuning("qlora", rank=4, alpha=8, targets=("q_proj", "v_proj", "down_proj"), quant="int8"),
    "dora": s.Tuning("lora", rank=4, alpha=8, targets=s.LINEARS, dora=True),
    "head": s.Tuning("head"),
    "packed_head": s.Tuning("head", quant="nf4"),
    "modules": s.Tuning(
        "lora", rank=4, alpha=8, targets=("q_proj",), rslora=True,
        modules=("embed_tokens", "lm_head", "norm", "input_layernorm"),
    ),
    "untied": s.Tuning("head", untie=True),
}  # fmt: skip
QUANTISED = ("nf4", "nf4x2", "int8")


@dataclass(frozen=True)
class Case:
    strategy: str
    tuning: str
    compute: str
    accumulation: int
    tied: bool = False
    optimizer: str = "adamw"
    family: str = ""
    loss: str = ""
    gradients: str | None = None
    recompute: str = "none"
    attention: str = "sdpa"
    compile: str = "none"

    @property
    def name(self) -> str:
        other = [word for word in (self.optimizer, self.recompute, self.attention) if word not in ("adamw", "none", "sdpa")]
        words = [self.strategy, self.tuning, *other]
        words += [f"{self.gradients}_gradients" if self.gradients else "", self.compute, f"x{self.accumulation}"]
        words += [
            "compiled" if self.compile != "none" else "",
            "tied" if self.tied else "",
            self.family,
            f"{self.loss}_loss" if self.loss else "",
        ]
        return "-".join(word for word in words if word)

    def shape(self, strategy: s.Strategy) -> s.ModelShape:
        """The model of the case: that of its `family`, else one that `strategy` can divide."""
        shape = SHAPES[self.family] if self.family else {1: SHAPE, 2: HALVES, 4: QUARTERS}[strategy.tp]
        return replace(shape, tie_word_embeddings=self.tied)


FAMILIES = (("qwen2", "full"), ("qwen2", "lora"), ("qwen3", "full"), ("qwen3", "lora"), ("gemma", "full"), ("biased", "lora"))
"""Biases, a tied head, norms inside attention, scaled embeddings: what tensor parallelism must treat each in its own way."""

SHARDWISE = ("lion", "adamw_bf16", "adamw_8bit")
"""Optimizers that work on whatever part of the weights a rank holds; the others need whole matrices."""

MATRICES = ("adafactor", "muon")


def works(optimizer: str, strategy: str) -> bool:
    """Whether `optimizer` works under the strategy of that name."""
    if optimizer in MATRICES:
        whole = not strategy.startswith("zero") and "tensor" not in strategy
        return whole or (optimizer, strategy) == ("adafactor", "zero0")
    return optimizer != "adamw_8bit" or "tensor" not in strategy


def optimizer_cases(ranks: int) -> list[Case]:
    """A sample of every optimizer but AdamW: flat, sharded and offloaded tensors, full and LoRA."""
    if ranks == 4:
        return [Case("hybrid_shard", "full", "fp32", 1, optimizer=o) for o in MATRICES]
    flat = [("lion", "zero2_optimizer"), ("adamw_bf16", "zero3"), ("adamw_8bit", "zero1"), ("adamw_8bit", "zero3_cpu")]
    cases = [Case(name, "full", "fp32", 1, optimizer=o) for o, name in flat]
    cases += [Case("full_shard", "full", "fp32", 1, optimizer=o) for o in ("adamw_8bit", *MATRICES)]
    cases += [Case("tensor2", "full", "fp32", 1, optimizer=o) for o in ("lion", "adamw_bf16")]
    cases += [Case("full_shard", "lora", "bf16", 4, optimizer=o) for o in ("adamw_8bit", "adafactor")]
    return cases + [Case(name, "full", "bf16", 4, gradients="fp32") for name in ("zero2", "zero3", "zero2_optimizer")]


def every_optimizer_case(ranks: int) -> list[Case]:
    """Each optimizer but AdamW under each strategy that it works with, full and LoRA."""
    names = [name for name in strategies(ranks) if ranks < 4 or name in ("zero1", "zero3", "full_shard", "hybrid_shard")]
    pairs = [(o, name) for o, name in itertools.product((*SHARDWISE, *MATRICES), names) if works(o, name)]
    product = itertools.product(pairs, (("full", "fp32", 1), ("lora", "bf16", 4 if ranks < 4 else 2)))
    return [Case(name, *rest, optimizer=o) for (o, name), rest in product]


def all_cases(ranks: int) -> list[Case]:
    """On two ranks every strategy in fp32 without accumulation and in bf16 with it, and fp16 where it may differ; on four, fp32
    without accumulation, and tied embeddings; on one, whatever starts. `rest_of_the_product` has what is left out."""
    names = strategies(ranks)
    if ranks == 1:
        alone = [Case(name, *rest, 1) for name, rest in itertools.product(names, (("full", "fp32"), ("lora", "bf16")))]
        return (
            alone
            + [Case(name, "nf4x2", "fp32", 1) for name in ("zero2", "zero3", "full_shard")]
            + [Case("full_shard", "int8", "bf16", 1)]
            + ALONE
        )
    if ranks == 2:
        half = itertools.product(("zero1", "zero2_optimizer", "zero3", "full_shard"), ("full", "lora"))
        corners = (("fp32", 1), ("bf16", 4))
        crossed = [name for name in names if name != BESIDE]
        whole = [Case(name, tuning, *corner) for name, tuning, corner in itertools.product(crossed, ("full", "lora"), corners)]
        packed = [Case(name, "nf4x2", "fp32", 1) for name, strategy in names.items() if strategy.tp == 1]
        packed += [
            Case(name, *rest)
            for name in ("zero2", "zero3", "full_shard")
            for rest in (("nf4", "fp32", 1), ("nf4x2", "bf16", 4), ("int8", "fp32", 1))
        ]
        packed += [Case(name, tuning, "fp32", 1) for name in WIDE for tuning in ("head", "modules")]
        packed += [Case(name, "packed_head", "fp32", 1) for name in ("zero1_optimizer", "full_shard")]
        packed += [Case("tensor2", tuning, "fp32", 1) for tuning in ("head", "modules")]
        packed += [Case(name, "dora", "fp32", 1) for name in DORA] + [Case("full_shard", "dora", "bf16", 4, recompute="full")]
        packed.append(Case("full_shard", "untied", "fp32", 1))
        families = [
            Case("tensor2", tuning, "fp32", 1, family=name, tied=name in ("qwen2", "gemma")) for name, tuning in FAMILIES
        ]
        families.append(Case("tensor2", "full", "fp32", 1, loss="plain"))
        families += [
            Case("zero1_tensor2", *rest, "fp32", 1, family=name) for name, *rest in FAMILIES if name in ("qwen3", "biased")
        ]
        halves = [Case(name, tuning, "fp16", 1) for name, tuning in half] + [Case("zero1_tensor2", "full", "fp16", 1)]
        return whole + families + packed + halves + optimizer_cases(ranks) + RECOMPUTED
    plain = [Case(name, "full", "fp32", 1) for name in names]
    plain += [Case(name, "lora", "fp32", 1) for name in ("zero2", "zero3_cpu", "hybrid_shard", "full_shard_tensor2", BESIDE)]
    tied = ("zero1", "zero3", "zero3_cpu", "full_shard", "hybrid_shard", "full_shard_tensor2", "tensor4")
    return [
        *plain,
        *(Case(name, "full", "fp32", 1, tied=True) for name in tied),
        *(Case("full_shard_tensor2", tuning, "bf16", 2) for tuning in ("full", "lora")),
        Case("hybrid_shard", "full", "fp32", 1, family="halves"),
        *(Case(name, tuning, "fp32", 1) for name in ("zero3", "full_shard") for tuning in ("int8", "dora")),
        Case("full_shard_tensor2", "modules", "fp32", 1),
        *optimizer_cases(ranks),
    ]


RECOMPUTED = [
    Case("zero1", "full", "fp32", 1, recompute="selective", attention="eager"),
    Case("zero2", "lora", "fp32", 1, recompute="every_n"),
    Case("zero2", "full", "fp32", 4, recompute="selective"),
    Case("zero3", "full", "fp32", 4, recompute="full"),
    Case("zero3", "lora", "fp32", 1, recompute="selective"),
    Case("zero3", "full", "fp32", 1, recompute="every_n"),
    Case("zero3_cpu", "full", "fp32", 1, recompute="offload"),
    Case("full_shard", "lora", "fp32", 1, recompute="full"),
    Case("full_shard", "full", "fp32", 4, recompute="selective"),
    Case("full_shard", "full", "fp32", 1, recompute="every_n", attention="eager"),
    Case("full_shard_cpu", "lora", "fp32", 1, recompute="offload"),
    Case("shard_grad_op", "full", "bf16", 1, recompute="selective"),
    Case("hybrid_shard", "full", "fp32", 1, tied=True, recompute="full"),
    Case("tensor2", "full", "fp32", 1, recompute="full"),
]
"""Recompute must not change anything, whatever the engine does around a block: each kind under each engine once. The
references keep all activations and use sdpa."""

ALONE = [
    Case("plain", "full", "fp32", 1, recompute="offload"),
    Case("plain", "lora", "fp32", 1, recompute="offload"),
    Case("plain", "lora", "bf16", 4, recompute="offload"),
    Case("plain", "lora", "fp32", 1, recompute="selective"),
    Case("plain", "full", "fp32", 4, recompute="every_n"),
]
"""The same of the plain engine, which is its own reference without them."""


def rest_of_the_product(ranks: int) -> list[Case]:
    """What `all_cases` leaves out of strategies × {full, lora} × {fp32, bf16} × {one forward, four}; on four ranks its LoRA."""
    compute = (("fp32", 1), ("fp32", 4), ("bf16", 1), ("bf16", 4)) if ranks == 2 else (("fp32", 1),)
    product = itertools.product(strategies(ranks), ("full", "lora"), compute)
    return [case for case in (Case(name, tuning, *rest) for name, tuning, rest in product) if case not in all_cases(ranks)]


def compiled_cases(ranks: int) -> list[Case]:
    """Compiled blocks under each engine that takes them; the references are not compiled. Compiling takes a minute each."""
    return [
        Case("zero2", "full", "fp32", 1, compile="block"),
        Case("full_shard", "lora", "fp32", 1, compile="block", recompute="full"),
    ]


def divided_families(ranks: int) -> list[Case]:
    """Llama, Qwen2 and Qwen3, their heads tied and not, full and LoRA, under each strategy that divides matrices in two."""
    names = [name for name, strategy in strategies(ranks).items() if strategy.tp == 2]
    product = itertools.product(names, ("full", "lora"), (True, False), ("halves", "qwen2", "qwen3"))
    return [Case(name, tuning, "fp32", 1, tied=tied, family=family) for name, tuning, tied, family in product]


SWEEPS = {
    "every optimizer": every_optimizer_case,
    "rest": rest_of_the_product,
    "families": divided_families,
    "compiled": compiled_cases,
}
"""Cases that are too dear for every change, by the name of their sweep."""


def run_spec(case: Case, ranks: int, given: s.Strategy | None = None, *, reference: bool = False) -> s.RunSpec:
    """The spec of a case, under the strategy `given` if there is one; or that of its reference: plain, the whole global batch
    in one forward, every activation and the whole logits kept."""
    own = given or (PLAIN if case.strategy == "plain" else strategies(ranks)[case.strategy])
    own = replace(own, gradients=case.gradients)
    shape = case.shape(own)
    strategy = PLAIN if reference else own
    micro = GLOBAL_SIZE // (strategy.dp * case.accumulation)
    batch = s.Batch(GLOBAL_SIZE, micro, case.accumulation)
    if reference:
        batch = s.Batch(GLOBAL_SIZE, GLOBAL_SIZE, 1)
    tuning = TUNINGS[case.tuning]
    if case.family and tuning.kind == "lora":
        tuning = replace(tuning, targets=("k_proj", "o_proj", "up_proj"))
    card = s.Card("cpu", 2**34, 0.1, 10.0, 5.0, bf16=True)
    return s.RunSpec(
        run=s.Run(None, STEPS, 1), seed=SEED,
        model=s.Model("small", None, False, shape),
        tuning=tuning, strategy=strategy, batch=batch,
        data=s.Data(None, 32), optimizer=s.Optimizer(case.optimizer, lr=2e-3, weight_decay=0.01, clip=0.5),
        schedule=s.Schedule("constant", 0), recompute="none" if reference else case.recompute,
        precision=s.Precision(case.compute),
        cluster=s.Cluster("local", 1, ranks, card), checkpoint=s.Checkpoint(0, 1), resume="none", eval=s.Evaluation(0),
        export=s.Export("none", False), logging=s.Logging(1, "none"), plan=s.Planning("ignore"),
        loss=s.Loss("plain") if reference else s.Loss(case.loss or "chunked", CHUNK),
        attention="sdpa" if reference else case.attention, compile="none" if reference else case.compile,
    )  # fmt: skip


def samples(step: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(ids, labels) of the global batch of a step: lengths 5 to 32, a random part of each sample is learned."""
    generator = torch.Generator().manual_seed(100 + step)
    result = []
    for _ in range(3 if step == SHORT_STEP else GLOBAL_SIZE):
        length = int(torch.randint(5, 33, (1,), generator=generator))
        ids = torch.randint(0, SHAPE.vocab_size, (length,), generator=generator)
        labels = torch.where(torch.rand(length, generator=generator) < 0.6, ids, IGNORED)
        labels[-1] = ids[-1]
        result.append((ids, labels))
    return result


def labelled(step: int) -> int:
    """Learned tokens of the global batch (the first position of a sample cannot be predicted)."""
    return sum(int((labels[1:] != IGNORED).sum()) for _, labels in samples(step))


def micro_batch(rows: list[tuple[torch.Tensor, torch.Tensor]], size: int) -> MicroBatch:
    """`rows` filled up on the right and to `size` rows that learn nothing."""
    longest = max([len(ids) for ids, _ in rows], default=4)
    ids, labels = torch.zeros(size, longest, dtype=torch.int64), torch.full((size, longest), IGNORED)
    for index, (row, label) in enumerate(rows):
        ids[index, : len(row)], labels[index, : len(row)] = row, label
    return MicroBatch(ids, labels)


def deal(step: int, batch: s.Batch, rank: int, ranks: int) -> list[MicroBatch]:
    """The micro-batches of one rank: consecutive samples, dealt to ranks, then to accumulation steps."""
    rows = samples(step)
    chunks = [rows[i : i + batch.micro] for i in range(0, batch.global_size, batch.micro)]
    return [micro_batch(chunks[index * ranks + rank], batch.micro) for index in range(batch.accumulation)]
