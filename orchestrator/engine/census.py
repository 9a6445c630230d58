"""Counting what is live: tensors of this rank by line, dtype and home, each storage once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch

from orchestrator.layout import Row
from orchestrator.spec import Home
from orchestrator.units import SHORT_NAMES

SMALLEST = 16
"""Storages below this many bytes (the optimizer's step counters) are not counted."""


def short_name(dtype: torch.dtype) -> str:
    """ "bf16" for `torch.bfloat16`; torch's own name for what the project has no short word for."""
    name = str(dtype).removeprefix("torch.")
    return SHORT_NAMES.get(name, name)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The plain tensor of this rank behind a DTensor, or the tensor itself."""
    to_local = getattr(tensor, "to_local", None)
    return to_local() if to_local is not None else tensor


Watcher = Callable[[str, Iterable[torch.Tensor]], None]
_watchers: list[Watcher] = []


@contextmanager
def watched(watcher: Watcher) -> Iterator[None]:
    """While it is entered, each census also shows `watcher` the line and the tensors that it counts under it."""
    _watchers.append(watcher)
    try:
        yield
    finally:
        _watchers.remove(watcher)


def measure(classes: Iterable[tuple[str, Home, Iterable[torch.Tensor | None]]]) -> tuple[Row, ...]:
    """One row for each (line, dtype, home) that holds anything.

    A storage that two tensors share is counted whole, once, under the first class that shows it; so flat buffers count
    with their padding and views count nothing.
    """
    seen: set[int] = set()
    elements: dict[tuple[str, str, Home], int] = {}
    for line, home, tensors in classes:
        for tensor in tensors:
            if tensor is None or tensor.device.type == "meta":
                continue
            plain = local(tensor.detach())
            storage = plain.untyped_storage()
            for watcher in _watchers:
                watcher(line, (plain,))
            address = storage._cdata
            if storage.nbytes() < SMALLEST or address in seen:
                continue
            seen.add(address)
            key = (line, short_name(plain.dtype), home)
            elements[key] = elements.get(key, 0) + storage.nbytes() // plain.element_size()
    return tuple(Row(line, dtype, home, count) for (line, dtype, home), count in elements.items())
