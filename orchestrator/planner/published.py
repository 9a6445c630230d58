"""Published measurements as runs of this project: which rows can be expressed, with which meter, and what is predicted.

Nothing here is fitted: a row either says the same as a run of this project, or it is left out with the reason.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from orchestrator.layout import LOADED, lay_out
from orchestrator.planner.activations import FP32, activations
from orchestrator.planner.device import WORKSPACE_BYTES
from orchestrator.planner.losses import LossCode
from orchestrator.planner.plan import LAYOUT, REHEARSAL, Plan
from orchestrator.planner.planning import AUTO
from orchestrator.planner.predict import by_layout, predict, shape_for, table_for
from orchestrator.spec import (
    LINEARS,
    Batch,
    Buckets,
    Card,
    Cluster,
    Engine,
    Home,
    Loss,
    Model,
    ModelShape,
    RunSpec,
    Shard,
    Strategy,
    Tuning,
)
from orchestrator.units import GIB, MIB, dtype_bytes

QUALITIES = ("A", "B")

ALLOCATED, RESERVED, AFTER_FORWARD, FITS = "allocated", "reserved", "after forward", "fits"


def _llama(hidden: int, inner: int, layers: int, heads: int, kv: int, vocabulary: int, kind: str = "llama") -> ModelShape:
    return ModelShape(kind, vocabulary, hidden, inner, layers, heads, kv, hidden // heads, 1 << 20, tie_word_embeddings=False)


MODELS: tuple[tuple[str, ModelShape], ...] = (
    (r"llama-?2-7b", _llama(4096, 11008, 32, 32, 32, 32000)),
    (r"llama-?2-13b", _llama(5120, 13824, 40, 40, 40, 32000)),
    (r"llama-?2-70b", _llama(8192, 28672, 80, 64, 8, 32000)),
    (r"llama-?3(\.1)?-8b", _llama(4096, 14336, 32, 32, 8, 128256)),
    (r"llama-?3(\.[13])?-70b", _llama(8192, 28672, 80, 64, 8, 128256)),
    (r"llama-?3\.2-1b", replace(_llama(2048, 8192, 16, 32, 8, 128256), tie_word_embeddings=True)),
    (r"yi-6b", _llama(4096, 11008, 32, 32, 4, 64000)),
    (r"yi-34b", _llama(7168, 20480, 60, 56, 8, 64000)),
    (r"zephyr-7b|mistral-7b", _llama(4096, 14336, 32, 32, 8, 32000, "mistral")),
    (r"^qwen-1_8b", _llama(2048, 5504, 24, 16, 16, 151936, "qwen2")),
    (r"^qwen-7b", _llama(4096, 11008, 32, 32, 32, 151936, "qwen2")),
    (r"^qwen-14b", _llama(5120, 13696, 40, 40, 40, 152064, "qwen2")),
    (r"^qwen-72b", _llama(8192, 24576, 80, 64, 64, 152064, "qwen2")),
    (r"qwen2(\.5)?-7b", _llama(3584, 18944, 28, 28, 4, 152064, "qwen2")),
    (r"h2048 l24 heads16 kv16 ffn4096 vocab32000", _llama(2048, 4096, 24, 16, 16, 32000)),
    (r"gemma-7b", ModelShape("gemma", 256000, 3072, 24576, 28, 16, 16, 256, 1 << 20, tie_word_embeddings=True)),
)
"""Dimensions from each model's config.json, by a pattern of its name. The first Qwen has Qwen2's shape: its c_attn is q, k
and v in one matrix, its MLP's stated width is that of both halves."""

CARDS: tuple[tuple[str, Card], ...] = (
    (r"A100.*40|40 ?GB", Card("A100-40", 40448 * MIB, 312.0, 1555.0, 300.0, bf16=True)),
    (r"A100|80 ?GB", Card("A100-80", 81100 * MIB, 312.0, 2039.0, 300.0, bf16=True)),
    (r"H100", Card("H100", 81559 * MIB, 989.0, 3350.0, 450.0, bf16=True)),
    (r"4090", Card("RTX4090", 24166 * MIB, 165.0, 1008.0, 32.0, bf16=True)),
    (r"\b12 ?GB", Card("12GB", 12288 * MIB, 71.0, 360.0, 32.0, bf16=True)),
    (r"\b16 ?GB", Card("16GB", 16384 * MIB, 71.0, 448.0, 32.0, bf16=True)),
    (r"\b48 ?GB", Card("48GB", 49140 * MIB, 150.0, 768.0, 32.0, bf16=True)),
    (r"3090|A5000|RTX6000|24 ?GB", Card("RTX3090", 24576 * MIB, 71.0, 936.0, 32.0, bf16=True)),
)
"""The card by a pattern of the row's; it decides the limit, the workspace and nothing else."""

TARGETS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r"all", LINEARS),
    (r"c_attn|\(q,k,v\)", ("q_proj", "k_proj", "v_proj")),
    (r"query,value|q_proj,v_proj", ("q_proj", "v_proj")),
    (r"k,q,v,up,down,gate", ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj")),
    (r"q,k,v,o,gate,up,down", LINEARS),
)


TRANSFORMERS = LossCode(forward=3, backward=3, half=False)
"""The loss of transformers before 4.45, which these rows were measured with (modeling_llama.py, LlamaForCausalLM.forward):
a shifted copy beside the fp32 logits, which take the place of the half-precision ones. A loop that keeps the model's output
through the backward holds one more; rows do not say whether theirs does."""


@dataclass(frozen=True, slots=True)
class Expressed:
    """A row as a run: its spec, its meter, the bytes measured (the card's for "fits"), and whether it fit."""

    spec: RunSpec
    meter: str
    measured: int
    fitted: bool = True


@dataclass(frozen=True, slots=True)
class Score:
    """One row's prediction. `error` is predicted ÷ measured − 1; for the meter "fits" `right` is all there is."""

    id: str
    meter: str
    predicted: int
    measured: int
    basis: str
    right: bool | None = None

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1

    @property
    def source(self) -> str:
        """Where the row comes from: its id without the number."""
        return self.id.rpartition("-")[0]


def _first(table: tuple[tuple[str, object], ...], text: str) -> object | None:
    return next((value for pattern, value in table if re.search(pattern, text, re.IGNORECASE)), None)


def _meter(unit: str, measured: str) -> tuple[str, int, bool] | str:
    """(meter, bytes measured or 0, whether it fit) of a row's unit, or why it has none."""
    if unit.startswith("OOM"):
        return FITS, 0, False
    if unit.startswith("CAPACITY"):
        return FITS, 0, True
    size = float(measured) * (GIB if "GiB" in unit else 1e9)
    if "AFTER forward" in unit:
        return AFTER_FORWARD, round(size), True
    if "reserved" in unit.lower():
        return RESERVED, round(size), True
    if "allocated" in unit:
        return ALLOCATED, round(size), True
    return "the unit does not say which meter was read"


def _strategy(row: Mapping[str, str]) -> Strategy | str:
    engine, offload, ranks = row["engine"], row["offload"], int(row["n_gpus"])
    if engine.startswith(("fsdp1 full_shard", "fsdp2 full_shard")):
        if offload not in ("none", "cpu params+grads (FSDP CPUOffload)"):
            return f"offload of {offload} is not what FSDP2 does"
        home = Home.GPU if offload == "none" else Home.CPU
        return Strategy(
            Engine.FSDP, Shard.PARAMETERS, dp_shard=ranks, optimizer_home=home, parameter_home=home,
            pin_memory=home is not Home.GPU,
        )  # fmt: skip
    if offload != "none":
        return f"offload of {offload} without a sharding engine"
    if engine.startswith("ddp"):
        return Strategy(Engine.DEEPSPEED, Shard.NONE, dp_shard=ranks, buckets=Buckets())
    if engine == "none" and ranks == 1:
        return Strategy(Engine.PLAIN, Shard.NONE)
    return f"engine {engine} with its own bucket sizes is not stated closely enough" if "zero" in engine else f"engine {engine}"


def _refusal(row: Mapping[str, str]) -> str | None:
    """Why the row is not a run of this project; None where it can be one."""
    method, precision = row["method"], row["precision"]
    if method not in ("lora", "qlora", "full"):
        return f"method {method.split(' ')[0]}: the project has full, LoRA and QLoRA"
    if method == "qlora" and not re.search("nf4", precision, re.IGNORECASE):
        return f"precision {precision}: the project's QLoRA is bitsandbytes' NF4"
    if method != "qlora" and re.search(
        "8|int|gptq|nf4", precision.replace("fp32 params, bf16 compute; bf16", ""), re.IGNORECASE
    ):
        return f"precision {precision}"
    if "mixed" in precision and "FSDP" not in precision:
        return "fp32 weights under autocast: the project holds a working copy instead"
    bare = row["engine"] == "none" and "no step" not in row["optimizer"]
    if method == "full" and bare:
        return "weights and Adam in bf16: the project keeps an fp32 master"
    if row["fused_ce"] not in ("no", "n/a (no loss; logits.mean())"):
        return f"loss {row['fused_ce']}: the project's is neither chunked nor fused"
    if row["attention"].startswith("eager"):
        return "eager attention: the project uses the fused kernels"
    if row["act_ckpt"].split(" ")[0] not in ("yes", "no"):
        return f"recompute {row['act_ckpt']}"
    if not (row["seq_len"].isdecimal() and row["micro_batch"].isdecimal()):
        return "length or micro-batch not stated as a number"
    return None


def _tuning(row: Mapping[str, str]) -> Tuning | str:
    if row["method"] == "full":
        return Tuning("full")
    targets = _first(TARGETS, row["lora_targets"])
    rank = re.match(r"\d+", row["lora_rank"])
    if not isinstance(targets, tuple) or rank is None:
        return f"LoRA rank {row['lora_rank'] or 'unknown'} on {row['lora_targets'] or 'unknown layers'}"
    if row["method"] == "lora":
        return Tuning("lora", rank=int(rank[0]), targets=targets)
    double = "no double quant" not in row["precision"]  # bitsandbytes.nn.Linear4bit quantises its scales unless told not to
    return Tuning("qlora", rank=int(rank[0]), targets=targets, quant="nf4", double_quant=double)


def express(row: Mapping[str, str], base: RunSpec) -> Expressed | str:
    """The row as a run, on top of `base` for what no byte depends on; or why it is none.

    `row` has the columns of published_memory.csv.
    """
    reason = _refusal(row)
    if reason is not None:
        return reason
    shape = _first(MODELS, row["model"])
    if not isinstance(shape, ModelShape):
        return f"model {row['model']}: not one of the known families"
    meter, strategy, tuning = _meter(row["unit"], row["measured_gb"]), _strategy(row), _tuning(row)
    for problem in (meter, strategy, tuning):
        if isinstance(problem, str):
            return problem
    assert not isinstance(meter, str) and isinstance(strategy, Strategy) and isinstance(tuning, Tuning)
    card = _first(CARDS, f"{row['gpu']} {row['unit']}") or CARDS[1][1]
    assert isinstance(card, Card)
    micro = int(row["micro_batch"])
    spec = replace(
        base,
        model=Model(row["model"], None, False, shape),
        tuning=tuning,
        strategy=strategy,
        batch=Batch(micro * strategy.dp, micro, 1),
        data=replace(base.data, seq_len=int(row["seq_len"])),
        recompute="full" if row["act_ckpt"].startswith("yes") else "none",
        precision=replace(base.precision, compute="bf16"),
        loss=Loss("plain"),
        cluster=Cluster("published", 1, strategy.ranks, card),
    )
    kind, measured, fitted = meter
    return Expressed(spec, kind, measured or card.memory_bytes, fitted)


AS_LOADED = ("frozen", "scales", "weights", "adapters")
"""Lines of a model that no optimizer knows yet."""


def _after_forward(spec: RunSpec, plan: Plan) -> int:
    """Bytes allocated when the forward has returned its logits in fp32: weights, what autograd keeps, and those."""
    held = activations(spec, shape_for(spec))
    weights = sum(row.bytes for row in lay_out(spec, table_for(spec)).at(LOADED) if row.line in AS_LOADED)
    logits = spec.batch.micro * spec.data.seq_len * shape_for(spec).vocab_size * FP32
    return weights + held.saved + _inputs_kept(spec) + logits + WORKSPACE_BYTES["earlier"]


def _inputs_kept(spec: RunSpec) -> int:
    """What bitsandbytes before 0.43.2 kept of a quantised base beyond autograd: every linear layer's input, as an attribute
    that recompute does not free (release notes of 0.43.2; autograd/_functions.py of 0.43.1, MatMul4Bit `ctx.tensors = (A, B)`).
    q, k and v share theirs, so do gate and up; without recompute the inputs of q and of o are among the activations."""
    if not spec.tuning.form:
        return 0
    shape, c = shape_for(spec), dtype_bytes(spec.precision.compute)
    tokens = spec.batch.micro * spec.data.seq_len * shape.num_hidden_layers
    width = shape.hidden_size + shape.intermediate_size
    if spec.recompute != "none":
        width += shape.hidden_size + shape.num_attention_heads * shape.head_dim
    return tokens * c * width


def score(row: Mapping[str, str], base: RunSpec, basis: str = LAYOUT) -> Score | str:
    """The prediction for one row beside its measurement, or why the project cannot make one. Under basis "auto" the rows whose
    meter is what torch reserved are rehearsed: only a trace knows more of that than what is alive.

    Raises:
        RehearsalError: the row was to be rehearsed, and that failed.
    """
    run = express(row, base)
    if isinstance(run, str):
        return run
    rehearsed = basis == REHEARSAL or (basis == AUTO and run.meter == RESERVED)
    plan = predict(run.spec, REHEARSAL) if rehearsed else by_layout(run.spec, loss=TRANSFORMERS)
    name = row["id"]
    if run.meter == FITS:
        return Score(name, FITS, plan.memory.used, run.measured, plan.basis, plan.fits == run.fitted)
    if run.meter == AFTER_FORWARD:
        return Score(name, run.meter, _after_forward(run.spec, plan), run.measured, LAYOUT)
    return Score(name, run.meter, getattr(plan.memory, run.meter), run.measured, plan.basis)
