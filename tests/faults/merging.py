"""Choices and keys set in a config without Hydra, which takes thirty times as long: for sweeps of thousands."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import is_dataclass
from enum import Enum
from typing import Any

import yaml
from omegaconf import OmegaConf

from orchestrator.config.catalog import CONF_DIR, Key
from orchestrator.config.schema import RootConf


def at(conf: Any, path: str) -> Any:
    """The value at a dotted path."""
    for name in path.split("."):
        conf = getattr(conf, name)
    return conf


def put(conf: Any, path: str, value: Any) -> None:
    """Set a key of the config, words of an Enum as its member."""
    *sections, name = path.split(".")
    section = at(conf, ".".join(sections)) if sections else conf
    old = getattr(section, name)
    setattr(section, name, type(old)[value] if isinstance(old, Enum) and isinstance(value, str) else value)


def _merge(conf: Any, values: Mapping[str, Any], path: str) -> None:
    for name, value in values.items():
        inner = f"{path}.{name}"
        if is_dataclass(at(conf, inner)):
            _merge(conf, value, inner)
        else:
            put(conf, inner, value)


def choose(conf: RootConf, word: str) -> None:
    """What `group=choice` does, for a group whose files hold values of its own section alone."""
    group, _, name = word.partition("=")
    _merge(conf, yaml.safe_load((CONF_DIR / group / f"{name}.yaml").read_text()) or {}, group)


def typed(key: Key, value: Any) -> Any:
    """`value` as the schema's type of `key` makes it.

    Raises:
        OmegaConfBaseException: it cannot.
    """
    name = key.path.rpartition(".")[2]
    section = OmegaConf.structured(key.owner)
    OmegaConf.update(section, name, value)
    return getattr(OmegaConf.to_object(section), name)
