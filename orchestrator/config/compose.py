"""compose: overrides in, one frozen RunSpec out. The typed boundary: no DictConfig lives past it."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from orchestrator import spec
from orchestrator.config import checks, computing, divisions
from orchestrator.config.catalog import CONF_DIR
from orchestrator.config.health import build_health, health_faults
from orchestrator.config.idle import idle_faults
from orchestrator.config.optimizer import build_optimizer, optimizer_faults
from orchestrator.config.overrides import REFERENCE, check_overrides, composition_fault, reference_fault
from orchestrator.config.ranges import path_faults, range_faults
from orchestrator.config.schema import ClusterConf, Compute, DataConf, Quant, RootConf, TuningConf, TuningKind
from orchestrator.config.shapes import DIMENSIONS, resolve_model
from orchestrator.config.strategy import buckets, build_strategy, homes, largest_part, require_strategy, see_disk, shard_size
from orchestrator.errors import ConfigError, Fault
from orchestrator.units import GIB, MIB

Local = Callable[[int | None], spec.Cluster]
"""Describes the machine at hand for a number of ranks (None: one for each card, or one on a machine without)."""

TINY = "tiny"

BASIC = (
    "batch.", "zero.", "fsdp.", "tensor.", "cluster", "offload.", "optimizer.betas", *(f"model.{name}" for name in DIMENSIONS)
)  # fmt: skip
"""Fields of faults that other checks would trip over."""

# The root alone: it types every group file, and a schema for each group would show up as one more choice.
ConfigStore.instance().store(name="schema", node=RootConf)


def compose_conf(overrides: Sequence[str], conf_dir: Path = CONF_DIR) -> RootConf:
    """The merged config as typed dataclasses, single values still unchecked.

    Raises:
        ConfigError: Hydra cannot compose it.
    """
    try:
        with initialize_config_dir(str(conf_dir.resolve()), job_name="orchestrator", version_base="1.3"):
            merged = hydra_compose("config", overrides=list(overrides))
        computed = _references(OmegaConf.to_container(merged))
        if computed:
            raise ConfigError([reference_fault(path) for path in computed])
        return cast(RootConf, OmegaConf.to_object(merged))
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(composition_fault(error, conf_dir)) from error


def _references(values: Any, path: str = "") -> list[str]:
    """The dotted paths of all values that OmegaConf would compute."""
    if isinstance(values, dict | list):
        items = values.items() if isinstance(values, dict) else enumerate(values)
        return [found for name, value in items for found in _references(value, f"{path}.{name}" if path else str(name))]
    return [path] if isinstance(values, str) and REFERENCE in values else []


def _host(ranks: int | None) -> spec.Cluster:
    """This machine as `ranks` shares of its memory, from the standard library alone; `cluster.local` knows its cards."""
    count = ranks or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    card = spec.Card("cpu", memory // count, half_tflops=0.0, memory_gb_per_s=0.0, link_gb_per_s=0.0, bf16=True, source="host")
    return spec.Cluster("local", nodes=1, cards_per_node=count, card=card, host_bytes=memory)


def build_cluster(conf: ClusterConf, ranks: int | None, local: Local | None) -> spec.Cluster:
    """The cluster that `conf` names; "local" is the machine at hand, seen through `local`."""
    if conf.name == "local":
        found = (local or _host)(ranks or conf.nodes * conf.cards_per_node or None)
        return replace(found, nvme_bytes=int(conf.nvme_gib * GIB), nvme_gb_per_s=conf.nvme_gb_per_s)
    host_bytes = int(conf.host_gib * GIB)
    # A rank without a card computes in its share of the machine's memory.
    memory = host_bytes // conf.cards_per_node if conf.card.name == "cpu" else conf.card.memory_mib * MIB
    card = spec.Card(
        name=conf.card.name,
        memory_bytes=memory,
        half_tflops=conf.card.half_tflops,
        memory_gb_per_s=conf.card.memory_gb_per_s,
        link_gb_per_s=conf.card.link_gb_per_s,
        bf16=conf.card.bf16,
        source=conf.card.source,
    )
    return spec.Cluster(
        conf.name, conf.nodes, conf.cards_per_node, card, host_bytes, int(conf.nvme_gib * GIB), conf.nvme_gb_per_s
    )


def choose_precision(compute: Compute, card: spec.Card) -> str:
    """The number format: where it is "auto", bf16 if the card has it, else fp16, and fp32 on a CPU, where halves are slow."""
    if compute is not Compute.auto:
        return str(compute.value)
    if card.name == "cpu":
        return "fp32"
    return "bf16" if card.bf16 else "fp16"


def _tiny(model: spec.Model) -> bool:
    return model.name == TINY and model.path is None


def choose_micro(micro: int | None, share: int, tiny: bool) -> int:
    """Samples in one forward: as given, else the largest divisor of `share` up to 8 for the tiny model, else 1."""
    if micro is not None:
        return micro
    most = 8 if tiny else 1
    return next(size for size in range(min(most, share), 0, -1) if share % size == 0)


def choose_seq_len(data: DataConf, shape: spec.ModelShape | None) -> int:
    """Tokens of the longest sample: as given, else 256 for the built-in sample and 2048 for files, within the model's limit."""
    if data.seq_len is not None:
        return data.seq_len
    wanted = 256 if data.path is None and not data.sources else 2048
    limit = shape.max_position_embeddings if shape is not None else 0
    return min(wanted, limit) if limit > 0 else wanted


def _home(path: str | None) -> str | None:
    """`path` with a leading ~ resolved: no shell does it behind "key="."""
    return path if path is None else str(Path(path).expanduser())


def _tuning(conf: TuningConf, shape: spec.ModelShape | None) -> spec.Tuning:
    quant = checks.quant_of(conf)
    packed: dict[str, Any] = {"quant": quant, "double_quant": conf.double_quant and quant == Quant.nf4.value}
    if conf.kind in (TuningKind.full, TuningKind.head):
        return spec.Tuning(conf.kind.value, untie=checks.untied(conf), **(packed if quant else {}))
    targets = spec.expand_targets(checks.target_names(conf) or ())
    tuning = spec.Tuning(
        conf.kind.value, rank=conf.rank, alpha=conf.alpha, dropout=conf.dropout, targets=targets,
        modules=checks.module_names(conf, shape) or (), untie=checks.untied(conf), rslora=conf.rslora, dora=conf.dora,
    )  # fmt: skip
    return replace(tuning, **packed) if quant else tuning


def _data(conf: DataConf, seq_len: int) -> spec.Data:
    return spec.Data(
        path=_home(conf.path),
        seq_len=seq_len,
        format=conf.format.value,
        tokenizer=_home(conf.tokenizer),
        chat_template=_home(conf.chat_template),
        eval_fraction=conf.eval_fraction,
        on_malformed=conf.on_malformed.value,
        on_long=conf.on_long.value,
        cache_dir=_home(conf.cache_dir),
        packing=conf.packing.value,
        sources=tuple(spec.Source(_home(each.path) or "", each.weight, each.format.value) for each in conf.sources),
        split=conf.split,
        subset=conf.subset,
        streaming=conf.streaming,
        max_rows=conf.max_rows,
        workers=conf.workers,
    )


def _agreement_faults(conf: RootConf, ranks: int, cluster: spec.Cluster, model: spec.Model, strict: bool) -> list[Fault]:
    """The faults between keys, `strict` also where no strategy is named."""
    tensor = conf.tensor.size if ranks % conf.tensor.size == 0 else 1
    size = shard_size(conf.fsdp, ranks, cluster, tensor)
    return [
        *checks.engine_faults(conf.zero, conf.fsdp),
        *divisions.tensor_faults(conf.tensor, conf.zero, ranks, cluster),
        *divisions.width_faults(conf.tensor, model.shape),
        *divisions.company_faults(conf.tensor, conf.tuning, conf.loss, conf.optimizer),
        *divisions.pipeline_faults(conf.pipeline),
        *checks.offload_faults(conf.zero, conf.fsdp, conf.offload),
        *checks.swap_faults(
            conf.zero,
            conf.offload,
            ranks,
            largest_part(model.shape, ranks),
            buckets(conf.zero, model.shape).persistence,
            choose_precision(conf.precision.compute, cluster.card),
        ),
        *checks.swapped_run_faults(
            conf.offload, conf.optimizer.name.value, bool(checks.quant_of(conf.tuning)), conf.checkpoint.background
        ),
        *checks.pin_faults(conf.offload, cluster),
        *checks.rank_faults(ranks, cluster),
        *checks.shard_faults(conf.fsdp, ranks // tensor, size),
        *(require_strategy(conf.zero, conf.fsdp, conf.tensor, ranks) if strict else []),
        *checks.batch_faults(conf.batch.global_size, conf.batch.micro, ranks // tensor),
        *checks.precision_faults(choose_precision(conf.precision.compute, cluster.card), conf.zero, cluster),
        *checks.length_faults(choose_seq_len(conf.data, model.shape), model.shape),
        *checks.shape_faults(model.shape),
        *checks.family_faults(model.shape, model.path is None),
        *checks.target_faults(conf.tuning, model.shape),
        *checks.quant_faults(conf.tuning, model.shape),
        *checks.module_faults(conf.tuning, model.shape),
        *checks.dora_faults(conf.tuning, tensor, conf.offload),
        *checks.tie_faults(conf.tuning, model.shape),
        *computing.loss_faults(conf.loss, cluster, model),
        *computing.recompute_faults(conf.recompute, tensor),
        *computing.compile_faults(conf, cluster),
        *optimizer_faults(conf.optimizer.name, conf.zero, conf.offload.optimizer, cluster),
        *computing.attention_faults(
            conf.attention, cluster, choose_precision(conf.precision.compute, cluster.card), conf.data.packing.value
        ),
        *checks.export_faults(conf.export.merge, conf.tuning.kind),
        *checks.eval_faults(conf.eval.every, conf.data.eval_fraction),
        *health_faults(conf.health, conf.checkpoint.every, conf.batch.micro, spec.Home.NVME in homes(conf.offload)),
    ]


def build_spec(conf: RootConf, ranks: int, cluster: spec.Cluster, model: spec.Model) -> spec.RunSpec:
    """The frozen spec of a config without faults."""
    strategy = build_strategy(conf, ranks, cluster, model.shape)
    if strategy.gradients == choose_precision(conf.precision.compute, cluster.card):
        strategy = replace(strategy, gradients=None)
    cluster = see_disk(cluster, strategy.nvme)
    if checks.untied(conf.tuning) and model.shape is not None:
        model = replace(model, shape=replace(model.shape, tie_word_embeddings=False))
    share = conf.batch.global_size // strategy.dp
    micro = choose_micro(conf.batch.micro, share, _tiny(model))
    return spec.RunSpec(
        run=spec.Run(_home(conf.run.dir), conf.run.steps, conf.run.epochs, conf.run.timeout),
        seed=conf.seed,
        model=model,
        tuning=_tuning(conf.tuning, model.shape),
        strategy=strategy,
        batch=spec.Batch(conf.batch.global_size, micro, share // micro),
        data=_data(conf.data, choose_seq_len(conf.data, model.shape)),
        optimizer=build_optimizer(conf, _tiny(model)),
        schedule=spec.Schedule(conf.schedule.kind.value, conf.schedule.warmup, conf.schedule.min_ratio),
        recompute=conf.recompute.kind.value,
        precision=spec.Precision(choose_precision(conf.precision.compute, cluster.card)),
        cluster=cluster,
        checkpoint=spec.Checkpoint(conf.checkpoint.every, conf.checkpoint.keep, conf.checkpoint.background),
        resume=_home(conf.resume) or conf.resume,
        eval=spec.Evaluation(conf.eval.every),
        export=spec.Export(conf.export.format.value, conf.export.merge),
        logging=spec.Logging(conf.logging.every, conf.logger.tracker.value),
        plan=spec.Planning(conf.plan.on_misfit.value),
        health=build_health(conf.health),
        loss=computing.build_loss(conf.loss, model),
        recompute_every=conf.recompute.every,
        attention=conf.attention.kind.value,
        compile=conf.compile.kind.value,
    )


def compose(
    overrides: Sequence[str],
    *,
    ranks: int | None = None,
    config_dir: Path | None = None,
    local: Local | None = None,
    strict: bool = True,
) -> spec.RunSpec:
    """The resolved run that `overrides` ask for, every null filled in and every agreement checked.

    `ranks` is the number of processes that really run; None: one for each card of the cluster. `config_dir` replaces
    the project's conf/. `local` describes the machine at hand where the cluster is "local". `strict` False lets several
    ranks pass without zero or fsdp, for a planner that chooses.

    Raises:
        ConfigError: with all faults. Misspelt overrides hide the faults between keys, which could be their consequence.
    """
    conf_dir = config_dir or CONF_DIR
    good, stated, misspelt = check_overrides(overrides, conf_dir)
    conf = _composed_beside(good, conf_dir, misspelt)
    return resolve(conf, stated, misspelt, ranks=ranks, conf_dir=conf_dir, local=local, strict=strict)


def resolve(
    conf: RootConf,
    stated: frozenset[str],
    misspelt: Sequence[Fault] = (),
    *,
    ranks: int | None = None,
    conf_dir: Path = CONF_DIR,
    local: Local | None = None,
    strict: bool = True,
) -> spec.RunSpec:
    """The run that a merged config means, of which the keys and groups `stated` were typed: what `compose` does once Hydra is
    done.

    Raises:
        ConfigError: with all faults, those of `misspelt` words first.
    """
    dimensions = tuple(name for name in DIMENSIONS if f"model.{name}" in stated)
    model, model_faults = resolve_model(conf.model, dimensions, conf_dir)
    single = [*range_faults(conf), *checks.cluster_faults(conf.cluster), *path_faults(conf), *model_faults]
    if misspelt:
        raise ConfigError([*misspelt, *single])
    # A number that is impossible by itself would only echo in the checks that follow.
    if any(fault.field.startswith(BASIC) for fault in single):
        raise ConfigError(single)
    cluster = build_cluster(conf.cluster, ranks, local)
    count = ranks if ranks is not None else cluster.cards
    faults = [
        *single,
        *job_faults(stated, ranks),
        *idle_faults(conf, stated),
        *_agreement_faults(conf, count, cluster, model, strict),
    ]
    if faults:
        raise ConfigError(faults)
    return build_spec(conf, count, cluster, model)


def job_faults(stated: frozenset[str], ranks: int | None) -> list[Fault]:
    """The fault of words about a job in a run that starts here and now, as `ranks` processes (None: it is only looked at)."""
    words = sorted(name for name in stated if name.partition(".")[0] in ("slurm", "kubernetes"))
    if not words or ranks is None:
        return []
    remedy = "launch/submit.py takes the same words; or leave them out"
    return [Fault(", ".join(words), "this command starts the run here, not as a job", remedy)]


def _composed_beside(good: Sequence[str], conf_dir: Path, misspelt: Sequence[Fault]) -> RootConf:
    try:
        return compose_conf(good, conf_dir)
    except ConfigError as error:
        raise ConfigError([*misspelt, *error.faults]) from error
