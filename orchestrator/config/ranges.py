"""What each key may be by itself: a table of rules, and the paths that must exist."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from orchestrator.config.schema import DataConf, DataSource, RootConf
from orchestrator.errors import Fault

Rule = tuple[str, Callable[[Any], bool], str]


def _at_least(least: float) -> Callable[[Any], bool]:
    return lambda value: value is None or value >= least


def _positive(value: Any) -> bool:
    return value is None or value > 0


RULES: tuple[Rule, ...] = (
    ("run.steps", _at_least(1), "must be at least 1"),
    ("run.epochs", _at_least(1), "must be at least 1"),
    ("run.timeout", lambda value: value == 0 or value >= 10, "must be at least 10 seconds, or 0 for none"),
    ("seed", lambda value: 0 <= value < 2**32, "must be from 0 to 4294967295"),
    ("batch.global_size", _at_least(1), "must be at least 1"),
    ("batch.micro", _at_least(1), "must be at least 1"),
    ("data.seq_len", _at_least(2), "must be at least 2: a token is predicted from the one before"),
    ("data.max_rows", _at_least(1), "must be at least 1"),
    ("data.workers", _at_least(0), "must be at least 0 (0: this process alone)"),
    ("data.eval_fraction", lambda value: 0 <= value < 1, "must be at least 0 and below 1"),
    ("tuning.rank", _at_least(1), "must be at least 1"),
    ("tuning.alpha", _at_least(1), "must be at least 1"),
    ("tuning.dropout", lambda value: 0 <= value < 1, "must be at least 0 and below 1"),
    ("optimizer.lr", _positive, "must be above 0"),
    ("optimizer.eps", _positive, "must be above 0"),
    ("optimizer.weight_decay", _at_least(0), "must be at least 0"),
    ("optimizer.clip", _at_least(0), "must be at least 0 (0: no clipping)"),
    (
        "optimizer.betas",
        lambda betas: len(betas) == 2 and all(0 <= b < 1 for b in betas),
        "must be two numbers from 0 to below 1",
    ),
    ("optimizer.momentum", lambda value: 0 <= value < 1, "must be at least 0 and below 1"),
    ("optimizer.forgetting", _positive, "must be above 0"),
    ("optimizer.update_clip", _positive, "must be above 0"),
    ("schedule.warmup", _at_least(0), "must be at least 0"),
    (
        "schedule.warmup",
        lambda value: value < 1 or float(value).is_integer(),
        "must be below 1 (a share) or a whole number of steps",
    ),
    ("schedule.min_ratio", lambda value: 0 <= value <= 1, "must be from 0 to 1"),
    ("zero.stage", lambda value: value is None or 0 <= value <= 3, "must be 0, 1, 2 or 3"),
    ("zero.reduce_bucket", _at_least(1), "must be at least 1 element"),
    ("zero.allgather_bucket", _at_least(1), "must be at least 1 element"),
    ("zero.prefetch_bucket", _at_least(0), "must be at least 0 elements"),
    ("zero.persistence_threshold", _at_least(0), "must be at least 0 elements"),
    ("zero.max_live_parameters", _at_least(0), "must be at least 0 elements"),
    ("zero.max_reuse_distance", _at_least(0), "must be at least 0 elements"),
    ("zero.sub_group_size", _at_least(1), "must be at least 1 element"),
    ("offload.buffer_count", _at_least(1), "must be at least 1"),
    ("offload.buffer_size", _at_least(1), "must be at least 1 element"),
    (
        "offload.aio.block_size",
        lambda value: value > 0 and value % 4096 == 0,
        "must be a multiple of 4096: the disk is read past the kernel's cache",
    ),
    ("offload.aio.queue_depth", _at_least(1), "must be at least 1"),
    ("offload.aio.threads", _at_least(1), "must be at least 1"),
    ("fsdp.shard_size", _at_least(1), "must be at least 1"),
    ("tensor.size", _at_least(1), "must be at least 1"),
    ("pipeline.stages", _at_least(1), "must be at least 1"),
    ("checkpoint.every", _at_least(0), "must be at least 0 (0: only at the end)"),
    ("checkpoint.keep", _at_least(1), "must be at least 1: the run needs its last checkpoint"),
    ("recompute.every", _at_least(2), "must be at least 2: with 1 it is recompute=full"),
    ("loss.chunk", _at_least(1), "must be at least 1"),
    ("eval.every", _at_least(0), "must be at least 0 (0: none)"),
    ("health.nonfinite_limit", _at_least(1), "must be at least 1"),
    ("logging.every", _at_least(1), "must be at least 1"),
    ("model.vocab_size", _positive, "must be above 0"),
    ("model.hidden_size", _positive, "must be above 0"),
    ("model.intermediate_size", _positive, "must be above 0"),
    ("model.num_hidden_layers", _positive, "must be above 0"),
    ("model.num_attention_heads", _positive, "must be above 0"),
    ("model.num_key_value_heads", _positive, "must be above 0"),
    ("model.head_dim", lambda value: value > 0 and value % 2 == 0, "must be above 0 and even: rotary embeddings turn pairs"),
    ("model.max_position_embeddings", _positive, "must be above 0"),
    ("model.rope_theta", _positive, "must be above 0"),
    ("cluster.nodes", _at_least(1), "must be at least 1"),
    ("cluster.cards_per_node", _at_least(0), "must be at least 0"),
    ("cluster.host_gib", _at_least(0), "must be at least 0"),
    ("cluster.nvme_gib", _at_least(0), "must be at least 0"),
    ("cluster.nvme_gb_per_s", _at_least(0), "must be at least 0"),
)


def range_faults(conf: RootConf) -> list[Fault]:
    """A fault for each rule that a value of `conf` breaks."""
    faults = []
    for path, allowed, rule in RULES:
        value = functools.reduce(getattr, path.split("."), conf)
        if not allowed(value):
            faults.append(Fault(path, f"{path}={value} {rule}"))
    return faults


def _looks_local(path: str) -> bool:
    return path.startswith(("/", "./", "../", "~"))


KINDS = ".json, .jsonl, .parquet, .arrow or .txt"


def _missing(path: str) -> bool:
    """Whether `path` names nothing here and cannot be a pattern or the id of a hub dataset."""
    if Path(path).expanduser().exists() or any(letter in path for letter in "*?["):
        return False
    return _looks_local(path) or path.count("/") != 1 or Path(path).suffix in KINDS.replace(",", "").split()


def _data_faults(data: DataConf) -> list[Fault]:
    """Data that is named twice or not at all, is not there, or would never be shown."""
    faults = []
    if data.sources and data.path is not None:
        remedy = "name it as one of data.sources"
        faults.append(Fault("data.path, data.sources", f"{data.path} and {len(data.sources)} sources are given", remedy))
    if data.source is DataSource.local and data.path is None and not data.sources:
        remedy = f"add data.path=FILE ({KINDS}), or use data=sample"
        faults.append(Fault("data.path", "data=local needs a file, and none is given", remedy))
    for number, source in enumerate(data.sources):
        field = f"data.sources[{number}]"
        if not source.path:
            faults.append(Fault(f"{field}.path", "the source has no path", "write {path: FILE, weight: 1}"))
        elif _missing(source.path):
            faults.append(
                Fault(f"{field}.path", f"there is no file {source.path}", f"give a {KINDS} file, or a folder of them")
            )
        if source.weight <= 0:
            problem = f"weight {source.weight:g} of {source.path} would show none of its rows"
            faults.append(
                Fault(f"{field}.weight", problem, "give a weight above 0 (1: each row once an epoch), or leave it out")
            )
    if data.path is not None and _missing(data.path):
        faults.append(Fault("data.path", f"there is no file {data.path}", f"give a {KINDS} file, a folder of them or a hub id"))
    return faults


def path_faults(conf: RootConf) -> list[Fault]:
    """Faults of the paths that must exist before a run starts, the model's apart."""
    faults = []
    data = conf.data
    faults += _data_faults(data)
    if data.tokenizer is not None and _looks_local(data.tokenizer) and not Path(data.tokenizer).expanduser().exists():
        remedy = "give a folder that holds tokenizer.json, or a hub id"
        faults.append(Fault("data.tokenizer", f"there is no folder {data.tokenizer}", remedy))
    if conf.resume not in ("none", "auto") and not Path(conf.resume).expanduser().exists():
        problem = f"{conf.resume!r} is neither none nor auto, and there is no such path"
        faults.append(Fault("resume", problem, "use resume=none, resume=auto, or the folder of a run or checkpoint"))
    return faults
