"""The schema of every config key: type, default, unit and description, standing at the field.

These dataclasses are mutable because Hydra merges group files and overrides into them; `compose` turns them into the
frozen `RunSpec`. YAML files hold choices only.
"""

# ruff: noqa: RUF009 - `key` is dataclasses.field with a description

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any


def key(default: Any, description: str, unit: str = "") -> Any:
    """A dataclass field with its description and unit; a list default is copied for every instance."""
    metadata = {"help": description, "unit": unit}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


# Hydra matches enum members by their names, so name and value are the same word.
class FsdpKind(Enum):
    none = "none"
    full_shard = "full_shard"
    shard_grad_op = "shard_grad_op"
    hybrid_shard = "hybrid_shard"


class GradientDtype(Enum):
    compute = "compute"
    fp32 = "fp32"


class OffloadHome(Enum):
    cpu = "cpu"
    nvme = "nvme"


class TuningKind(Enum):
    full = "full"
    lora = "lora"
    qlora = "qlora"
    head = "head"

    @property
    def adapters(self) -> bool:
        return self in (TuningKind.lora, TuningKind.qlora)

    @property
    def can_pack(self) -> bool:
        """Whether the linear layers of the blocks are frozen, so that they can rest in fewer bits."""
        return self in (TuningKind.qlora, TuningKind.head)


class Quant(Enum):
    nf4 = "nf4"
    int8 = "int8"


class DataSource(Enum):
    sample = "sample"
    local = "local"


class DataFormat(Enum):
    auto = "auto"
    alpaca = "alpaca"
    messages = "messages"
    completion = "completion"
    text = "text"


class OnMalformed(Enum):
    refuse = "refuse"
    skip = "skip"


class OnLong(Enum):
    auto = "auto"
    truncate = "truncate"
    split = "split"
    drop = "drop"


class Packing(Enum):
    none = "none"
    best_fit = "best_fit"


class OptimizerName(Enum):
    adamw = "adamw"
    adamw_bf16 = "adamw_bf16"
    adamw_8bit = "adamw_8bit"
    paged_adamw_8bit = "paged_adamw_8bit"
    adafactor = "adafactor"
    lion = "lion"
    muon = "muon"


class ScheduleKind(Enum):
    cosine = "cosine"
    linear = "linear"
    constant = "constant"


class RecomputeKind(Enum):
    none = "none"
    full = "full"
    every_n = "every_n"
    selective = "selective"
    offload = "offload"


class CompileKind(Enum):
    none = "none"
    block = "block"


class AttentionKind(Enum):
    sdpa = "sdpa"
    eager = "eager"
    flash = "flash"


class LossKind(Enum):
    auto = "auto"
    plain = "plain"
    chunked = "chunked"
    liger = "liger"


class Compute(Enum):
    auto = "auto"
    bf16 = "bf16"
    fp16 = "fp16"
    fp32 = "fp32"


class ExportFormat(Enum):
    none = "none"
    hf = "hf"


class Tracker(Enum):
    none = "none"
    tensorboard = "tensorboard"
    wandb = "wandb"


class OnNonfinite(Enum):
    skip = "skip"
    stop = "stop"


class OnSpike(Enum):
    ignore = "ignore"
    rollback = "rollback"


class OnOom(Enum):
    stop = "stop"
    halve = "halve"


class OnMisfit(Enum):
    refuse = "refuse"
    warn = "warn"
    ignore = "ignore"


class JobKind(Enum):
    none = "none"
    job = "job"


@dataclass
class RunConf:
    dir: str | None = key(None, "folder of the run; null: a fresh one under runs/, named after the run")
    steps: int | None = key(None, "optimizer steps; null: as many as run.epochs takes", "steps")
    epochs: int = key(1, "passes over the training data, where run.steps is null", "passes")
    timeout: float = key(600.0, "a rank that makes no progress for so long ends the run and is named; 0: never", "seconds")


@dataclass
class ZeroConf:
    stage: int | None = key(None, "ZeRO stage 0 to 3; null: no DeepSpeed (set by the group)")
    reduce_bucket: int | None = key(None, "bucket of gradient reduction; null: 50 M or the whole model if smaller", "elements")
    allgather_bucket: int | None = key(None, "bucket of weight gathering, stages 1 and 2; null: as reduce_bucket", "elements")
    prefetch_bucket: int | None = key(None, "weights fetched ahead, stage 3; null: as reduce_bucket, 0 from NVMe", "elements")
    persistence_threshold: int | None = key(
        None, "smaller tensors stay whole on every rank, stage 3; null: 10 x hidden size, at most 100,000", "elements"
    )
    max_live_parameters: int = key(1_000_000_000, "gathered weights allowed on a card at once, stage 3", "elements")
    max_reuse_distance: int | None = key(
        None, "weights used again within this distance stay gathered, stage 3; null: 1000 M, 0 from NVMe", "elements"
    )
    sub_group_size: int | None = key(
        None, "weights updated at once, stage 3; null: 1000 M, 100 M with the optimizer on NVMe", "elements"
    )
    gradients: GradientDtype = key(GradientDtype.compute, "format in which micro-batches are added up, stages 2 and 3")
    overlap_comm: bool = key(True, "reduce gradients while backward runs; a second bucket of memory")


@dataclass
class AioConf:
    block_size: int = key(1_048_576, "NVMe: one request", "bytes")
    queue_depth: int = key(8, "NVMe: requests under way at once in each thread", "requests")
    threads: int = key(1, "NVMe: threads that share one transfer", "threads")
    single_submit: bool = key(False, "NVMe: hand requests to the kernel one by one")
    overlap_events: bool = key(True, "NVMe: submit requests before earlier ones are done")


@dataclass
class OffloadConf:
    optimizer: bool = key(False, "optimizer states rest outside the card (set by the group)")
    parameters: bool = key(False, "weights rest outside the card (set by the group)")
    optimizer_home: OffloadHome = key(OffloadHome.cpu, "where offloaded optimizer states rest (set by the group)")
    parameters_home: OffloadHome = key(OffloadHome.cpu, "where offloaded weights rest (set by the group)")
    pin_memory: bool | None = key(None, "page-lock what is offloaded; null: yes on cards, no on a CPU-only machine")
    path: str | None = key(
        None, "NVMe: folder on a local disk in which each job makes one of its own; null: .swap beside the run's folder"
    )
    buffer_count: int = key(8, "NVMe: weights in host memory on their way, for each rank", "tensors")
    buffer_size: int | None = key(None, "NVMe: largest of them; null: a rank's part of the largest weight", "elements")
    aio: AioConf = field(default_factory=AioConf)


@dataclass
class FsdpConf:
    kind: FsdpKind = key(FsdpKind.none, "which FSDP2 sharding (set by the group)")
    shard_size: int | None = key(
        None, "ranks of one shard group of hybrid_shard; null: cards per node, on one node half of the ranks", "ranks"
    )


@dataclass
class TensorConf:
    size: int = key(
        1, "ranks that divide each matrix among them; divides heads, MLP and vocabulary (set by the group)", "ranks"
    )


@dataclass
class PipelineConf:
    stages: int = key(1, "ranks that run the blocks one after the other; above 1 is refused (set by the group)", "ranks")


@dataclass
class TuningConf:
    kind: TuningKind = key(TuningKind.full, "full, lora, qlora or head (set by the group)")
    rank: int = key(16, "LoRA: inner size of the adapters")
    alpha: int = key(32, "LoRA: adapters are scaled by alpha / rank")
    dropout: float = key(0.0, "LoRA: share of the adapters' inputs dropped")
    targets: Any = key(
        ["all-linear"], "LoRA: linear layers that get adapters, e.g. [q_proj,v_proj]; all-linear: all of a block"
    )
    modules: Any = key(
        [], "LoRA: modules trained whole beside the adapters: embed_tokens, lm_head, norms, or the last name of another"
    )
    rslora: bool = key(False, "LoRA: scale by alpha / sqrt(rank), so that high ranks learn as fast (arXiv:2312.03732)")
    dora: bool = key(False, "LoRA: train the size of each row of a weight apart from its direction (arXiv:2402.09353)")
    untie: bool = key(False, "give a head that shares the embedding a copy of its own, so that it can be trained alone")
    quant: Quant | None = key(
        None,
        "QLoRA and head: format in which the linear layers of the blocks rest; null: nf4 for qlora, as they are for head; "
        "int8: weights alone, twice nf4's memory",
    )
    double_quant: bool = key(True, "QLoRA: quantise the scales of nf4 too; 0.516 instead of 0.563 bytes to a weight")


@dataclass
class ModelConf:
    name: str = key("", "short name for folders and tables (set by the group)")
    hub_id: str | None = key(None, "where the group's weights are published (set by the group)")
    path: str | None = key(None, "local folder or hub id; random: no weights, from seed; null: the group's hub_id")
    trust_remote_code: bool = key(False, "run Python code that the model folder brings along")
    model_type: str = key("", "family, as in config.json")
    vocab_size: int = key(0, "rows of the embedding", "tokens")
    hidden_size: int = key(0, "width of the residual stream")
    intermediate_size: int = key(0, "inner width of the MLP")
    num_hidden_layers: int = key(0, "transformer blocks")
    num_attention_heads: int = key(0, "query heads")
    num_key_value_heads: int = key(0, "key and value heads; divides the query heads")
    head_dim: int = key(0, "width of one head")
    max_position_embeddings: int = key(0, "longest sequence the model was made for", "tokens")
    tie_word_embeddings: bool = key(False, "whether the head shares the embedding")
    rms_norm_eps: float = key(1e-6, "added to the mean square in every norm")
    rope_theta: float = key(10_000.0, "base of the rotary frequencies")
    attention_bias: bool = key(False, "whether q, k, v and o have biases (qwen2 always biases q, k, v)")


@dataclass
class BatchConf:
    global_size: int = key(16, "samples in one optimizer step, over all ranks; rows with data.packing", "samples")
    micro: int | None = key(
        None,
        "samples in one forward on one rank; null: the largest divisor of global_size / ranks up to 8 for tiny, else 1",
        "samples",
    )


@dataclass
class SourceConf:
    path: str = key("", "as data.path")
    weight: float = key(1.0, "how often an epoch shows each row; 0.5: half of the rows, others in the next")
    format: DataFormat = key(DataFormat.auto, "as data.format")


@dataclass
class DataConf:
    source: DataSource = key(DataSource.sample, "built-in sample or own file (set by the group; data.path wins)")
    path: str | None = key(
        None, "your data: a .json, .jsonl, .parquet, .arrow or .txt file, a folder or pattern of them, or a hub id"
    )
    sources: list[SourceConf] = key(
        [], "several sources instead of path: [{path: a.json}, {path: b.jsonl, weight: 0.5, format: text}]; an epoch shows "
        "each row of a source weight times"
    )  # fmt: skip
    split: str = key("train", "split of a hub dataset")
    subset: str | None = key(None, "subset (configuration) of a hub dataset")
    streaming: bool = key(False, "read a hub dataset as it is tokenised, without a copy of its raw files")
    max_rows: int | None = key(None, "read this many rows of each source; null: all", "rows")
    seq_len: int | None = key(
        None, "longest sample; null: 256 for the built-in sample, else 2048 or the model's limit if smaller", "tokens"
    )
    format: DataFormat = key(
        DataFormat.auto,
        "layout of a row; auto: seen from its fields; completion: prompt and completion; text: everything is learned",
    )
    tokenizer: str | None = key(None, "folder or hub id of a tokenizer; null: the model's own, else the built-in one")
    chat_template: str | None = key(None, "chatml, llama3, alpaca or a Jinja file; null: the tokenizer's own")
    eval_fraction: float = key(0.0, "share of the samples held out for eval, chosen by seed")
    on_malformed: OnMalformed = key(OnMalformed.refuse, "what to do with rows that lack fields")
    packing: Packing = key(
        Packing.none,
        "best_fit: several samples, blind to each other, in each row of seq_len; batch.global_size and batch.micro then "
        "count rows, not samples",
    )
    on_long: OnLong = key(
        OnLong.auto, "samples longer than seq_len: cut off, in pieces, or left out; auto: split raw text, truncate others"
    )
    workers: int | None = key(
        None, "processes that tokenise; null: one for each core from 16 MB on; 0: none besides the run's", "processes"
    )
    cache_dir: str | None = key(None, "folder for tokenised data; null: the user's cache folder")


@dataclass
class OptimizerConf:
    name: OptimizerName = key(OptimizerName.adamw, "which optimizer (set by the group)")
    lr: float | None = key(
        None,
        "peak learning rate; null: 2e-5 for full, 2e-4 for lora and qlora, 3e-3 for the tiny model; a fifth of it for Lion",
    )
    betas: list[float] = key([0.9, 0.999], "AdamW: decay of the first and second moment; Lion: of what is applied and kept")
    eps: float = key(1e-8, "AdamW: added to the root of the second moment")
    weight_decay: float = key(0.0, "decoupled decay of each weight, times the rate")
    clip: float = key(1.0, "largest norm of the global gradient; 0: no clipping")
    momentum: float = key(0.95, "Muon: decay of the momentum of matrices")
    forgetting: float = key(0.8, "Adafactor: the second moment of step t keeps 1 - t^-forgetting of itself")
    update_clip: float = key(1.0, "Adafactor: largest root mean square of an update, before the rate")


@dataclass
class ScheduleConf:
    kind: ScheduleKind = key(ScheduleKind.cosine, "shape after the warm-up (set by the group)")
    warmup: float = key(0.03, "below 1 a share of all steps, else a number of steps")
    min_ratio: float = key(0.0, "rate at the end as a share of the peak")


@dataclass
class RecomputeConf:
    kind: RecomputeKind = key(RecomputeKind.none, "activations kept or computed again (set by the group)")
    every: int = key(2, "every_n: one block of so many is computed again", "blocks")


@dataclass
class CompileConf:
    kind: CompileKind = key(CompileKind.none, "whether the blocks are compiled (set by the group)")


@dataclass
class AttentionConf:
    kind: AttentionKind = key(AttentionKind.sdpa, "which attention kernel (set by the group)")


@dataclass
class PrecisionConf:
    compute: Compute = key(Compute.auto, "number format of forward and backward (set by the group)")


@dataclass
class LossConf:
    kind: LossKind = key(
        LossKind.auto,
        "chunked: no whole logits, exact; plain: whole logits; liger: Liger's fused kernel on NVIDIA; "
        "auto: chunked where the model's head allows it",
    )
    chunk: int = key(512, "chunked: tokens that go through the head at once", "tokens")


@dataclass
class CardConf:
    name: str = key("", "short name of the card")
    nvml: list[str] = key([], "names that the driver gives it")
    memory_mib: int = key(0, "memory that the driver shows", "MiB")
    half_tflops: float = key(0.0, "peak of dense bf16 (fp16 where there is no bf16)", "TFLOP/s")
    memory_gb_per_s: float = key(0.0, "peak memory bandwidth", "GB/s")
    link_gb_per_s: float = key(0.0, "peak link to its neighbours, one way", "GB/s")
    bf16: bool = key(True, "whether it computes in bf16")
    source: str = key("", "where these numbers come from")


@dataclass
class ClusterConf:
    name: str = key("local", "name of the cluster; local: the machine at hand (set by the group)")
    nodes: int = key(1, "machines")
    cards_per_node: int = key(0, "cards in one machine; 0 with cluster=local: as found")
    host_gib: float = key(0.0, "memory of one machine; 0: not stated", "GiB")
    nvme_gib: float = key(0.0, "free space of its local disk; 0 with cluster=local: as found, else not stated", "GiB")
    nvme_gb_per_s: float = key(0.0, "what that disk reads and writes, for all cards of the machine; 0: not stated", "GB/s")
    card: CardConf = field(default_factory=CardConf)


@dataclass
class CheckpointConf:
    every: int = key(0, "steps between checkpoints; 0: only at the end", "steps")
    keep: int = key(2, "newest checkpoints that stay")
    background: bool = key(
        False, "write while the next steps are taken; a rank then holds its share of the training state twice in host memory"
    )


@dataclass
class EvalConf:
    every: int = key(0, "steps between evaluations; 0: none; needs data.eval_fraction", "steps")


@dataclass
class ExportConf:
    format: ExportFormat = key(ExportFormat.hf, "hf: a folder that transformers or PEFT loads; none: no export")
    merge: bool = key(False, "LoRA, QLoRA: also write the model with the adapters folded in")


@dataclass
class LoggingConf:
    every: int = key(10, "steps between printed lines and memory rows", "steps")


@dataclass
class LoggerConf:
    tracker: Tracker = key(Tracker.none, "where metrics also go (set by the group)")


@dataclass
class HealthConf:
    on_nonfinite: OnNonfinite = key(OnNonfinite.skip, "a step whose loss or gradient is not finite: skip its update, or stop")
    nonfinite_limit: int = key(10, "skipped steps in a row that end the run", "steps")
    on_spike: OnSpike = key(
        OnSpike.ignore, "a loss far above those before it: ignore, or go back to the last checkpoint and leave its samples out"
    )
    spike_window: int = key(64, "steps whose losses say what is usual", "steps")
    spike_deviations: float = key(10.0, "how far above their median a loss is a spike", "standard deviations, from their MAD")
    spike_limit: int = key(3, "spikes that are gone back from; one more ends the run", "spikes")
    on_oom: OnOom = key(
        OnOom.stop,
        "a rank without memory in a step or evaluation: stop, or begin anew from the last checkpoint with half the micro-batch",
    )


@dataclass
class PlanConf:
    on_misfit: OnMisfit = key(OnMisfit.refuse, "what to do when the run is not expected to fit")


@dataclass
class SlurmConf:
    """A job of launch/submit.py. Nodes, processes and cards are those of the cluster that the choice names."""

    kind: JobKind = key(JobKind.none, "whether a job is submitted (set by the group)")
    name: str | None = key(None, "name of the job; null: that of the run folder")
    partition: str | None = key(None, "partition; null: the cluster's default")
    account: str | None = key(None, "account to charge; null: your default")
    qos: str | None = key(None, "quality of service; null: your default")
    constraint: str | None = key(None, "features that nodes must have, e.g. a10&ib; null: any")
    gpu: str | None = key(None, "type of card as the cluster calls it, e.g. a10; null: any")
    cpus: int = key(8, "cores on each node", "cores")
    memory_gib: int = key(0, "memory on each node; 0: all of it", "GiB")
    hours: float = key(24.0, "time limit; the run saves before it and goes on in the requeued job", "hours")
    grace: int = key(300, "the run is told to save so long before the time limit", "seconds")
    requeues: int = key(3, "the job is started again at most so often: time limit, preemption, lost node")
    setup: str | None = key(None, "shell file that every node sources first, e.g. for module load; null: none")
    array: bool = key(False, "-m: one job array instead of one job each")


@dataclass
class KubernetesConf:
    """A TrainJob of launch/submit.py. Pods, processes and cards are those of the cluster that the choice names."""

    kind: JobKind = key(JobKind.none, "whether a TrainJob is made (set by the group)")
    name: str | None = key(None, "name of the TrainJob; null: that of the run folder")
    namespace: str | None = key(None, "namespace; null: that of your context")
    image: str = key("orchestrator", "image of docker/Dockerfile, as the nodes can pull it")
    claim: str = key("training", "volume claim that all pods share: runs, models and data")
    mount: str = key("/shared", "where the claim is mounted; runs go to runs/ there")
    cpus: int = key(8, "cores of each pod", "cores")
    memory_gib: int = key(64, "memory of each pod", "GiB")
    shm_gib: int = key(16, "shared memory of each pod, out of its memory", "GiB")
    grace: int = key(300, "what a pod that is told to end has for saving", "seconds")
    requeues: int = key(3, "pods are started again at most so often: preemption, lost node, error")
    resource: str = key("nvidia.com/gpu", "what the cluster calls a card")


@dataclass
class RootConf:
    run: RunConf = field(default_factory=RunConf)
    seed: int = key(0, "decides sample order, random weights, dropout and the held-out split")
    resume: str = key("none", "none, auto (the newest checkpoint of run.dir) or the path of a checkpoint or run")
    model: ModelConf = field(default_factory=ModelConf)
    tuning: TuningConf = field(default_factory=TuningConf)
    data: DataConf = field(default_factory=DataConf)
    batch: BatchConf = field(default_factory=BatchConf)
    optimizer: OptimizerConf = field(default_factory=OptimizerConf)
    schedule: ScheduleConf = field(default_factory=ScheduleConf)
    zero: ZeroConf = field(default_factory=ZeroConf)
    fsdp: FsdpConf = field(default_factory=FsdpConf)
    tensor: TensorConf = field(default_factory=TensorConf)
    pipeline: PipelineConf = field(default_factory=PipelineConf)
    offload: OffloadConf = field(default_factory=OffloadConf)
    recompute: RecomputeConf = field(default_factory=RecomputeConf)
    compile: CompileConf = field(default_factory=CompileConf)
    attention: AttentionConf = field(default_factory=AttentionConf)
    loss: LossConf = field(default_factory=LossConf)
    precision: PrecisionConf = field(default_factory=PrecisionConf)
    cluster: ClusterConf = field(default_factory=ClusterConf)
    checkpoint: CheckpointConf = field(default_factory=CheckpointConf)
    eval: EvalConf = field(default_factory=EvalConf)
    export: ExportConf = field(default_factory=ExportConf)
    logging: LoggingConf = field(default_factory=LoggingConf)
    logger: LoggerConf = field(default_factory=LoggerConf)
    health: HealthConf = field(default_factory=HealthConf)
    plan: PlanConf = field(default_factory=PlanConf)
    slurm: SlurmConf = field(default_factory=SlurmConf)
    kubernetes: KubernetesConf = field(default_factory=KubernetesConf)
