"""What must agree between keys. Pure functions: each returns the faults that it finds."""

from __future__ import annotations

from orchestrator.config.schema import (
    ClusterConf,
    FsdpConf,
    FsdpKind,
    GradientDtype,
    OffloadConf,
    OffloadHome,
    Quant,
    TuningConf,
    TuningKind,
    ZeroConf,
)
from orchestrator.errors import Fault
from orchestrator.spec import (
    EMBEDDING,
    HEAD,
    KNOWN_FAMILIES,
    LINEARS,
    Cluster,
    ModelShape,
    norms_of,
    parameters,
    quantised,
)
from orchestrator.spec.quant import DIVISOR
from orchestrator.units import MIB, align_up, ceil_div, dtype_bytes, format_bytes

ALL_LINEAR = "all-linear"


def engine_faults(zero: ZeroConf, fsdp: FsdpConf) -> list[Fault]:
    """Two engines at once."""
    if zero.stage is None or fsdp.kind is FsdpKind.none:
        return []
    problem = f"zero=stage{zero.stage} is DeepSpeed and fsdp={fsdp.kind.name} is FSDP2; one run has one engine"
    return [Fault("zero, fsdp", problem, f"keep one: zero=stage{zero.stage} fsdp=none, or zero=none fsdp={fsdp.kind.name}")]


def offload_faults(zero: ZeroConf, fsdp: FsdpConf, offload: OffloadConf) -> list[Fault]:
    """Offload that no engine of the project does."""
    if not (offload.optimizer or offload.parameters):
        return []
    if OffloadHome.nvme in (offload.optimizer_home, offload.parameters_home):
        return nvme_faults(zero, fsdp, offload)
    name = "cpu" if offload.parameters else "optimizer"
    if zero.stage is not None:
        if offload.parameters and not offload.optimizer:
            problem = "DeepSpeed offloads parameters only together with the optimizer"
            return [Fault("offload", problem, "use offload=cpu with zero=stage3, or offload=optimizer")]
        if zero.stage == 0:
            problem = (
                f"offload={name} with zero=stage0: DeepSpeed offloads sharded optimizer states, and stage 0 shards nothing"
            )
            return [Fault("offload", problem, "use zero=stage2 offload=optimizer, zero=stage3 offload=cpu, or offload=none")]
        if offload.parameters and zero.stage < 3:
            problem = f"offload=cpu moves parameters, and under zero=stage{zero.stage} they stay whole on every card"
            return [Fault("offload", problem, "use offload=optimizer, or zero=stage3")]
        return []
    if fsdp.kind is not FsdpKind.none:
        if offload.parameters and offload.optimizer:
            return []
        problem = f"offload={name} with fsdp={fsdp.kind.name}: FSDP2 offloads parameters, gradients and optimizer together"
        return [Fault("offload", problem, "use offload=cpu, or zero=stage2 offload=optimizer")]
    remedy = "add zero=stage3 or fsdp=full_shard" if offload.parameters else "add zero=stage2"
    return [Fault("offload", f"offload={name} needs an engine that can, and zero=none and fsdp=none", remedy)]


def nvme_faults(zero: ZeroConf, fsdp: FsdpConf, offload: OffloadConf) -> list[Fault]:
    """NVMe where DeepSpeed does not swap, and what its swapper fails at."""
    name = "nvme" if offload.parameters_home is OffloadHome.nvme else "nvme_optimizer"
    if zero.stage != 3:
        engine = f"zero=stage{zero.stage}" if zero.stage is not None else f"zero=none fsdp={fsdp.kind.name}"
        problem = f"offload={name} with {engine}: only DeepSpeed's stage 3 swaps to NVMe"
        return [Fault("offload", problem, f"use zero=stage3 offload={name}, or offload=cpu")]
    faults = []
    if offload.parameters_home is OffloadHome.nvme and (
        not offload.parameters or not offload.optimizer or offload.optimizer_home is not OffloadHome.nvme
    ):
        problem = "weights on NVMe are supported only together with the optimizer"
        faults.append(Fault("offload", problem, "use offload=nvme, or offload=nvme_optimizer"))
    knobs = {"zero.prefetch_bucket": zero.prefetch_bucket, "zero.max_reuse_distance": zero.max_reuse_distance}
    ahead = [key for key, elements in knobs.items() if elements]
    if offload.parameters_home is OffloadHome.nvme and ahead:
        problem = "weights from NVMe can be neither fetched ahead nor kept: DeepSpeed 0.19.8 gives one two buffers and stops"
        faults.append(Fault(", ".join(ahead), problem, "leave it out: it is 0 with offload=nvme"))
    return faults


def swapped_run_faults(offload: OffloadConf, optimizer: str, quantised_base: bool, background: bool) -> list[Fault]:
    """What a run that swaps to NVMe cannot have besides."""
    faults: list[Fault] = []
    if OffloadHome.nvme not in (offload.optimizer_home, offload.parameters_home):
        return faults
    if optimizer != "adamw":
        problem = f"optimizer={optimizer} with states on NVMe: DeepSpeed's swapper is used with AdamW's alone"
        faults.append(Fault("optimizer", problem, "use optimizer=adamw, or offload=cpu"))
    if quantised_base:
        problem = "a packed base has not been tried on NVMe, and is a quarter of its size already"
        faults.append(Fault("offload", problem, "use offload=cpu or offload=none with tuning=qlora"))
    if background:
        problem = "a checkpoint in the background copies into host memory all that NVMe keeps out of it"
        faults.append(Fault("checkpoint.background", problem, "set it to false"))
    return faults


def swap_faults(zero: ZeroConf, offload: OffloadConf, ranks: int, size: int, persistence: int, compute: str) -> list[Fault]:
    """Buffers that cannot take the largest weight, and small weights that are not small enough. `size`: elements of a rank's
    part of the largest weight, 0 where it is not known; `persistence`: largest tensor that stays whole."""
    if offload.parameters_home is not OffloadHome.nvme or zero.stage != 3:
        return []
    faults = []
    if offload.buffer_size is None and not size:
        problem = "how large the largest weight is cannot be told from this model's config.json"
        faults.append(Fault("offload.buffer_size", problem, "set it to the elements of a rank's part of the largest weight"))
    elif offload.buffer_size is not None and offload.buffer_size < size:
        problem = f"{offload.buffer_size:,} elements, but a rank's part of the largest weight has {size:,}"
        faults.append(Fault("offload.buffer_size", problem, "leave it out, or set it to that"))
    smallest = max(MIB, offload.aio.block_size)
    kept = ceil_div(persistence, ranks) * dtype_bytes(compute)
    if kept >= smallest:
        problem = (
            f"tensors of up to {persistence:,} elements stay on the card, and {format_bytes(kept)} of one would go to NVMe"
        )
        limit = smallest // dtype_bytes(compute) * ranks - ranks
        faults.append(Fault("zero.persistence_threshold", problem, f"set it to {limit:,} or less"))
    return faults


def pin_faults(offload: OffloadConf, cluster: Cluster) -> list[Fault]:
    """Page-locked memory without an accelerator."""
    if not offload.pin_memory or cluster.card.name != "cpu":
        return []
    return [Fault("offload.pin_memory", "there is no accelerator here to copy page-locked memory to", "leave it out")]


def cluster_faults(cluster: ClusterConf) -> list[Fault]:
    """A cluster that has a name and no cards: the name alone was typed."""
    if cluster.name == "local" or (cluster.cards_per_node > 0 and cluster.card.name):
        return []
    problem = f"{cluster.name!r} has {cluster.cards_per_node} cards in a machine, of the kind {cluster.card.name!r}"
    return [Fault("cluster", problem, "choose one with cluster=NAME (--help lists them), or add a file to conf/cluster")]


def rank_faults(ranks: int, cluster: Cluster) -> list[Fault]:
    """A number of processes that a named cluster does not have."""
    if cluster.name == "local" or ranks == cluster.cards:
        return []
    problem = (
        f"{ranks} {'process runs' if ranks == 1 else 'processes run'}, but cluster={cluster.name} has {cluster.cards} cards"
    )
    remedy = f"start one process for each card (torchrun --nproc-per-node={cluster.cards_per_node}), or use cluster=local"
    return [Fault("cluster", problem, remedy)]


def shard_faults(fsdp: FsdpConf, ranks: int, size: int) -> list[Fault]:
    """A shard group of hybrid_shard that does not divide the ranks."""
    if fsdp.kind is not FsdpKind.hybrid_shard or ranks % size == 0:
        return []
    divisors = ", ".join(str(n) for n in range(1, ranks + 1) if ranks % n == 0)
    problem = f"shard groups of {size} ranks do not divide {ranks} ranks"
    return [Fault("fsdp.shard_size", problem, f"use one of {divisors}")]


def batch_faults(global_size: int, micro: int | None, dp: int) -> list[Fault]:
    """A global batch that its ranks and micro-batches do not divide; the nearest sizes that work are told."""
    share = dp * (micro or 1)
    if global_size % share == 0:
        return []
    ranks = "1 rank" if dp == 1 else f"{dp} data-parallel ranks"
    parts = ranks if micro is None else f"{ranks} x batch.micro {micro} = {share}"
    below, above = global_size // share * share, align_up(global_size, share)
    nearest = f"{below} or {above}" if below else str(above)
    remedy = f"set batch.global_size to {nearest}" + ("" if micro in (None, 1) else ", or another batch.micro")
    return [Fault("batch.global_size", f"{global_size} samples cannot be divided among {parts}", remedy)]


def precision_faults(compute: str, zero: ZeroConf, cluster: Cluster) -> list[Fault]:
    """A number format that the card or the stage cannot do."""
    faults = []
    if compute == "bf16" and not cluster.card.bf16:
        faults.append(Fault("precision", f"precision=bf16, but the card {cluster.card.name} has no bf16", "use precision=fp16"))
    if compute == "fp16" and zero.stage == 0:
        problem = "precision=fp16 with zero=stage0: DeepSpeed's fp16 optimizer without sharding does not clip gradients"
        faults.append(Fault("precision", problem, "use zero=stage1, or another precision"))
    if zero.gradients is GradientDtype.fp32 and zero.stage in (0, 1) and compute != "fp32":
        problem = f"zero.gradients=fp32 with zero=stage{zero.stage}: DeepSpeed adds up in {compute} there"
        remedy = "use zero=stage2 or stage3, or fsdp=full_shard, which always adds up in fp32"
        faults.append(Fault("zero.gradients", problem, remedy))
    return faults


def length_faults(seq_len: int, shape: ModelShape | None) -> list[Fault]:
    """Sequences longer than the model was made for."""
    if shape is None or not 0 < shape.max_position_embeddings < seq_len:
        return []
    limit = shape.max_position_embeddings
    problem = f"{seq_len} tokens, but the model was made for at most {limit} (max_position_embeddings)"
    return [Fault("data.seq_len", problem, f"set data.seq_len={limit} or less")]


def shape_faults(shape: ModelShape | None) -> list[Fault]:
    """Dimensions that do not make a model."""
    if shape is None:
        return []
    faults = []
    heads, groups = shape.num_attention_heads, shape.num_key_value_heads
    if groups > 0 and heads % groups:
        problem = f"{heads} query heads cannot share {groups} key and value heads"
        divisors = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
        faults.append(Fault("model.num_key_value_heads", problem, f"use one of {divisors}"))
    return faults


def family_faults(shape: ModelShape | None, random: bool) -> list[Fault]:
    """Random weights of a family that the project cannot build from dimensions."""
    if not random or shape is None or shape.known:
        return []
    problem = f"random weights of the family {shape.model_type!r} cannot be made from dimensions"
    return [Fault("model.model_type", problem, f"use one of {', '.join(KNOWN_FAMILIES)}, or give model.path")]


def target_names(tuning: TuningConf) -> tuple[str, ...] | None:
    """LoRA's targets as names, one string or several; None where they are neither."""
    given = tuning.targets
    if isinstance(given, str):
        return (given,)
    if isinstance(given, list) and all(isinstance(name, str) for name in given):
        return tuple(dict.fromkeys(given))
    return None


def target_faults(tuning: TuningConf, shape: ModelShape | None) -> list[Fault]:
    """LoRA targets that are no names, or that a known family does not have."""
    if not tuning.kind.adapters:
        return []
    names, options = target_names(tuning), ", ".join(LINEARS)
    if not names:
        problem = f"tuning.targets={tuning.targets} is no list of layer names"
        return [Fault("tuning.targets", problem, "write tuning.targets=[q_proj,v_proj] or tuning.targets=all-linear")]
    if ALL_LINEAR in names and len(names) > 1:
        return [Fault("tuning.targets", "all-linear stands for every layer and cannot be joined with others", "use it alone")]
    if shape is None or not shape.known:
        if ALL_LINEAR in names and shape is not None:
            problem = f"the linear layers of the family {shape.model_type!r} are not known here"
            return [Fault("tuning.targets", problem, "name them: tuning.targets=[...]")]
        return []
    unknown = [name for name in names if name not in LINEARS and name != ALL_LINEAR]
    if not unknown:
        return []
    problem = f"{shape.model_type} has no linear layer {', '.join(unknown)} in its blocks"
    return [Fault("tuning.targets", problem, f"valid: {options}, all-linear")]


ALL_NORMS = "norms"


def module_names(tuning: TuningConf, shape: ModelShape | None) -> tuple[str, ...] | None:
    """The modules trained beside the adapters as last names, "norms" replaced by the norms of `shape` where they are known;
    None where they are no names."""
    given = [tuning.modules] if isinstance(tuning.modules, str) else tuning.modules
    if not (isinstance(given, list) and all(isinstance(name, str) for name in given)):
        return None
    norms = norms_of(shape) if shape is not None and shape.known else (ALL_NORMS,)
    return tuple(dict.fromkeys(part for name in given for part in (norms if name == ALL_NORMS else (name,))))


def module_faults(tuning: TuningConf, shape: ModelShape | None) -> list[Fault]:
    """Modules to train whole that are no names, that the family does not have, or that are adapted or quantised."""
    if not tuning.kind.adapters:
        return []
    names = module_names(tuning, shape)
    if names is None:
        problem = f"tuning.modules={tuning.modules} is no list of module names"
        return [Fault("tuning.modules", problem, "write tuning.modules=[embed_tokens,lm_head]")]
    linear = [name for name in names if name in LINEARS]
    if linear:
        problem = f"{', '.join(linear)}: linear layers of the blocks get adapters, and are not trained whole beside them"
        return [Fault("tuning.modules", problem, "name them in tuning.targets, or use tuning=full")]
    if shape is None or not shape.known:
        return []
    unknown = [name for name in names if name not in (EMBEDDING, HEAD, *norms_of(shape))]
    if not unknown:
        return []
    problem = f"{shape.model_type} has no module {', '.join(unknown)}"
    return [Fault("tuning.modules", problem, f"valid: {EMBEDDING}, {HEAD}, {ALL_NORMS}")]


def untied(tuning: TuningConf) -> bool:
    """Whether the head becomes a copy of its own: where it, or something beside the adapters, is trained apart."""
    return tuning.untie and (tuning.kind is TuningKind.head or (tuning.kind.adapters and bool(tuning.modules)))


def tie_faults(tuning: TuningConf, shape: ModelShape | None) -> list[Fault]:
    """A head or an embedding that cannot be trained without the other; and untying what is not tied."""
    if shape is None:
        return []
    if not shape.tie_word_embeddings:
        if not untied(tuning):
            return []
        return [Fault("tuning.untie", "would have no effect: this model's head is not tied to its embedding", "leave it out")]
    parts = [name for name in (module_names(tuning, shape) or ()) if name in (EMBEDDING, HEAD)] if tuning.kind.adapters else []
    if tuning.untie or not (parts or tuning.kind is TuningKind.head):
        return []
    what = f"tuning.modules=[{','.join(parts)}]" if parts else "tuning=head"
    problem = f"{what}: this model ties its head to its embedding, so that training the one trains the other"
    remedy = "add tuning.untie=true (the head becomes a copy of its own, and the export says so), or use tuning=lora alone"
    return [Fault("tuning", problem, remedy)]


def quant_of(tuning: TuningConf) -> str:
    """The format that the linear layers of the blocks rest in, "" as they are."""
    if not tuning.kind.can_pack:
        return ""
    if tuning.quant is None:
        return Quant.nf4.value if tuning.kind is TuningKind.qlora else ""
    return tuning.quant.value


def quant_faults(tuning: TuningConf, shape: ModelShape | None) -> list[Fault]:
    """Weights that cannot be packed: nf4 takes blocks of 64, int8 whole elements of the dtype that holds them."""
    form = quant_of(tuning)
    if not form or shape is None or not shape.known:
        return []
    odd = [p for p in quantised(parameters(shape), form) if p.quant and p.numel % DIVISOR[form]]
    if not odd:
        return []
    size = " × ".join(str(n) for n in odd[0].shape)
    problem = f"{odd[0].name} has {size} weights, which {form} cannot divide into blocks of {DIVISOR[form]}"
    return [Fault("tuning", problem, "use tuning=lora or no tuning.quant, or a model whose layers divide")]


def dora_faults(tuning: TuningConf, tensor: int, offload: OffloadConf) -> list[Fault]:
    """DoRA where the weight whose rows it measures cannot be seen whole."""
    if not tuning.dora or not tuning.kind.adapters:
        return []
    faults = []
    if tuning.kind is TuningKind.qlora:
        problem = "tuning.dora=true with tuning=qlora: PEFT measures the rows of the base's weight, and finds packed bits"
        faults.append(Fault("tuning.dora", problem, "use tuning=lora, or leave it out"))
    if tensor > 1:
        problem = f"tuning.dora=true with tensor={tensor}: the rows that PEFT measures are parts of rows there"
        faults.append(Fault("tuning.dora", problem, "use fsdp=full_shard tensor=none, or leave it out"))
    if OffloadHome.nvme in (offload.optimizer_home, offload.parameters_home):
        problem = "tuning.dora=true with weights or states on NVMe has not been tried"
        faults.append(Fault("tuning.dora", problem, "use offload=cpu, or leave it out"))
    return faults


def export_faults(merge: bool, kind: TuningKind) -> list[Fault]:
    """Merging adapters that are not there."""
    if not merge or kind.adapters:
        return []
    return [Fault("export.merge", f"tuning={kind.value} has no adapters to fold in", "leave it out, or add tuning=lora")]


def eval_faults(every: int, fraction: float) -> list[Fault]:
    """Evaluation without anything held out."""
    if every == 0 or fraction > 0:
        return []
    problem = f"eval.every={every}, but data.eval_fraction=0 holds out no samples"
    return [Fault("eval.every", problem, "add data.eval_fraction=0.05, or set eval.every=0")]
