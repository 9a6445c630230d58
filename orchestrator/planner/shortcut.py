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
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

MODE: Any = torch._C._TorchDispatchModeKey.FAKE
"""Where torch keeps the fake mode that is active."""

DEVICE = torch.ops.prim.device.default
"""How torch's own code asks a fake tensor for its device: a third of all operations."""

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
    storage of that argument, or in a new one where `argument` is None. `nothing`: the result is None."""

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
    """Append to `key` what tells the arguments, and to `tensors` those of them that are tensors.

    Raises:
        _Untold: one of them is not a plain value or a fake tensor without a constant.
    """
    for value in values:
        kind = type(value)
        if kind is FakeTensor:
            if value.constant is not None or value.fake_mode is not mode:
                raise _Untold
            key.append((value.shape, value.stride(), value.storage_offset(), value.dtype, value.fake_device))
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
        self.hits = self.asked = 0

    def perform(self, func: Operation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of `func`; under no fake mode simply called."""
        mode = active_mode()
        if func is DEVICE and mode is not None and type(args[0]) is FakeTensor and not mode.in_kernel_invocation:
            return args[0].fake_device
        able = self._able.get(func)
        if able is None:
            able = self._able[func] = _rememberable(func)
        if not able or mode is None:
            return func(*args, **kwargs)
        self.asked += 1
        tensors: list[FakeTensor] = []
        told: list[Any] = [func, torch.get_default_dtype()]
        try:
            _tell(args, told, tensors, mode)
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
        made = [_make(recipe, tensors, mode) for recipe in recipes]
        kind = self._kinds[key]
        return made[0] if kind is not list and kind is not tuple else kind(made)


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
    recipe = _Recipe(shared, result.shape, result.stride(), int(result.storage_offset()), result.dtype, result.fake_device)
    if shared is None and (recipe.offset or storage.nbytes() != _bytes(recipe)):
        return None
    return recipe


def _bytes(recipe: _Recipe) -> int:
    """Bytes of the storage that a new tensor of this geometry gets."""
    assert recipe.shape is not None
    if 0 in recipe.shape:
        return 0
    return recipe.dtype.itemsize * (1 + sum((n - 1) * s for n, s in zip(recipe.shape, recipe.stride, strict=True)))


def _make(recipe: _Recipe, tensors: Sequence[FakeTensor], mode: FakeTensorMode) -> FakeTensor | None:
    if recipe.nothing:
        return None
    if recipe.shape is None:
        assert recipe.argument is not None, "an argument returned as it is"
        return tensors[recipe.argument]
    with torch._C._DisableTorchDispatch():  # below, plain tensors on the meta device
        if recipe.argument is None:
            empty = torch.empty_strided(recipe.shape, recipe.stride, dtype=recipe.dtype, device="meta")
        else:
            empty = torch.empty(0, dtype=recipe.dtype, device="meta")
            empty.set_(tensors[recipe.argument].untyped_storage(), recipe.offset, recipe.shape, recipe.stride)
    return FakeTensor(mode, empty, recipe.device)
