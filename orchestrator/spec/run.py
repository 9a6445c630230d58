"""RunSpec: everything that decides a run, validated, frozen, and free of Hydra and torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from orchestrator.spec.cluster import Cluster
from orchestrator.spec.model import ModelShape
from orchestrator.spec.quant import INT8, NF4, NF4_DOUBLE
from orchestrator.spec.strategy import Strategy


@dataclass(frozen=True, slots=True)
class Run:
    """`dir` None: a fresh folder under runs/ is named after the run. `steps` None: `epochs` passes over the data.

    `timeout` are the seconds without progress of a rank after which the run is ended; 0: never.
    """

    dir: str | None
    steps: int | None
    epochs: int
    timeout: float = 600.0


@dataclass(frozen=True, slots=True)
class Model:
    """Where weights come from: local folder or hub id `path`; None: random weights of `shape`, from `seed`."""

    name: str
    path: str | None
    trust_remote_code: bool
    shape: ModelShape | None


@dataclass(frozen=True, slots=True)
class Tuning:
    """`kind` "full", "lora", "qlora" or "head"; `targets` are module names, "all-linear" already expanded.

    `modules` are the last names of modules that are trained whole beside the adapters. `untie`: the head, which shares the
    embedding's weights, becomes a copy of its own. `rslora`: adapters are scaled by alpha / √rank (arXiv:2312.03732). `dora`:
    what adapters change is the direction of each row of a weight, and its length is trained besides (arXiv:2402.09353).

    `quant` "nf4", "int8" or "none": how the frozen linear layers rest under "qlora" and "head"; `double_quant`: the scales
    of nf4 quantised too.
    """

    kind: str
    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    targets: tuple[str, ...] = ()
    quant: str = "none"
    double_quant: bool = False
    modules: tuple[str, ...] = ()
    untie: bool = False
    rslora: bool = False
    dora: bool = False

    @property
    def label(self) -> str:
        """Short name for tables: "full", "lora", "lora dora", "qlora int8", "head nf4"."""
        usual = self.kind == "qlora" and self.quant != INT8
        words = [self.kind, "dora" if self.dora else "", self.quant if self.form and not usual else ""]
        return " ".join(word for word in words if word)

    @property
    def scaling(self) -> float:
        """What the adapters' product is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @property
    def adapters(self) -> bool:
        """Whether low-rank adapters are trained beside a frozen base."""
        return self.kind in ("lora", "qlora")

    @property
    def form(self) -> str:
        """The format of `spec.quant` that linear layers rest in, "" as they are."""
        if self.quant == "none":
            return ""
        if self.quant == INT8:
            return INT8
        return NF4_DOUBLE if self.double_quant else NF4


@dataclass(frozen=True, slots=True)
class Batch:
    """`global_size` samples a step = `micro` (per rank and forward) × `accumulation` × data-parallel ranks."""

    global_size: int
    micro: int
    accumulation: int


@dataclass(frozen=True, slots=True)
class Source:
    """One place of data: file, folder, pattern or hub id. An epoch shows each of its rows `weight` times."""

    path: str
    weight: float = 1.0
    format: str = "auto"


@dataclass(frozen=True, slots=True)
class Data:
    """`path` None and no `sources`: the built-in sample. `format` "auto", "alpaca", "messages", "completion" or "text".
    `tokenizer` None: the model's own. `split` and `subset` name a part of a hub dataset, which `streaming` reads without a
    copy; `max_rows` of each source are read, all where it is None. `workers` None: as many processes as there are cores.

    `eval_fraction` of the samples is held out, chosen by `seed`; `on_malformed` "refuse" or "skip"; `packing` "none" (a row
    is one sample) or "best_fit" (several in a row of `seq_len` tokens, blind to each other).
    """

    path: str | None
    seq_len: int
    format: str = "auto"
    tokenizer: str | None = None
    chat_template: str | None = None
    eval_fraction: float = 0.0
    on_malformed: str = "refuse"
    on_long: str = "auto"
    cache_dir: str | None = None
    packing: str = "none"
    sources: tuple[Source, ...] = ()
    split: str = "train"
    subset: str | None = None
    streaming: bool = False
    max_rows: int | None = None
    workers: int | None = None


@dataclass(frozen=True, slots=True)
class Optimizer:
    """`betas` are AdamW's and Lion's; `momentum` is Muon's, whose other weights AdamW updates. Adafactor's second moment
    keeps 1 - t^-`forgetting` of itself in step t, and `update_clip` bounds the root mean square of its updates."""

    name: str
    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float = 1.0
    momentum: float = 0.95
    forgetting: float = 0.8
    update_clip: float = 1.0


@dataclass(frozen=True, slots=True)
class Schedule:
    """`kind` "constant", "linear" or "cosine". `warmup` below 1 is a share of all steps, else a number of steps."""

    kind: str
    warmup: float
    min_ratio: float = 0.0


@dataclass(frozen=True, slots=True)
class Precision:
    """`compute` "bf16", "fp16" or "fp32": the dtype of forward, backward and of the working copy of the weights."""

    compute: str


@dataclass(frozen=True, slots=True)
class Loss:
    """How the loss is made: `kind` "plain" (whole logits), "chunked" or "liger"; `chunk` tokens go through the head at once.

    The default is what every run did before there was a choice.
    """

    kind: str = "plain"
    chunk: int = 512


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """`every` 0: only at the end of the run; `keep` newest checkpoints stay; `background`: a thread writes them."""

    every: int
    keep: int
    background: bool = False


@dataclass(frozen=True, slots=True)
class Evaluation:
    every: int


@dataclass(frozen=True, slots=True)
class Export:
    """`format` "none" or "hf"; `merge`: also write the base model with the adapters folded in."""

    format: str
    merge: bool


@dataclass(frozen=True, slots=True)
class Logging:
    """`every` steps between lines and memory rows; `tracker` "none", "tensorboard" or "wandb"."""

    every: int
    tracker: str


@dataclass(frozen=True, slots=True)
class Health:
    """`on_nonfinite` "skip": a step whose loss or gradient is not finite updates nothing, and `nonfinite_limit` of them in a
    row end the run; "stop": the first ends it, gradients that overflow under fp16's loss scaling apart.

    `on_spike` "rollback": a loss that lies `spike_deviations` above the median of the last `spike_window` steps takes the run
    back to its last checkpoint, and the samples of that step are left out; one more than `spike_limit` of them ends the run.
    "ignore": nobody looks.

    `on_oom` "halve": a rank that cannot allocate in a forward, backward or evaluation has all ranks begin anew, from the last
    checkpoint and with half the micro-batch; "stop": it ends the run.
    """

    on_nonfinite: str = "skip"
    nonfinite_limit: int = 10
    on_spike: str = "ignore"
    spike_window: int = 64
    spike_deviations: float = 10.0
    spike_limit: int = 3
    on_oom: str = "stop"


@dataclass(frozen=True, slots=True)
class Planning:
    """`on_misfit` "refuse", "warn" or "ignore"."""

    on_misfit: str


@dataclass(frozen=True, slots=True)
class RunSpec:
    """`recompute` is "none", "full", "every_n" (blocks 0, n, 2n … for n = `recompute_every`), "selective" or "offload";
    `attention` "sdpa", "eager" or "flash"; `compile` "none" or "block"."""

    run: Run
    seed: int
    model: Model
    tuning: Tuning
    strategy: Strategy
    batch: Batch
    data: Data
    optimizer: Optimizer
    schedule: Schedule
    recompute: str
    precision: Precision
    cluster: Cluster
    checkpoint: Checkpoint
    resume: str
    eval: Evaluation
    export: Export
    logging: Logging
    plan: Planning
    loss: Loss = Loss()
    recompute_every: int = 2
    attention: str = "sdpa"
    health: Health = Health()
    compile: str = "none"
