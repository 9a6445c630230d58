"""Fake operations answered from memory: what an operation made of arguments of these shapes once, it makes of them again.

torch's fake mode keeps such answers too, and takes four fifths of a rehearsal to look them up: it hashes everything that a
compiler could ask. Here a key holds what decides the shape of a result on this project's paths, and a recipe says for each
result whether it is an argument itself, a view of one, or new. What is not wholly told by that is not remembered and goes to
torch, as does everything the first time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_impls import op_implementations_dict
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

MODE: Any = torch._C._TorchDispatchModeKey.FAKE
"""Where torch keeps the fake mode that is active."""

DEVICE = torch.ops.prim.device.default
"""How torch's own code asks a fake tensor for its device: more than half of all operations."""

SCALAR = torch.ops.aten._local_scalar_dense.default
SLICE = torch.ops.aten.slice.Tensor

COLLECTIVES = (torch.ops.c10d._allgather_base_.default, torch.ops.c10d._reduce_scatter_base_.default)
"""They return their first argument and a handle to wait for, which among fake peers is always done."""

ABSOLUTE = (
    torch.ops.aten.as_strided.default,
    torch.ops.aten.as_strided_.default,
    torch.ops.aten.as_strided_copy.default,
    torch.ops.aten.as_strided_scatter.default,
)
"""Operations that count an offset from the start of the storage; all others from the start of their argument."""

Operation = Callable[..., Any]


def active_mode() -> FakeTensorMode | None:
    """The fake mode that is active in this thread; None outside of one."""
    mode: FakeTensorMode | None = torch._C._get_dispatch_mode(MODE)
    return mode


class _Untold(Exception):
    """The arguments do not say enough for an answer from memory."""


@dataclass(frozen=True, slots=True)
class _Recipe:
    """How one result is made: argument number `argument` itself where there is no `shape`; else of this geometry, in the
    storage of that argument and `offset` elements behind its start, or in a new one where `argument` is None. `nothing`: the
    result is None."""

    argument: int | None = None
    shape: torch.Size | None = None
    stride: tuple[int, ...] = ()
    offset: int = 0
    dtype: torch.dtype = torch.float32
    device: torch.device | None = None
    nothing: bool = False


NOTHING = _Recipe(nothing=True)

_TELLING = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.inplace_view)
"""Operations whose result depends on values, or which change the geometry of an argument."""


def _rememberable(func: Any) -> bool:
    return (
        isinstance(func, torch._ops.OpOverload)
        and func.namespace in ("aten", "prims")
        and not any(tag in func.tags for tag in _TELLING)
        and "lift" not in func._opname
    )


def _tell(values: Sequence[Any], key: list[Any], tensors: list[FakeTensor], mode: FakeTensorMode) -> None:
    """Append to `key` what tells the arguments, but for where in its storage a tensor begins, and to `tensors` the tensors.

    Raises:
        _Untold: one of them is not a plain value or a fake tensor without a constant.
    """
    for value in values:
        kind = type(value)
        if kind is FakeTensor:
            if value.constant is not None or value.fake_mode is not mode:
                raise _Untold
            key.append((value.shape, value.stride(), value.dtype, value.fake_device))
            tensors.append(value)
        elif kind is list or kind is tuple:
            key.append(len(value))
            _tell(value, key, tensors, mode)
        elif isinstance(value, (torch.Tensor, torch.SymInt, torch.SymFloat, torch.SymBool, torch.Generator)):
            raise _Untold
        else:
            key.append((kind, value))  # 1, 1.0 and True are equal and do not make the same dtype


class Shortcut:
    """`perform(func, args, kwargs)` does what `func(*args, **kwargs)` does under `mode`, faster from the second time on."""

    def __init__(self) -> None:
        self._recipes: dict[tuple[Any, ...], tuple[_Recipe, ...] | None] = {}
        self._kinds: dict[tuple[Any, ...], type] = {}
        self._able: dict[Any, bool] = {}
        self._done: dict[Any, Any] = {}
        self._templates: dict[tuple[FakeTensorMode, torch.device], dict[str, Any]] = {}
        self.hits = self.asked = 0

    def perform(self, func: Operation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of `func`; under no fake mode simply called."""
        mode = active_mode()
        if mode is None:
            return func(*args, **kwargs)
        if func is SCALAR and type(args[0]) is FakeTensor and args[0].constant is None:
            return op_implementations_dict[func](mode, func, args[0])
        if func is SLICE and type(args[0]) is FakeTensor and not kwargs:
            view = self._slice(mode, *args)
            if view is not None:
                return view
        if func in COLLECTIVES and type(args[0]) is FakeTensor:
            if func not in self._done:
                self._done[func] = func(*args, **kwargs)[1]
            return args[0], self._done[func]
        able = self._able.get(func)
        if able is None:
            able = self._able[func] = _rememberable(func)
        if not able:
            return func(*args, **kwargs)
        self.asked += 1
        tensors: list[FakeTensor] = []
        told: list[Any] = [func, torch.get_default_dtype()]
        try:
            _tell(args, told, tensors, mode)
            if func in ABSOLUTE:
                told += [tensor.storage_offset() for tensor in tensors]
            for name, value in kwargs.items():
                told.append(name)
                _tell((value,), told, tensors, mode)
            key = tuple(told)
            recipes = self._recipes.get(key, _UNSEEN)
        except (_Untold, TypeError):  # TypeError: an argument that cannot be hashed
            return func(*args, **kwargs)
        if recipes is None:
            return func(*args, **kwargs)
        if recipes is _UNSEEN:
            result = func(*args, **kwargs)
            self._recipes[key] = _learn(result, tensors)
            self._kinds[key] = type(result)
            return result
        self.hits += 1
        made = [self._make(recipe, tensors, mode) for recipe in recipes]
        kind = self._kinds[key]
        return made[0] if kind is not list and kind is not tuple else kind(made)

    def _make(self, recipe: _Recipe, tensors: Sequence[FakeTensor], mode: FakeTensorMode) -> FakeTensor | None:
        if recipe.nothing:
            return None
        if recipe.shape is None:
            assert recipe.argument is not None, "an argument returned as it is"
            return tensors[recipe.argument]
        assert recipe.device is not None, "it was learned from a fake tensor"
        if recipe.argument is not None:
            source = tensors[recipe.argument]
            return self._view(
                mode, source, int(source.storage_offset()) + recipe.offset, recipe.shape, recipe.stride, recipe.dtype
            )
        with torch._C._DisableTorchDispatch():  # below, plain tensors on the meta device
            empty = torch.empty_strided(recipe.shape, recipe.stride, dtype=recipe.dtype, device="meta")
        return self._fake(mode, empty, recipe.device)

    def _view(
        self,
        mode: FakeTensorMode,
        source: FakeTensor,
        offset: int,
        shape: Sequence[int],
        stride: Sequence[int],
        dtype: torch.dtype,
    ) -> FakeTensor:
        """A tensor of this geometry in the storage of `source`; `offset` counts from the start of the storage."""
        with torch._C._DisableTorchDispatch():
            empty = torch.empty(0, dtype=dtype, device="meta")
            empty.set_(source.untyped_storage(), offset, shape, stride)
        return self._fake(mode, empty, source.fake_device)

    def _fake(self, mode: FakeTensorMode, empty: torch.Tensor, device: torch.device) -> FakeTensor:
        """`FakeTensor(mode, empty, device)`, without asking again what its constructor asked for the first of this device."""
        template = self._templates.get((mode, device))
        if template is None:
            made = FakeTensor(mode, empty, device)
            self._templates[mode, device] = dict(made.__dict__)
            return made
        fresh: FakeTensor = torch.Tensor._make_subclass(
            FakeTensor, empty, False, dispatch_device=True, device_for_backend_keys=device
        )
        guard: Any = torch._C
        if mode._allow_unsafe_data_ptr_access:
            guard._set_warn_deprecated_on_mutable_data_ptr(fresh)
        else:
            guard._set_throw_on_mutable_data_ptr(fresh)
        fresh.__dict__.update(template)
        return fresh

    def _slice(
        self, mode: FakeTensorMode, source: FakeTensor, dim: int = 0, start: Any = None, end: Any = None, step: Any = 1
    ) -> FakeTensor | None:
        """`source[start:end:step]` along `dim` (aten/src/ATen/native/TensorShape.cpp, slice): flat buffers are cut at thousands
        of places, each of them once. None where torch is to answer."""
        shape, stride = list(source.shape), list(source.stride())
        plain = all(value is None or type(value) is int for value in (start, end, step))
        if source.constant is not None or source.fake_mode is not mode or not plain or not 0 <= dim < len(shape) or step < 1:
            return None
        first, last, step = slice(start, end, step).indices(shape[dim])
        shape[dim] = -(-(max(first, last) - first) // step)
        offset = int(source.storage_offset()) + first * stride[dim]
        stride[dim] *= step
        return self._view(mode, source, offset, shape, stride, source.dtype)


_UNSEEN: Any = object()


def _learn(result: Any, tensors: Sequence[FakeTensor]) -> tuple[_Recipe, ...] | None:
    """How to make `result` from `tensors` again; None where it cannot be told."""
    results = result if type(result) in (list, tuple) else (result,)
    found = [_recipe(one, tensors) for one in results]
    if any(recipe is None for recipe in found):
        return None
    return tuple(recipe for recipe in found if recipe is not None)


def _recipe(result: Any, tensors: Sequence[FakeTensor]) -> _Recipe | None:
    if result is None:
        return NOTHING
    if type(result) is not FakeTensor or result.constant is not None or result.requires_grad:
        return None
    for index, tensor in enumerate(tensors):
        if tensor is result:
            return _Recipe(argument=index)
    if result.layout is not torch.strided or result.is_conj() or result.is_neg():
        return None
    storage = result.untyped_storage()
    shared = next((i for i, tensor in enumerate(tensors) if tensor.untyped_storage()._cdata == storage._cdata), None)
    offset = int(result.storage_offset()) - (int(tensors[shared].storage_offset()) if shared is not None else 0)
    recipe = _Recipe(shared, result.shape, result.stride(), offset, result.dtype, result.fake_device)
    if shared is None and (recipe.offset or storage.nbytes() != _bytes(recipe)):
        return None
    return recipe


def _bytes(recipe: _Recipe) -> int:
    """Bytes of the storage that a new tensor of this geometry gets."""
    assert recipe.shape is not None
    if 0 in recipe.shape:
        return 0
    return recipe.dtype.itemsize * (1 + sum((n - 1) * s for n, s in zip(recipe.shape, recipe.stride, strict=True)))
