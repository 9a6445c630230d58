"""Which model a config means, and its dimensions: from the group file, a local folder or the hub."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
import socket
import textwrap
import typing
import urllib.parse
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from orchestrator.config.schema import ModelConf
from orchestrator.errors import Fault
from orchestrator.spec import Model, ModelShape

DIMENSIONS = tuple(f.name for f in dataclasses.fields(ModelShape))
"""The keys of `model` that a published model decides."""

RANDOM = "random"
"""The value of model.path that asks for random weights."""

SPELLINGS: dict[str, tuple[str, ...]] = {
    "vocab_size": ("vocab_size",),
    "hidden_size": ("hidden_size", "n_embd", "d_model", "dim"),
    "intermediate_size": ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "d_ff"),
    "num_hidden_layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "num_attention_heads": ("num_attention_heads", "n_head", "n_heads"),
    "num_key_value_heads": ("num_key_value_heads", "num_kv_heads", "n_head_kv"),
    "max_position_embeddings": ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length", "n_ctx"),
    "rms_norm_eps": ("rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps", "norm_eps"),
}
"""How config.json files of different families name one dimension (the attribute_map of each transformers config)."""

FAMILY_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"num_key_value_heads": 8, "max_position_embeddings": 131072},
    "qwen2": {"num_key_value_heads": 32, "max_position_embeddings": 32768},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128, "max_position_embeddings": 32768},
    "gemma": {"num_key_value_heads": 16, "head_dim": 256, "tie_word_embeddings": True, "max_position_embeddings": 8192},
}
"""What a config.json may leave out, by family (configuration_<family>.py of transformers 5.23)."""

HUB_ID = re.compile(r"[\w][\w.-]*(/[\w.-]+)?")


def _first(config: Mapping[str, Any], dimension: str, default: Any = None) -> Any:
    for name in SPELLINGS.get(dimension, (dimension,)):
        if config.get(name) is not None:
            return config[name]
    return default


def shape_of(config: Mapping[str, Any]) -> ModelShape | None:
    """The shape that a Hugging Face `config.json` describes; None where a dimension cannot be told from it."""
    if "vocab_size" not in config and isinstance(config.get("text_config"), Mapping):
        config = config["text_config"]
    family = str(config.get("model_type", ""))
    merged = {**FAMILY_DEFAULTS.get(family, {}), **{name: value for name, value in config.items() if value is not None}}
    hidden, heads = _first(merged, "hidden_size"), _first(merged, "num_attention_heads")
    layers, vocabulary = _first(merged, "num_hidden_layers"), _first(merged, "vocab_size")
    if not all(isinstance(n, int) and n > 0 for n in (hidden, heads, layers, vocabulary)):
        return None
    rope = merged.get("rope_parameters") or merged.get("rope_scaling") or {}
    theta = merged.get("rope_theta") or (rope.get("rope_theta") if isinstance(rope, Mapping) else None) or 10_000.0
    return ModelShape(
        model_type=family,
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=_first(merged, "intermediate_size", 4 * hidden),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=_first(merged, "num_key_value_heads", heads),
        head_dim=merged.get("head_dim", hidden // heads),
        max_position_embeddings=_first(merged, "max_position_embeddings", 0),
        # Until version 5 transformers tied by default and left the key out of such a file; the known families do not.
        tie_word_embeddings=bool(merged.get("tie_word_embeddings", family not in FAMILY_DEFAULTS)),
        rms_norm_eps=float(_first(merged, "rms_norm_eps", 1e-6)),
        rope_theta=float(theta),
        attention_bias=bool(merged.get("attention_bias", False)),
    )


def _parse(file: Path, field: str) -> Mapping[str, Any] | Fault:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        return Fault(field, f"{file} is not readable JSON ({error})", "download the model again, or write the file anew")
    if not isinstance(config, dict):
        return Fault(field, f"{file} holds {type(config).__name__}, not an object", "give the folder of a Hugging Face model")
    return config


def _from_folder(path: Path) -> Mapping[str, Any] | Fault:
    if path.is_file():
        return Fault("model.path", f"{path} is a file", f"give the folder that holds it: model.path={path.parent}")
    if not (path / "config.json").is_file():
        seen = ", ".join(sorted(p.name for p in path.iterdir())[:5]) or "nothing"
        remedy = "give the folder that save_pretrained wrote: config.json and *.safetensors"
        return Fault("model.path", f"{path} has no config.json (it holds {seen})", remedy)
    return _parse(path / "config.json", "model.path")


def _unreachable(endpoint: str) -> bool:
    """Whether the name of the hub cannot be resolved; the hub client would retry that for some 20 seconds.

    Behind a proxy names are resolved elsewhere, so nothing can be told.
    """
    if urllib.request.getproxies():
        return False
    try:
        socket.getaddrinfo(urllib.parse.urlsplit(endpoint).hostname, None)
    except OSError:
        return True
    return False


def _from_hub(hub_id: str) -> Mapping[str, Any] | Fault:
    """The config.json of a hub model, from the local cache or the network."""
    from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache

    try:
        file = try_to_load_from_cache(hub_id, "config.json")
        if not isinstance(file, str):
            if not constants.HF_HUB_OFFLINE and _unreachable(constants.ENDPOINT):
                raise OSError(f"{constants.ENDPOINT} cannot be reached")
            file = hf_hub_download(hub_id, "config.json", etag_timeout=5)
    except (OSError, ValueError, RuntimeError) as error:
        # The hub client's errors (offline, gated, unknown id) all derive from these three; their first line tells which.
        reason = textwrap.shorten((str(error).strip() or type(error).__name__).splitlines()[0], 160)
        problem = f"there is no folder {hub_id!r} here, and its config.json cannot be had from the hub: {reason}"
        return Fault("model.path", problem, "give a local folder, choose a model group (model=...), or go online")
    return _parse(Path(file), "model.path")


def _published(hub_id: str, conf_dir: Path) -> ModelShape | None:
    """The dimensions of a hub id that one of the model groups already states."""
    for path in sorted((conf_dir / "model").glob("*.yaml")):
        group = yaml.safe_load(path.read_text(encoding="utf-8"))
        if group.get("hub_id") == hub_id:
            return shape_of(group)
    return None


def _brings_code(config: Mapping[str, Any]) -> bool:
    """Whether the model needs Python code of its own: it names some, and transformers has no folder for its family."""
    if "AutoModelForCausalLM" not in (config.get("auto_map") or {}):
        return False
    library = importlib.util.find_spec("transformers")
    roots = list(library.submodule_search_locations or ()) if library else []
    folder = str(config.get("model_type", "")).replace("-", "_")
    return not any((Path(root) / "models" / folder).is_dir() for root in roots)


def _stated(conf: ModelConf) -> ModelShape:
    return ModelShape(**{name: getattr(conf, name) for name in DIMENSIONS})


def _kind_faults(path: str, config: Mapping[str, Any]) -> list[Fault]:
    """A fault for the dimensions in a config.json that are no numbers, or words where words should be."""
    kinds = typing.get_type_hints(ModelShape)
    wrong = []
    for name, kind in kinds.items():
        value = _first(config, name)
        allowed = (int, float) if kind is float else kind
        if value is not None and (not isinstance(value, allowed) or (kind is int and isinstance(value, bool))):
            wrong.append(f"{name} is {str(value)[:40]!r}")
    if not wrong:
        return []
    problem = f"the config.json of {path} cannot be meant: {', '.join(wrong)}"
    return [Fault("model.path", problem, "download the model again, or mend that file")]


def _located(conf: ModelConf, name: str, path: str, config: Mapping[str, Any]) -> tuple[Model, list[Fault]]:
    wrong = _kind_faults(path, config)
    if wrong:
        return Model(name=name, path=path, trust_remote_code=conf.trust_remote_code, shape=None), wrong
    model = Model(name=name, path=path, trust_remote_code=conf.trust_remote_code, shape=shape_of(config))
    if _brings_code(config) and not conf.trust_remote_code:
        problem = f"{path} ({config.get('model_type')}) needs Python code of its own, which is not run unless you say so"
        return model, [Fault("model.trust_remote_code", problem, "read that code, then add model.trust_remote_code=true")]
    return model, []


def resolve_model(conf: ModelConf, stated: tuple[str, ...], conf_dir: Path) -> tuple[Model, list[Fault]]:
    """The model that `conf` means, and what is wrong with it.

    `stated` are the dimensions that the user has set by hand: they describe random weights only. A hub id that one of
    the groups states, or the group's own, needs no network here; the weights are fetched when the run loads them.
    """
    random = conf.path == RANDOM or (conf.path is None and conf.hub_id is None)
    if random:
        return Model(name=conf.name, path=None, trust_remote_code=conf.trust_remote_code, shape=_stated(conf)), []
    path = conf.path or str(conf.hub_id)
    faults = []
    if stated:
        names = ", ".join(f"model.{name}" for name in stated)
        faults = [Fault(names, f"the weights of {path} decide the dimensions", "leave it out, or add model.path=random")]
    if path == conf.hub_id:
        return Model(name=conf.name, path=path, trust_remote_code=conf.trust_remote_code, shape=_stated(conf)), faults
    nothing = Model(name=Path(path).name or "model", path=path, trust_remote_code=conf.trust_remote_code, shape=None)
    folder = Path(path).expanduser()
    if folder.exists():
        config = _from_folder(folder)
        if isinstance(config, Fault):
            return nothing, [*faults, config]
        model, more = _located(conf, folder.resolve().name, str(folder), config)
        return model, faults + more
    if not HUB_ID.fullmatch(path):
        remedy = "give a Hugging Face folder (config.json and *.safetensors), a hub id such as Qwen/Qwen2.5-0.5B, or random"
        return nothing, [*faults, Fault("model.path", f"there is no folder {path}", remedy)]
    shape = _published(path, conf_dir)
    if shape is not None:
        return dataclasses.replace(nothing, shape=shape), faults
    config = _from_hub(path)
    if isinstance(config, Fault):
        return nothing, [*faults, config]
    model, more = _located(conf, nothing.name, path, config)
    return model, faults + more
