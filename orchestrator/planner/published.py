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
from orchestrator.planner.published_tables import CARDS, DEFAULT_CARD, MODELS, TARGETS
from orchestrator.spec import (
    ZERO_STAGES,
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

ALLOCATED, RESERVED, AFTER_FORWARD, DEVICE, FITS = "allocated", "reserved", "after forward", "device", "fits"


TRANSFORMERS = LossCode(forward=3, backward=3, half=False)
"""The loss of transformers before 4.45, which these rows were measured with (modeling_llama.py, LlamaForCausalLM.forward):
a shifted copy beside the fp32 logits, which take the place of the half-precision ones. A loop that keeps the model's output
through the backward holds one more; rows do not say whether theirs does."""

LITGPT = LossCode(forward=1, backward=1, half=False)
"""The loss of lit-gpt (litgpt/utils.py, chunked_cross_entropy, on the list that GPT.forward makes under lm_head_chunk_size):
all logits in half precision and as much again of log_softmax's results, 4 bytes together; chunks only bound what the backward
adds."""


@dataclass(frozen=True, slots=True)
class Expressed:
    """A row as a run: its spec, its meter, the bytes measured (the card's for "fits"), whether it fit, and
    the code of its loss where that is not the project's."""

    spec: RunSpec
    meter: str
    measured: int
    fitted: bool = True
    loss: LossCode | None = None


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


COLUMNS = (
    "id", "model", "gpu", "n_gpus", "method", "lora_rank", "lora_targets", "precision", "optimizer", "engine", "offload",
    "act_ckpt", "attention", "fused_ce", "seq_len", "micro_batch", "measured_gb", "unit",
)  # fmt: skip
"""What is read of a row; any other column is passed over, and one that is missing is an empty cell."""

UNITS = {"gib": GIB, "gb": 10**9, "mib": MIB, "mb": 10**6}

METERS: tuple[tuple[str, str], ...] = (
    (r"after forward", AFTER_FORWARD),
    (r"reserved", RESERVED),
    (r"allocated", ALLOCATED),
    (r"nvidia-?smi|nvml|pynvml|device total|driver", DEVICE),
)
"""The meter by a pattern of the row's unit."""

RECOMPUTE = {
    "yes": "full",
    "true": "full",
    "full": "full",
    "no": "none",
    "false": "none",
    "none": "none",
    "selective": "selective",
}
"""`recompute` by the first word of the row's act_ckpt."""

WHOLE_LOGITS = ("", "no", "none", "false", "n/a (no loss; logits.mean())")


class _Untold(Exception):
    """A row that no run of this project says, with the reason."""


def _cells(row: Mapping[str, object]) -> dict[str, str]:
    """The columns that are read, as text without space around it."""
    return {name: str(row.get(name) or "").strip() for name in COLUMNS}


def _first(table: tuple[tuple[str, object], ...], text: str) -> object | None:
    return next((value for pattern, value in table if re.search(pattern, text, re.IGNORECASE)), None)


def _number(text: str, what: str) -> float:
    """The one number of `text`, thousands apart by commas.

    Raises:
        _Untold: there is none, or more than one.
    """
    found = re.fullmatch(r"[~≈<>=]*\s*(\d[\d,_]*(?:\.\d+)?)\s*(?:[kKMG]?i?B)?", text)
    if found is None:
        raise _Untold(f"{what} not stated as a number")
    return float(re.sub("[,_]", "", found[1]))


def _count(text: str, what: str) -> int:
    number = _number(text, what)
    if number < 1 or number != int(number):
        raise _Untold(f"{what} is {text}")
    return int(number)


def _meter(cells: Mapping[str, str]) -> tuple[str, int, bool]:
    """(meter, bytes measured or 0, whether it fit) of a row."""
    unit = cells["unit"]
    if re.match(r"(cuda )?(OOM|out of memory)", unit, re.IGNORECASE):
        return FITS, 0, False
    if unit.upper().startswith(("CAPACITY", "FITS")):
        return FITS, 0, True
    meter = _first(METERS, unit)
    # A unit in which "GB" was printed for GiB says so with both words.
    scale = next((size for word, size in UNITS.items() if re.search(rf"\b{word}\b", unit, re.IGNORECASE)), None)
    if not isinstance(meter, str) or scale is None:
        raise _Untold("the unit does not say which meter was read")
    size = _number(cells["measured_gb"], "what was measured is")
    if not size:
        raise _Untold("nothing was measured")
    return meter, round(size * scale), True


def _buckets(engine: str, stage: int, shape: ModelShape) -> Buckets:
    """What the row's engine has: DeepSpeed's defaults (runtime/zero/config.py), or what transformers puts for "auto"
    (transformers/integrations/deepspeed.py, trainer_config_finalize)."""
    if "auto" in engine:
        square = shape.hidden_size**2
        return Buckets(reduce=square, prefetch=int(0.9 * square), persistence=10 * shape.hidden_size, overlap_comm=stage == 3)
    return Buckets(reduce=500_000_000, allgather=500_000_000, overlap_comm=stage == 3)


def _zero(cells: Mapping[str, str], stage: int, ranks: int, shape: ModelShape) -> Strategy:
    offload = cells["offload"].lower()
    optimizer, weights = "optim" in offload, "param" in offload or offload in ("cpu", "yes", "true")
    if offload not in ("", "none", "no", "false") and not optimizer and not weights:
        raise _Untold(f"offload of {offload}")
    if "nvme" in offload:
        raise _Untold("offload to NVMe with buffers that the row does not state")
    if weights and stage < 3:
        optimizer, weights = True, False
    return Strategy(
        Engine.DEEPSPEED, ZERO_STAGES[stage], dp_shard=ranks, buckets=_buckets(cells["engine"].lower(), stage, shape),
        optimizer_home=Home.CPU if optimizer or weights else Home.GPU, parameter_home=Home.CPU if weights else Home.GPU,
        pin_memory=optimizer or weights,
    )  # fmt: skip


def _strategy(cells: Mapping[str, str], shape: ModelShape) -> Strategy:
    engine, offload = cells["engine"].lower(), cells["offload"].lower() or "none"
    ranks = _count(cells["n_gpus"], "number of cards")
    fsdp = re.match(r"fsdp\d? (full_shard|shard_grad_op)", engine)
    if fsdp is not None:
        if offload not in ("none", "no", "cpu", "cpu params+grads (fsdp cpuoffload)"):
            raise _Untold(f"offload of {offload} is not what FSDP2 does")
        home = Home.GPU if offload in ("none", "no") else Home.CPU
        return Strategy(
            Engine.FSDP, Shard.PARAMETERS, dp_shard=ranks, optimizer_home=home, parameter_home=home,
            pin_memory=home is not Home.GPU, reshard_after_forward=fsdp[1] == "full_shard",
        )  # fmt: skip
    stage = re.search(r"zero\W?(?:stage\W?)?([0-3])", engine)
    if stage is not None:
        return _zero(cells, int(stage[1]), ranks, shape)
    if offload not in ("none", "no"):
        raise _Untold(f"offload of {offload} without a sharding engine")
    if engine.startswith("ddp") and ranks > 1:
        return Strategy(Engine.DEEPSPEED, Shard.NONE, dp_shard=ranks, buckets=Buckets())
    if ranks == 1 and (engine in ("", "none", "plain") or engine.startswith("ddp")):
        return Strategy(Engine.PLAIN, Shard.NONE)
    raise _Untold(f"engine {engine or 'not stated'} on {ranks} cards")


def _compute(precision: str) -> str:
    """The dtype that products are made in; half precisions weigh alike."""
    return "fp32" if re.match(r"(fp|float|tf)32", precision, re.IGNORECASE) and "16" not in precision else "bf16"


def _check(cells: Mapping[str, str]) -> None:
    """Refuse what the project does otherwise.

    Raises:
        _Untold: with the reason.
    """
    method, precision = cells["method"].lower(), cells["precision"]
    if method not in ("lora", "qlora", "full"):
        raise _Untold(f"method {method.split(' ')[0] or 'not stated'}: the project has full, LoRA and QLoRA")
    if method == "qlora" and not re.search("nf4", precision, re.IGNORECASE):
        raise _Untold(f"precision {precision or 'not stated'}: the project's QLoRA is bitsandbytes' NF4")
    if method != "qlora" and re.search("8|int|gptq|nf4|fp4", precision, re.IGNORECASE):
        raise _Untold(f"precision {precision}")
    if re.search("mixed|autocast|amp", precision, re.IGNORECASE) and "FSDP" not in precision:
        raise _Untold("fp32 weights under autocast: the project holds a working copy instead")
    sharded = cells["engine"].lower() not in ("", "none", "plain")
    if method == "full" and not sharded and "no step" not in cells["optimizer"] and _compute(precision) != "fp32":
        raise _Untold("weights and Adam in bf16: the project keeps an fp32 master")
    if method != "full" and cells["engine"].startswith("fsdp1") and "wrap=Block" in cells["engine"]:
        raise _Untold("FSDP1 with a block's frozen and trained weights in one flat parameter, which has a whole gradient")
    if cells["act_ckpt"].split(" ")[0].lower() not in RECOMPUTE:
        raise _Untold(f"recompute {cells['act_ckpt'] or 'not stated'}")


def _tuning(cells: Mapping[str, str]) -> Tuning:
    if cells["method"].lower() == "full":
        return Tuning("full")
    targets = _first(TARGETS, cells["lora_targets"].replace(" ", ""))
    rank = re.search(r"\d+", cells["lora_rank"])
    if not isinstance(targets, tuple) or rank is None:
        raise _Untold(f"LoRA rank {cells['lora_rank'] or 'unknown'} on {cells['lora_targets'] or 'unknown layers'}")
    if cells["method"].lower() == "lora":
        return Tuning("lora", rank=int(rank[0]), targets=targets)
    # bitsandbytes.nn.Linear4bit quantises its scales unless told not to; litgpt's "bnb.nf4" tells it so, "bnb.nf4-dq" does not.
    double = not re.search(r"no double quant|bnb\.nf4(?!-dq)", cells["precision"])
    return Tuning("qlora", rank=int(rank[0]), targets=targets, quant="nf4", double_quant=double)


def _loss(fused: str) -> tuple[Loss, LossCode | None]:
    """(the loss of the run, its code where the row's is not ours)."""
    if fused.lower() in WHOLE_LOGITS:
        return Loss("plain"), TRANSFORMERS
    if fused == "chunked (lm_head chunk 128)":
        return Loss("plain"), LITGPT
    if re.search(r"fusedlinearce|liger", fused, re.IGNORECASE):
        return Loss("liger"), None
    raise _Untold(f"loss {fused}")


def _expressed(cells: Mapping[str, str], base: RunSpec) -> Expressed:
    _check(cells)
    shape = _first(MODELS, re.sub(r"[\s_]+", "-", cells["model"]))
    if not isinstance(shape, ModelShape):
        raise _Untold(f"model {cells['model'] or 'not stated'}: not one of the known families")
    loss, code = _loss(cells["fused_ce"])
    meter, measured, fitted = _meter(cells)
    card = _first(CARDS, f"{cells['gpu']} {cells['unit']}")
    if not isinstance(card, Card):
        if meter in (FITS, DEVICE):
            raise _Untold(f"card {cells['gpu'] or 'not stated'}: not one of the known ones")
        card = DEFAULT_CARD
    strategy, micro = _strategy(cells, shape), _count(cells["micro_batch"], "micro-batch")
    spec = replace(
        base,
        model=Model(cells["model"], None, False, shape),
        tuning=_tuning(cells),
        strategy=strategy,
        batch=Batch(micro * strategy.dp, micro, 1),
        data=replace(base.data, seq_len=_count(cells["seq_len"], "length")),
        recompute=RECOMPUTE[cells["act_ckpt"].split(" ")[0].lower()],
        precision=replace(base.precision, compute=_compute(cells["precision"])),
        loss=loss,
        attention="eager" if cells["attention"].lower().startswith("eager") else "sdpa",
        cluster=Cluster("published", 1, strategy.ranks, card),
    )
    return Expressed(spec, meter, measured or card.memory_bytes, fitted, code)


def express(row: Mapping[str, object], base: RunSpec) -> Expressed | str:
    """The row as a run, on top of `base` for what no byte depends on; or why it is none.

    `row` has columns of published_memory.csv, any of which may be missing; what is not said of loss, attention and offload is
    taken to be whole logits, a fused kernel and none.
    """
    try:
        return _expressed(_cells(row), base)
    except _Untold as reason:
        return str(reason)


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


def score(row: Mapping[str, object], base: RunSpec, basis: str = LAYOUT) -> Score | str:
    """The prediction for one row beside its measurement, or why the project cannot make one. Under basis "auto" the rows whose
    meter is what torch reserved are rehearsed: only a trace knows more of that than what is alive.

    Raises:
        RehearsalError: the row was to be rehearsed, and that failed.
    """
    run = express(row, base)
    if isinstance(run, str):
        return run
    ours = run.loss is None or run.loss == TRANSFORMERS  # a rehearsal runs this project's loss
    rehearsed = (
        ours and run.spec.loss.kind != "liger" and (basis == REHEARSAL or (basis == AUTO and run.meter in (RESERVED, DEVICE)))
    )
    plan = predict(run.spec, REHEARSAL) if rehearsed else by_layout(run.spec, loss=run.loss)
    name = str(row.get("id") or "?")
    if run.meter == FITS:
        return Score(name, FITS, plan.memory.used, run.measured, plan.basis, plan.fits == run.fitted)
    if run.meter == AFTER_FORWARD:
        return Score(name, run.meter, _after_forward(run.spec, plan), run.measured, LAYOUT)
    kept = _inputs_kept(run.spec) if run.loss == LITGPT else 0  # measured in October 2023
    predicted = {ALLOCATED: plan.memory.allocated + kept, RESERVED: plan.memory.reserved, DEVICE: plan.memory.used}[run.meter]
    return Score(name, run.meter, predicted, run.measured, plan.basis)
