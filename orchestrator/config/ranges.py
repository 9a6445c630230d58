"""What each key may be by itself: a table of rules, and the paths that must exist."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from orchestrator.config.catalog import Key, keys
from orchestrator.config.schema import DataConf, DataSource, RootConf
from orchestrator.errors import Fault

Rule = tuple[str, Callable[[Any], bool], str]


def _at_least(least: float) -> Callable[[Any], bool]:
    return lambda value: value is None or value >= least


def _upto(most: int) -> tuple[Callable[[Any], bool], str]:
    """From 1 to `most`: what is counted one by one, or allotted, before anything else could refuse it."""
    return lambda value: value is None or 1 <= value <= most, f"must be at least 1 and at most {most:,}"


def _positive(value: Any) -> bool:
    return value is None or value > 0


RULES: tuple[Rule, ...] = (
    ("run.steps", _at_least(1), "must be at least 1"),
    ("run.epochs", _at_least(1), "must be at least 1"),
    ("run.timeout", lambda value: value == 0 or value >= 10, "must be at least 10 seconds, or 0 for none"),
    ("seed", lambda value: 0 <= value < 2**32, "must be from 0 to 4294967295"),
    ("batch.global_size", *_upto(100_000_000)),
    ("batch.micro", *_upto(1_000_000)),
    (
        "data.seq_len",
        lambda value: value is None or 2 <= value <= 100_000_000,
        "must be from 2 (a token is predicted from the one before) to 100,000,000",
    ),
    ("data.max_rows", _at_least(1), "must be at least 1"),
    ("data.workers", lambda value: value is None or 0 <= value <= 1024, "must be from 0 (this process alone) to 1024"),
    ("data.eval_fraction", lambda value: 0 <= value < 1, "must be at least 0 and below 1"),
    ("tuning.rank", *_upto(65_536)),
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
    ("offload.buffer_count", *_upto(100_000)),
    ("offload.buffer_size", _at_least(1), "must be at least 1 element"),
    (
        "offload.aio.block_size",
        lambda value: value > 0 and value % 4096 == 0,
        "must be a multiple of 4096: the disk is read past the kernel's cache",
    ),
    ("offload.aio.queue_depth", *_upto(65_536)),
    ("offload.aio.threads", *_upto(256)),
    ("fsdp.shard_size", *_upto(65_536)),
    ("tensor.size", *_upto(4_096)),
    ("pipeline.stages", *_upto(4_096)),
    ("checkpoint.every", _at_least(0), "must be at least 0 (0: only at the end)"),
    ("checkpoint.keep", _at_least(1), "must be at least 1: the run needs its last checkpoint"),
    ("recompute.every", _at_least(2), "must be at least 2: with 1 it is recompute=full"),
    ("loss.chunk", _at_least(1), "must be at least 1"),
    ("eval.every", _at_least(0), "must be at least 0 (0: none)"),
    ("health.nonfinite_limit", _at_least(1), "must be at least 1"),
    ("health.spike_window", _at_least(8), "must be at least 8: fewer losses do not say what is usual"),
    ("health.spike_deviations", _positive, "must be above 0"),
    ("health.spike_limit", _at_least(1), "must be at least 1"),
    ("logging.every", _at_least(1), "must be at least 1"),
    ("model.vocab_size", *_upto(10_000_000)),
    ("model.hidden_size", *_upto(1_000_000)),
    ("model.intermediate_size", *_upto(10_000_000)),
    ("model.num_hidden_layers", *_upto(1_000)),
    ("model.num_attention_heads", *_upto(4_096)),
    ("model.num_key_value_heads", *_upto(4_096)),
    (
        "model.head_dim",
        lambda value: 0 < value <= 65_536 and value % 2 == 0,
        "must be from 2 to 65,536 and even: rotary embeddings turn pairs",
    ),
    ("model.max_position_embeddings", _positive, "must be above 0"),
    ("model.rope_theta", _positive, "must be above 0"),
    ("cluster.nodes", *_upto(10_000)),
    ("cluster.cards_per_node", lambda value: 0 <= value <= 64, "must be from 0 to 64"),
    ("cluster.card.memory_mib", _at_least(0), "must be at least 0"),
    ("cluster.card.half_tflops", _at_least(0), "must be at least 0"),
    ("cluster.card.memory_gb_per_s", _at_least(0), "must be at least 0"),
    ("cluster.card.link_gb_per_s", _at_least(0), "must be at least 0"),
    ("cluster.host_gib", _at_least(0), "must be at least 0"),
    ("cluster.nvme_gib", _at_least(0), "must be at least 0"),
    ("cluster.nvme_gb_per_s", _at_least(0), "must be at least 0"),
)


LARGEST = 2**53
"""Beyond it counts are no longer whole in a float, and nothing here is that large."""


def _numbers(value: Any) -> list[Any]:
    """The numbers in a value of the schema; those of a list singly."""
    if isinstance(value, list):
        return [number for each in value for number in _numbers(each)]
    return [value] if isinstance(value, int | float) else []


def _absurd(value: Any) -> str:
    """What no key may be, or nothing."""
    if any(isinstance(number, float) and not math.isfinite(number) for number in _numbers(value)):
        return "must be a finite number"
    return "must be smaller: at most 9e15" if any(abs(number) > LARGEST for number in _numbers(value)) else ""


def _remedy(key: Key) -> str:
    """What the key means, and what it is where nobody sets it."""
    unit = f", in {key.unit}" if key.unit else ""
    return f"left out, it is {'null' if key.default is None else key.default}; it says: {key.description}{unit}"


def range_faults(conf: RootConf) -> list[Fault]:
    """A fault for each number that is absurd, and for each rule that a value of `conf` breaks."""
    known = keys()
    values = {path: functools.reduce(getattr, path.split("."), conf) for path in known}
    faults = {path: rule for path, value in values.items() if (rule := _absurd(value))}
    for path, allowed, rule in RULES:
        if path not in faults and not allowed(values[path]):
            faults[path] = rule
    return [Fault(path, f"{path}={str(values[path])[:60]} {rule}", _remedy(known[path])) for path, rule in faults.items()]


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
