"""What can be typed: the groups and choices that lie in conf/, and the keys of the schema. No Hydra."""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from orchestrator.config.schema import RootConf

CONF_DIR = Path(__file__).resolve().parents[2] / "conf"
"""The folder of group files that comes with the project."""


@dataclass(frozen=True, slots=True)
class Choice:
    """One file of a group, and the first line of it: what it does and what it costs."""

    name: str
    summary: str


@dataclass(frozen=True, slots=True)
class Key:
    """One typed key of the schema, with its dotted `path` and the dataclass that it is a field of."""

    path: str
    owner: type
    default: Any
    description: str
    unit: str
    options: tuple[str, ...] = ()


def _summary(path: Path) -> str:
    """The first comment that is not Hydra's own ("# @package …")."""
    with path.open(encoding="utf-8", errors="replace") as lines:
        first = next((line for line in lines if not line.startswith("# @")), "")
    return first.lstrip("# ").strip() if first.startswith("#") else ""


def groups(conf_dir: Path = CONF_DIR) -> dict[str, tuple[Choice, ...]]:
    """Choices by group name, "cluster/card" for a nested group; both sorted by name."""
    found: dict[str, list[Choice]] = {}
    for path in sorted(conf_dir.rglob("*.yaml")):
        group = path.parent.relative_to(conf_dir).as_posix()
        if group != ".":
            found.setdefault(group, []).append(Choice(path.stem, _summary(path)))
    return {group: tuple(choices) for group, choices in sorted(found.items())}


def _walk(kind: type, prefix: str) -> Iterator[Key]:
    hints = typing.get_type_hints(kind)
    for item in dataclasses.fields(kind):
        path, hint = f"{prefix}{item.name}", hints[item.name]
        if dataclasses.is_dataclass(hint):
            yield from _walk(typing.cast(type, hint), f"{path}.")
            continue
        default = item.default if item.default is not dataclasses.MISSING else typing.cast(Any, item.default_factory)()
        options: tuple[str, ...] = ()
        if isinstance(hint, type) and issubclass(hint, Enum):
            options, default = tuple(member.name for member in hint), default.name
        yield Key(path, kind, default, item.metadata["help"], item.metadata["unit"], options)


@functools.cache
def keys() -> Mapping[str, Key]:
    """Every typed key by its dotted path, in the order of the schema."""
    return {key.path: key for key in _walk(RootConf, "")}


def sections() -> frozenset[str]:
    """The dotted paths that are no keys themselves but hold some: "run", "cluster.card", ..."""
    return frozenset(path[:at] for path in keys() for at, letter in enumerate(path) if letter == ".")
