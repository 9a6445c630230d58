"""Recording a trace: each storage that is made and dies while the tracer is entered, on real and on fake tensors alike.

A dispatch mode sees every operation after it ran; a result whose storage was not seen before is an allocation, and a weak
reference to that storage tells its end. So the trace holds what the framework asks of its allocator, no more and no less.
What a kernel allocates and frees inside itself is not seen, in real runs and in fake ones.
"""

from __future__ import annotations

import weakref
from array import array
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from orchestrator.planner.shortcut import DEVICE, Shortcut, active_mode
from orchestrator.planner.trace import NO_LAYER, Note, Trace


@dataclass(slots=True)
class _Seen:
    """A living storage: its weak reference (which must be held for its callback to run), number, bytes, home and layer."""

    reference: weakref.ref[torch.UntypedStorage]
    block: int
    bytes: int
    home: str
    layer: int


_GLOO_CHUNK = torch.ops.aten.split.Tensor
"""Gloo copies the input of a reduce-scatter inside its own work and splits the copy, which is then seen here for the first
time (torch/csrc/distributed/c10d/ProcessGroupGloo.cpp). It belongs to that transport alone, so no view of it is traced."""


def _wraps_tensors(kind: type) -> bool:
    """Whether tensors of this class only stand for others (DTensor, AsyncCollectiveTensor): those inside are traced instead."""
    return hasattr(kind, "__tensor_flatten__")


class Tracer(TorchDispatchMode):
    """Enter it, name the phases with `enter_phase`, leave it, take the `trace()`.

    Args:
        homes: device type to home: {"cpu": "gpu"} on a machine without cards, {"card": "gpu", "cpu": "cpu"} for a fake card.
            Devices that are not listed ("meta") are not traced.
        stream: number of the stream that is current on the card.
    """

    def __init__(self, homes: Mapping[str, str], stream: Callable[[], int] = lambda: 0) -> None:
        super().__init__()
        self.layer = NO_LAYER
        """The transformer block at work; whoever knows it sets it."""
        self._homes, self._stream = dict(homes), stream
        self._segments: list[str] = []
        self._notes: dict[Note, int] = {}
        self._block, self._size, self._note = array("q"), array("q"), array("q")
        self._seen: dict[int, _Seen] = {}
        self._lines: dict[int, str] = {}
        self._blocks = 0
        self._fake_mode: Any = None
        self._depth = 0
        self._shortcut = Shortcut()
        self._names: dict[Any, str] = {}
        self._standing: dict[Any, bool] = {}

    # Recording -----------------------------------------------------------------------------------------------------

    def enter_phase(self, phase: str) -> None:
        """From here on, events belong to a new segment of `phase`."""
        self._segments.append(phase)
        self.layer = NO_LAYER

    @property
    def phase(self) -> str:
        return self._segments[-1]

    def name(self, line: str, tensors: Iterable[torch.Tensor | None]) -> None:
        """Put the storages of `tensors` under `line`; the first name that a storage gets stays."""
        for tensor in tensors:
            if tensor is None:
                continue
            seen = self._seen.get(tensor.untyped_storage()._cdata)
            if seen is not None:
                self._lines.setdefault(seen.block, line)

    def layer_of(self, tensor: torch.Tensor) -> int:
        """The transformer block to which the storage of `tensor` was charged."""
        seen = self._seen.get(tensor.untyped_storage()._cdata)
        return seen.layer if seen is not None else NO_LAYER

    def charge(self, op: str, sizes: Iterable[int], home: str = "gpu") -> None:
        """Record blocks that live for one moment only: a kernel's workspace."""
        blocks = []
        for size in sizes:
            self._blocks += 1
            blocks.append((self._blocks, size))
            self._record(self._blocks, size, op, home, self.layer)
        for block, size in reversed(blocks):
            self._record(-block, size, op, home, self.layer)

    def mark(self, size: int, home: str) -> int:
        """Record a block of `size` in a home that holds no memory; its number."""
        self._blocks += 1
        self._record(self._blocks, size, "mark", home, self.layer)
        return self._blocks

    def unmark(self, block: int, size: int, home: str) -> None:
        """Record the end of a mark."""
        self._record(-block, size, "free", home, self.layer)

    def trace(self) -> Trace:
        """Everything recorded so far."""
        notes = tuple(self._notes)
        return Trace(tuple(self._segments), notes, self._block[:], self._size[:], self._note[:], dict(self._lines))

    def _record(self, block: int, size: int, op: str, home: str, layer: int) -> None:
        note = Note(op, len(self._segments) - 1, layer, self._stream() if home == "gpu" else 0, home)
        self._block.append(block)
        self._size.append(size)
        self._note.append(self._notes.setdefault(note, len(self._notes)))

    def _born(self, storage: torch.UntypedStorage, home: str, op: str, layer: int) -> None:
        self._blocks += 1
        key, block, size = storage._cdata, self._blocks, storage.nbytes()

        def died(_: object) -> None:
            seen = self._seen.get(key)
            if seen is not None and seen.reference is reference:
                del self._seen[key]
                self._freed(seen)

        reference = weakref.ref(storage, died)
        self._seen[key] = _Seen(reference, block, size, home, layer)
        if size:
            self._record(block, size, op, home, layer)

    def _freed(self, seen: _Seen) -> None:
        if seen.bytes:
            self._record(-seen.block, seen.bytes, "free", seen.home, self._freeing_layer(seen))

    def _freeing_layer(self, seen: _Seen) -> int:
        return seen.layer if self._segments[-1] in ("load", "step", "save") else self.layer

    def _resized(self, seen: _Seen, size: int) -> None:
        self._freed(seen)
        self._blocks += 1
        line = self._lines.get(seen.block)
        seen.block, seen.bytes = self._blocks, size
        if line is not None:
            self._lines[seen.block] = line
        if size:
            self._record(seen.block, size, "resize_", seen.home, seen.layer)

    def _see(self, tensor: torch.Tensor, op: str, layer: int) -> None:
        device = tensor.fake_device if type(tensor) is FakeTensor else tensor.device  # asking a fake tensor is an operation
        home = self._homes.get(device.type)
        if home is None or _wraps_tensors(type(tensor)):
            return
        storage = tensor.untyped_storage()
        seen = self._seen.get(storage._cdata)
        if seen is None:
            self._born(storage, home, op, layer)
        elif seen.bytes != storage.nbytes():
            self._resized(seen, storage.nbytes())

    # The dispatch mode ---------------------------------------------------------------------------------------------

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is DEVICE and type(args[0]) is FakeTensor:  # a mode is never asked inside a fake kernel
            return args[0].fake_device
        standing = self._standing.get(types)
        if standing is None:
            standing = self._standing[types] = any(_wraps_tensors(kind) for kind in types)
        if standing:
            return NotImplemented
        # DTensor's sharding propagation runs operations for their shapes alone, under a fake mode of its own.
        if _PROPAGATING or active_mode() not in (None, self._fake_mode):
            return func(*args, **(kwargs or {}))
        self._before(func, args)
        result = self._shortcut.perform(func, args, kwargs or {})
        if func is _GLOO_CHUNK:
            return result
        op = self._names.get(func)
        if op is None:
            op = self._names[func] = str(func)
        if isinstance(result, torch.Tensor):
            self._see(result, op, self._layer_for(args, 0))
        elif result is not None:
            for index, leaf in enumerate(tree_leaves(result)):
                if isinstance(leaf, torch.Tensor):
                    self._see(leaf, op, self._layer_for(args, index))
        return result

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Whether torch wraps the dispatch so that no compiler looks into it, at every operation: none is at work here."""
        return False

    def _before(self, func: Any, args: tuple[Any, ...]) -> None:
        """Called before each operation runs."""

    def _layer_for(self, args: tuple[Any, ...], index: int) -> int:
        """The transformer block that result number `index` of an operation on `args` belongs to."""
        return self.layer

    def __enter__(self) -> Self:
        if self._depth == 0:
            self._fake_mode = active_mode()
            _LISTENING.append(self)
        self._depth += 1
        super().__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        super().__exit__(kind, error, traceback)
        self._depth -= 1
        if self._depth == 0:
            _LISTENING.remove(self)


# Two places where the framework goes past the dispatcher; both are wrapped once, when this module is imported. ----------

_LISTENING: list[Tracer] = []
_PROPAGATING: list[None] = []


def _listen_to_resize() -> None:
    """FSDP2 frees and regains gathered weights by resizing their storage, which is not an operation."""
    storages: Any = torch.UntypedStorage
    resize = storages.resize_

    def resize_(storage: torch.UntypedStorage, size: int) -> Any:
        result = resize(storage, size)
        for tracer in _LISTENING:
            seen = tracer._seen.get(storage._cdata)
            if seen is not None and seen.bytes != storage.nbytes():
                tracer._resized(seen, storage.nbytes())
        return result

    storages.resize_ = resize_


def _ignore_shape_propagation() -> None:
    from torch.distributed.tensor._sharding_prop import ShardingPropagator

    propagator: Any = ShardingPropagator
    propagate = propagator._propagate_tensor_meta_non_cached

    def quietly(*args: Any, **kwargs: Any) -> Any:
        _PROPAGATING.append(None)
        try:
            return propagate(*args, **kwargs)
        finally:
            _PROPAGATING.pop()

    propagator._propagate_tensor_meta_non_cached = quietly


_listen_to_resize()
_ignore_shape_propagation()
