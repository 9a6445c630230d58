"""ZeRO-3's weights and states on NVMe: how they are reached one sub-group at a time, and what of them lies on the disk.

Attributes read here are those of deepspeed 0.19.8: runtime/zero/stage3.py, runtime/swap_tensor/partitioned_param_swapper.py and
optimizer_utils.py. DeepSpeed's own load_checkpoint forgets Adam's moments where they are swapped; nothing of it is used.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import MethodType
from typing import Any

import torch

from orchestrator.engine import optimizers
from orchestrator.engine.census import short_name
from orchestrator.engine.protocol import Piece
from orchestrator.engine.states import Fragment, Read
from orchestrator.layout import Row
from orchestrator.spec import Home, RunSpec


def swapper_of(parameters: Iterable[Any]) -> Any | None:
    """The swapper of the weights; None where they are not on NVMe."""
    return next((s for p in parameters if (s := getattr(p, "nvme_swapper", None)) is not None), None)


def on_disk(parameter: Any) -> bool:
    """Whether the parameter's part of this rank rests in a file."""
    swapper = getattr(parameter, "nvme_swapper", None)
    return swapper is not None and parameter.ds_id in swapper.id_to_path


@torch.no_grad()
def put_part(parameter: Any, values: torch.Tensor) -> None:
    """Make `values` the first elements of this rank's part of `parameter`, wherever that rests; padding on disk is zero."""
    if not on_disk(parameter):
        parameter.ds_tensor.data[: values.numel()].copy_(values)
        return
    swapper = parameter.nvme_swapper
    buffer = swapper.get_buffer(parameter, parameter.ds_tensor.ds_numel)
    buffer[: values.numel()].copy_(values)
    buffer[values.numel() :].zero_()
    swapper.swap_out_and_release([parameter])


SECTOR_BYTES = 512
"""Direct I/O needs memory at a multiple of this."""


def _read_gradients(swapper: Any, aio_handle: Any, parameter: Any, gradient_tensor: torch.Tensor) -> None:
    """In place of `_swap_in_pinned_gradients`, which reads every gradient straight to its place in the flat one. Where that
    is no multiple of a sector the kernel refuses, nobody looks at its answer, and the update uses what lay there before. Such a
    gradient comes by way of memory of its own, for which the handle has an aligned buffer."""
    detours = []
    gradients = swapper.swap_params_info[swapper.parameter_id(parameter)].swapped_gradients.values()
    for gradient in gradients:
        place = gradient_tensor.narrow(0, gradient.offset, gradient.length)
        if gradient.offset * place.element_size() % SECTOR_BYTES:
            detours.append((place, gradient.path))
        else:
            aio_handle.async_pread(place, gradient.path, 0)
    if len(detours) < len(gradients):
        aio_handle.wait()
    for place, path in detours:
        own = torch.empty_like(place)
        aio_handle.async_pread(own, path, 0)
        aio_handle.wait()
        place.copy_(own)


class SwappedStates:
    """Masters, moments and gradients of `zero`, a ZeRO-3 optimizer; also where none of them is swapped."""

    def __init__(self, zero: Any) -> None:
        self.zero = zero
        if self.swapper is not None:
            self.swapper._swap_in_pinned_gradients = MethodType(_read_gradients, self.swapper)

    @property
    def swapper(self) -> Any | None:
        return getattr(self.zero, "optimizer_swapper", None)

    def swapped(self, group: int) -> bool:
        """Whether sub-group `group` rests on the disk."""
        return bool(self.zero._swappable_optimizer_subgroup(group))

    @contextmanager
    def resident(self, group: int, *, changed: bool) -> Iterator[None]:
        """Master and moments of a sub-group are in host memory while it is entered; `changed`: and are written back, moments
        that were made meanwhile too. No gradient may be waiting for its step."""
        if not self.swapped(group):
            yield
            return
        self.zero._optimizer_states_and_gradient_swap_in(group)
        try:
            yield
        finally:
            if changed:
                self._look_again(group)
                self.zero._optimizer_states_and_gradient_swap_out(group)
            else:
                self.zero._release_swap_buffers(group)

    def _look_again(self, group: int) -> None:
        """Let the swapper find the states of a sub-group anew before it writes them: they may be others now."""
        known = self.zero.optimizer_swapper.swap_params_info[self.zero.fp32_partitioned_groups_flat[group].ds_id]
        known.tensors, known.has_state_tensors = known.tensors[:1], False

    def pieces(
        self, optimizer: torch.optim.Optimizer, masters: list[torch.Tensor], fragments: Iterable[Fragment], owned: bool
    ) -> Iterator[Piece]:
        """As `optimizers.pieces`; what comes from the disk is copied out of its buffers, which the next sub-group needs."""
        if self.swapper is None:
            yield from optimizers.pieces(optimizer, fragments, owned)
            return
        for group, held in self._by_group(masters, fragments):
            with self.resident(group, changed=False):
                for piece in optimizers.pieces(optimizer, held, owned):
                    yield replace(piece, data=piece.data.clone()) if self.swapped(group) else piece

    def load(
        self, optimizer: torch.optim.Optimizer, spec: RunSpec, masters: list[torch.Tensor], fragments: Iterable[Fragment],
        read: Read, scalars: dict[str, float],
    ) -> None:  # fmt: skip
        """As `optimizers.load`, one sub-group at a time where they are swapped."""
        if self.swapper is None:
            optimizers.load(optimizer, spec, masters, fragments, read, scalars)
            return
        for group, held in self._by_group(masters, fragments):
            with self.resident(group, changed=True):
                optimizers.load(optimizer, spec, masters[group : group + 1], held, read, scalars)

    def _by_group(self, masters: list[torch.Tensor], fragments: Iterable[Fragment]) -> Iterator[tuple[int, list[Fragment]]]:
        """(number, fragments) of every sub-group; each has one master."""
        held: dict[int, list[Fragment]] = {id(master): [] for master in masters}
        for fragment in fragments:
            held[id(fragment.tensor)].append(fragment)
        yield from enumerate(held.values())

    def files(self) -> Iterator[tuple[str, str]]:
        """(line, file) of what rests on the disk."""
        for states in self.swapper.swap_params_info.values() if self.swapper is not None else ():
            master, *moments = states.get_swap_paths()
            yield "master", master
            yield from (("moments", path) for path in moments)
            yield from (("gradients", path) for path in states.get_swap_gradient_paths())

    def buffers(self) -> list[torch.Tensor]:
        """Page-locked memory that they pass through."""
        return list(self.swapper.swap_buffer_manager.all_buffers) if self.swapper is not None else []


def weight_buffers(swapper: Any | None) -> list[torch.Tensor]:
    """Page-locked memory that the weights pass through."""
    if swapper is None:
        return []
    return [buffer for buffer in (swapper.buffers, swapper.partitioned_swap_buffer) if buffer is not None]


def free_weight_buffers(swapper: Any | None) -> None:
    """Give that memory back: it belongs to the process, not to the swapper."""
    if swapper is not None:
        for buffer in weight_buffers(swapper):
            swapper.aio_read_handle.free_cpu_locked_tensor(buffer)


def disk_rows(files: Iterable[tuple[str, str, torch.dtype]]) -> tuple[Row, ...]:
    """One row for each (line, dtype) from (line, file, dtype), by the sizes of the files."""
    elements: dict[tuple[str, str], int] = {}
    for line, path, dtype in files:
        key = (line, short_name(dtype))
        elements[key] = elements.get(key, 0) + Path(path).stat().st_size // dtype.itemsize
    return tuple(Row(line, dtype, Home.NVME, count) for (line, dtype), count in elements.items())
