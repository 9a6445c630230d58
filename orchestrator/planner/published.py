"""Published measurements as runs of this project: which rows can be expressed, with which meter, and what is predicted.

Nothing here is fitted: a row either says the same as a run of this project, or it is left out with the reason.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from orchestrator.config.shapes import shape_of
from orchestrator.planner import store
from orchestrator.planner.losses import LossCode
from orchestrator.planner.programme import CHUNKED, EARLIER, KEPT, OWN, Programme, mixture, spread
from orchestrator.planner.published_strategy import strategy_of
from orchestrator.planner.published_tables import (
    CARDS,
    CONFIGS,
    DEFAULT_CARD,
    EAGER,
    KEEPING,
    LAYERS,
    MODELS,
    OPTIMIZERS,
    SAID_BESIDE,
    SPELLED,
    UNGATED,
)
from orchestrator.planner.published_words import Untold, count, first, number_of
from orchestrator.spec import (
    LINEARS,
    Batch,
    Card,
    Cluster,
    Engine,
    Loss,
    Model,
    ModelShape,
    RunSpec,
    Tuning,
)
from orchestrator.units import GIB, MIB

QUALITIES = ("A", "B")

ALLOCATED, RESERVED, AFTER_FORWARD, DEVICE, FITS = "allocated", "reserved", "after forward", "device", "fits"


TRANSFORMERS = LossCode(forward=2, backward=3, half=False)
"""The loss of `planner.earlier`, which these rows were measured with: fp32 logits in the place of the half-precision ones. A
loop that keeps the model's output through the backward holds one more; rows do not say whether theirs does."""

LITGPT = LossCode(forward=1, backward=1, half=False, shifted=False)
"""The loss of lit-gpt (litgpt/utils.py, chunked_cross_entropy, on the list that GPT.forward makes under lm_head_chunk_size):
all logits in half precision and as much again of log_softmax's results, 4 bytes together; chunks only bound what the backward
adds."""

TORCHTUNE = LossCode(forward=1, backward=1, shifted=False)
"""The loss of `planner.earlier.chunked`: all logits in half precision, and log_softmax's results in fp32."""

PERFORMED = {None: OWN, TRANSFORMERS: EARLIER, TORCHTUNE: CHUNKED}
"""The loss that a rehearsal of the row performs; that of lit-gpt stands in blocks of its own and is only counted."""


@dataclass(frozen=True, slots=True)
class Expressed:
    """A row as a run: its spec, its meter, the bytes measured (the card's for "fits"), whether it fit, the code of its loss
    where that is not the project's, and what a rehearsal of it performs: None where only its Layout tells anything."""

    spec: RunSpec
    meter: str
    measured: int
    fitted: bool = True
    loss: LossCode | None = None
    programme: Programme | None = None

    @property
    def countable(self) -> bool:
        """Whether the Layout tells its memory: not where what is trained wholly has no masters, nor of families without a table
        of their own."""
        shape = self.spec.model.shape
        bare = self.programme is not None and not self.programme.masters and self.spec.tuning.kind == "full"
        return shape is not None and shape.known and not bare


COLUMNS = (
    "id", "source", "model", "gpu", "n_gpus", "method", "lora_rank", "lora_targets", "precision", "optimizer", "engine",
    "offload", "act_ckpt", "attention", "fused_ce", "seq_len", "micro_batch", "measured_gb", "unit", "notes",
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


def _cells(row: Mapping[str, object]) -> dict[str, str]:
    """The columns that are read, as text without space around it."""
    return {name: str(row.get(name) or "").strip() for name in COLUMNS}


def _meter(cells: Mapping[str, str]) -> tuple[str, int, bool]:
    """(meter, bytes measured or 0, whether it fit) of a row."""
    unit = cells["unit"]
    if re.match(r"(cuda )?(OOM|out of memory)", unit, re.IGNORECASE):
        return FITS, 0, False
    if unit.upper().startswith(("CAPACITY", "FITS")):
        return FITS, 0, True
    meter = first(METERS, unit)
    # A unit in which "GB" was printed for GiB says so with both words.
    scale = next((size for word, size in UNITS.items() if re.search(rf"\b{word}\b", unit, re.IGNORECASE)), None)
    if not isinstance(meter, str) or scale is None:
        raise Untold("the unit does not say which meter was read")
    size = number_of(cells["measured_gb"], "what was measured is")
    if not size:
        raise Untold("nothing was measured")
    return meter, round(size * scale), True


def _compute(precision: str) -> str:
    """The dtype that products are made in; half precisions weigh alike."""
    return "fp32" if re.match(r"(fp|float|tf)32", precision, re.IGNORECASE) and "16" not in precision else "bf16"


def _check(cells: Mapping[str, str]) -> None:
    """Refuse what the project does otherwise.

    Raises:
        Untold: with the reason.
    """
    method, precision = cells["method"].lower(), cells["precision"]
    if method not in ("lora", "qlora", "full"):
        raise Untold(f"method {method.split(' ')[0] or 'not stated'}: the project has full, LoRA and QLoRA")
    if method == "qlora" and not re.search("nf4|4.?bit", precision, re.IGNORECASE):
        raise Untold(f"precision {precision or 'not stated'}: the project's QLoRA is bitsandbytes' NF4")
    if re.search("gptq|awq|aqlm|hqq|fp4|eetq", precision, re.IGNORECASE):
        known = "the project's QLoRA is bitsandbytes' NF4" if method == "qlora" else "the project trains no such weights"
        raise Untold(f"precision {precision}: {known}")
    if method != "qlora" and re.search("8|int|nf4", precision, re.IGNORECASE):
        raise Untold(f"precision {precision}")
    if re.search("mixed|autocast|amp", precision, re.IGNORECASE) and "FSDP" not in precision:
        raise Untold("fp32 weights under autocast: the project holds a working copy instead")
    if method != "full" and cells["engine"].startswith("fsdp1") and "wrap=Block" in cells["engine"]:
        raise Untold("FSDP1 with a block's frozen and trained weights in one flat parameter, which has a whole gradient")


def _recompute(words: str) -> tuple[str, int]:
    """(`recompute`, `recompute_every`) by the row's act_ckpt.

    Raises:
        Untold: it says something else.
    """
    usual = re.search(r"default (yes|no)", words)
    every = re.match(r"every (\d)\w* ", f"{words} ".replace("second", "2"))
    word = (usual[1] if usual else words).split(" ")[0].lower()
    if every:
        return "every_n", int(every[1])
    if word not in RECOMPUTE:
        raise Untold(f"recompute {words or 'not stated'}")
    return RECOMPUTE[word], 2


def _targets(cells: Mapping[str, str], family: str) -> tuple[str, ...]:
    """The layers with adapters, as the family calls them; empty where a word is not understood."""
    found: set[str] = set()
    for word in re.split(r"[\s,;/+|()\[\]'\":=]+", cells["lora_targets"].lower()):
        layers = LAYERS.get(word, ())
        if not layers and word not in SAID_BESIDE:
            return ()
        found.update(layers)
    if family in UNGATED:
        found.discard("gate_proj")
    spelled = SPELLED.get(family, {})
    return tuple(dict.fromkeys(spelled.get(name, name) for name in LINEARS if name in found))


def _tuning(cells: Mapping[str, str], family: str) -> Tuning:
    if cells["method"].lower() == "full":
        return Tuning("full")
    targets = _targets(cells, family)
    rank = re.search(r"\d+", cells["lora_rank"])
    if not targets or rank is None:
        raise Untold(f"LoRA rank {cells['lora_rank'] or 'unknown'} on {cells['lora_targets'] or 'unknown layers'}")
    if cells["method"].lower() == "lora":
        return Tuning("lora", rank=int(rank[0]), targets=targets)
    if re.search(r"int8|8.?bit", cells["precision"], re.IGNORECASE):
        return Tuning("qlora", rank=int(rank[0]), targets=targets, quant="int8")
    # bitsandbytes.nn.Linear4bit quantises its scales unless told not to; litgpt's "bnb.nf4" tells it so, "bnb.nf4-dq" does not.
    double = not re.search(r"no double quant|bnb\.nf4(?!-dq)", cells["precision"])
    return Tuning("qlora", rank=int(rank[0]), targets=targets, quant="nf4", double_quant=double)


def _loss(fused: str) -> tuple[Loss, LossCode | None]:
    """(the loss of the run, its code where the row's is not ours)."""
    if fused.lower() in WHOLE_LOGITS:
        return Loss("plain"), TRANSFORMERS
    if fused == "chunked (lm_head chunk 128)":
        return Loss("plain"), LITGPT
    if re.search(r"fused.?linear|liger|cut.?cross|cce", fused, re.IGNORECASE):
        return Loss("liger"), None
    if re.search(r"chunk", fused, re.IGNORECASE):
        return Loss("plain"), TORCHTUNE
    raise Untold(f"loss {fused}")


def _model(name: str) -> Model:
    """The model of that name; of a family without a table here its config.json is written into the cache, to be built from.

    Raises:
        Untold: nothing is known under that name.
    """
    words = re.sub(r"[\s_/]+", "-", name)
    shape = first(MODELS, words)
    if isinstance(shape, ModelShape):
        return Model(name, None, False, shape)
    config = next((config for pattern, config in CONFIGS if re.search(pattern, words, re.IGNORECASE)), None)
    if config is None:
        raise Untold(f"model {name or 'not stated'}: not one of the known families")
    text = json.dumps(dict(config))
    folder = store.folder().parent / "published" / re.sub(r"\W+", "-", text)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(text, encoding="utf-8")
    return Model(name, str(folder), False, shape_of(config))


def _programme(cells: Mapping[str, str], spec: RunSpec, loss: LossCode | None) -> Programme | None:
    """What a rehearsal of the row performs; None where its code is not here."""
    if loss not in PERFORMED or spec.loss.kind == "liger":
        return None
    performed = PERFORMED[loss]
    if performed == EARLIER and any(re.search(pattern, cells["source"]) for pattern in KEEPING):
        performed = KEPT
    optimizer, half = cells["optimizer"].lower(), spec.precision.compute != "fp32"
    bare = re.search(r"pure|true|all|bf16 states", f"{cells['precision']} {cells['optimizer']}", re.IGNORECASE) is not None
    alone = spec.strategy.engine is Engine.PLAIN and spec.tuning.kind == "full"
    foreach = spec.strategy.engine is not Engine.DEEPSPEED and re.search(r"fused|8|bnb|paged|no step", optimizer) is None
    return Programme(
        _lengths(cells, spec.data.seq_len, spec.batch.micro), performed, masters=not (half and (bare or alone)),
        foreach=foreach and spec.optimizer.name == "adamw",
    )  # fmt: skip


LENGTHS = re.compile(r"(\d[\d,.]*)\s*(?:\+-|\+/-|±)\s*(\d[\d,.]*) tokens( before filtering)?")
"""How notes state lengths: their mean and standard deviation, and whether samples beyond the limit were left out."""


def _lengths(cells: Mapping[str, str], longest: int, micro: int) -> tuple[int, ...]:
    """The lengths of micro-batches to rehearse; empty where the row does not say that its samples differed."""
    found = LENGTHS.search(cells["notes"])
    if found is None:
        return ()
    mean, deviation = (float(text.replace(",", "")) for text in found.group(1, 2))
    return mixture(spread(mean, deviation, longest, dropped=bool(found[3])), micro) if mean and deviation else ()


def _expressed(cells: Mapping[str, str], base: RunSpec) -> Expressed:
    _check(cells)
    recompute, every = _recompute(cells["act_ckpt"])
    model = _model(cells["model"])
    assert model.shape is not None, "each entry of the tables states its dimensions"
    loss, code = _loss(cells["fused_ce"])
    meter, measured, fitted = _meter(cells)
    card = first(CARDS, f"{cells['gpu']} {cells['unit']}")
    if not isinstance(card, Card):
        if meter in (FITS, DEVICE):
            raise Untold(f"card {cells['gpu'] or 'not stated'}: not one of the known ones")
        card = DEFAULT_CARD
    optimizer = first(OPTIMIZERS, cells["optimizer"])
    if not optimizer:
        raise Untold(f"optimizer {cells['optimizer']}")
    strategy, micro = strategy_of(cells, model.shape), count(cells["micro_batch"], "micro-batch")
    spec = replace(
        base,
        model=model,
        tuning=_tuning(cells, model.shape.model_type),
        strategy=strategy,
        batch=Batch(micro * strategy.dp, micro, 1),
        data=replace(base.data, seq_len=count(cells["seq_len"], "length")),
        optimizer=replace(base.optimizer, name=str(optimizer)),
        recompute=recompute,
        recompute_every=every,
        precision=replace(base.precision, compute=_compute(cells["precision"])),
        loss=loss,
        attention="eager" if cells["attention"].lower().startswith("eager") or model.shape.model_type in EAGER else "sdpa",
        cluster=Cluster("published", 1, strategy.ranks, card),
    )
    return Expressed(spec, meter, measured or card.memory_bytes, fitted, code, _programme(cells, spec, code))


def express(row: Mapping[str, object], base: RunSpec) -> Expressed | str:
    """The row as a run, on top of `base` for what no byte depends on; or why it is none.

    `row` has columns of published_memory.csv, any of which may be missing; what is not said of loss, attention and offload is
    taken to be whole logits, a fused kernel and none.
    """
    try:
        return _expressed(_cells(row), base)
    except Untold as reason:
        return str(reason)
