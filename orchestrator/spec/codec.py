"""Frozen specs to plain JSON data and back, exactly."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import types
import typing
from collections.abc import Mapping
from enum import Enum
from typing import Any, TypeVar

T = TypeVar("T")


def to_json(value: Any) -> Any:
    """`value` (a dataclass of this package) as data that `json.dumps` takes."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, (tuple, list)):
        return [to_json(item) for item in value]
    return value


def _decode(kind: Any, value: Any) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        return _decode(next(a for a in arguments if a is not type(None)), value)
    if origin is tuple:
        inner = arguments[0]
        return tuple(_decode(inner, item) for item in value)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return from_json(kind, value)
    if isinstance(kind, type) and issubclass(kind, (Enum, float)):
        return kind(value)
    return value


def from_json(kind: type[T], data: Mapping[str, Any]) -> T:
    """Inverse of `to_json` for the dataclass `kind`.

    Raises:
        TypeError: a field is missing or unknown.
    """
    hints = typing.get_type_hints(kind)
    return kind(**{name: _decode(hints.get(name), value) for name, value in data.items()})


def digest(value: Any) -> str:
    """SHA-256 of the canonical JSON of `value`: equal for equal specs, on every machine."""
    text = json.dumps(to_json(value), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
