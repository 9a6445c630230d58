"""From a module without storage to one with it: placement, ties and initial values."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import nn

from orchestrator.engine.protocol import Weights


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
        if tensor.device.type == "meta":
            return torch.empty_like(tensor, device=device)
        return tensor.to(device if isinstance(tensor, nn.Parameter) else buffer_device)

    model._apply(place)
    for holders in places.values():
        (first, name), *others = holders
        for module, attribute in others:
            setattr(module, attribute, first._parameters[name])


@torch.no_grad()
def fill(model: nn.Module, weights: Weights) -> None:
    """Copy every whole (unsharded) parameter from `weights`, one at a time."""
    for name, parameter in model.named_parameters():
        parameter.copy_(weights.read(name, 0, parameter.numel()).view(parameter.shape))
