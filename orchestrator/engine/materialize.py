"""From a module without storage to one with it: placement, ties and initial values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial

import torch
from torch import nn

from orchestrator.engine.protocol import PackedLayer, Weights


def without_storage() -> AbstractContextManager[object]:
    """A context in which parameters are made on the meta device and buffers for real (a rope table cannot be loaded)."""
    from accelerate import init_empty_weights

    return init_empty_weights(include_buffers=False)


def cast(model: nn.Module, dtype_of: Callable[[nn.Parameter], torch.dtype]) -> None:
    """Set each parameter's dtype in place; costs nothing while it is on the meta device. Buffers keep theirs: a rope table
    rounded to bf16 moves every position."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype_of(parameter))


def materialize(model: nn.Module, device: torch.device, buffer_device: torch.device | None = None) -> None:
    """Give every meta parameter uninitialised storage on `device`; tied parameters stay one tensor.

    `nn.Module._apply` makes a new parameter for each place that holds it, so ties are noted before and set again after.
    """
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                places.setdefault(id(parameter), []).append((module, name))
    buffer_device = buffer_device or device

    def place(tensor: torch.Tensor) -> torch.Tensor:
        home = device if isinstance(tensor, nn.Parameter) else buffer_device
        return torch.empty_like(tensor, device=home) if tensor.device.type == "meta" else tensor.to(home)

    model._apply(place)
    for holders in places.values():
        (first, name), *others = holders
        for module, attribute in others:
            setattr(module, attribute, first._parameters[name])


def replace_parameters(model: nn.Module, place: Callable[[nn.Parameter], nn.Parameter]) -> None:
    """Put `place(parameter)` where each parameter is; tied parameters stay one."""
    placed: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if parameter not in placed:
                    placed[parameter] = place(parameter)
                module._parameters[name] = placed[parameter]


def move_buffers(model: nn.Module, device: torch.device) -> None:
    """Bring every buffer to `device`; those on the meta device get storage there."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                meta = buffer.device.type == "meta"
                module._buffers[name] = torch.empty_like(buffer, device=device) if meta else buffer.to(device)


class StoredWeights:
    """The initial values as `model` stores them: what a quantised layer holds of `weights` is packed as it is read, and its
    scales are set beside it. The module must have storage."""

    def __init__(self, model: nn.Module, weights: Weights) -> None:
        self._weights = weights
        self._packed = {f"{name}.weight": layer for name, layer in quantised_layers(model)}

    def read(self, name: str, start: int, stop: int, columns: tuple[int, int] | None = None) -> torch.Tensor:
        """Elements [start, stop) of the flattened parameter as it is stored, or `columns` of its rows."""
        layer = self._packed.get(name)
        if layer is None:
            return self._weights.read(name, start, stop, columns)
        assert columns is None, "packed weights have no columns (refused in compose)"
        return layer.pack(partial(self._weights.read, name), start, stop)


def quantised_layers(model: nn.Module) -> Iterator[tuple[str, PackedLayer]]:
    """(name, layer) of the layers whose weight is packed."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, PackedLayer))


def scales(model: nn.Module) -> list[torch.Tensor]:
    """The scales of every quantised layer."""
    return [scale for _, layer in quantised_layers(model) for scale in layer.scales()]


@torch.no_grad()
def fill(model: nn.Module, weights: Weights) -> None:
    """Copy every whole (unsharded) parameter from `weights`, one at a time."""
    weights = StoredWeights(model, weights)
    for name, parameter in model.named_parameters():
        parameter.copy_(weights.read(name, 0, parameter.numel()).view(parameter.shape))
