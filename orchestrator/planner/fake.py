"""A process in which the real engine code runs without memory, without peers and without a card.

Fake tensors know their shape, dtype and device and hold nothing; the fake process group answers every collective at once.
Some library code looks at values or at addresses, which fake tensors do not have; what it gets to see here is what a real
run on full rows with finite gradients would show it. These answers are installed for the whole process and never taken
back: rehearse in a process of its own.
"""

from __future__ import annotations

import os
import types
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._foreach_utils import _foreach_supported_types


def join(rank: int, ranks: int) -> None:
    """Become rank `rank` of `ranks` in a process group that exists in this process alone."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1",
        MASTER_PORT="29500",
    )  # fmt: skip
    dist.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())


@lru_cache(maxsize=1)
def _answer_at_once() -> None:
    """Take the guard that keeps compilers out of the fake mode off every operation: none is at work here."""
    modes: Any = FakeTensorMode
    guarded = modes.__torch_dispatch__
    modes.__torch_dispatch__ = getattr(guarded, "__wrapped__", guarded)


@contextmanager
def fake_tensors(packed: bool = False) -> Iterator[FakeTensorMode]:
    """Every tensor made inside holds no memory, and the libraries in use accept that; `packed`: rows hold several documents."""
    _answer_at_once()
    _answer_for_values()
    _answer_transformers(packed)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        yield mode


@lru_cache(maxsize=1)
def _answer_for_values() -> None:
    from torch._subclasses.fake_impls import op_implementations_dict

    def value(mode: FakeTensorMode, func: Any, tensor: torch.Tensor) -> bool | int | float:
        """What `.item()` says: no flag is raised (DeepSpeed's are bytes), counters and norms are one."""
        if tensor.dtype == torch.bool:
            return False
        if tensor.dtype == torch.uint8:
            return 0
        return 1.0 if tensor.dtype.is_floating_point else 1

    op_implementations_dict[torch.ops.aten._local_scalar_dense.default] = value
    # Every label of a rehearsed sample is learned, so each look for labelled tokens finds all of them.
    op_implementations_dict[torch.ops.aten.nonzero.default] = lambda mode, func, mask: torch.empty(
        (mask.numel(), mask.dim()), dtype=torch.int64, device=mask.device
    )
    # A collective's result is the tensor itself once it has arrived; the shape function would make another one.
    op_implementations_dict[torch.ops._c10d_functional.wait_tensor.default] = lambda mode, func, tensor: tensor
    # Optimizers and gradient clipping take the fused path of plain tensors for fake ones too, as they do in the real run.
    _foreach_supported_types.append(FakeTensor)
    # Module._apply swaps fake parameters in place, which a weak reference forbids; nothing here keeps one across the swap.
    tools: Any = torch.utils
    tools.weakref = types.SimpleNamespace(getweakrefs=lambda _: ())


@lru_cache(maxsize=1)
def _answer_transformers(packed: bool) -> None:
    """transformers takes fake tensors for a compiler's and then builds masks that a real run on one document skips, and that
    one on `packed` rows builds."""
    import transformers.masking_utils
    import transformers.utils.import_utils as inspection

    inspection.is_fake_tensor = lambda tensor: False
    masking: Any = transformers.masking_utils
    look = masking.find_packed_sequence_indices

    def documents(position_ids: torch.Tensor) -> torch.Tensor | None:
        found: torch.Tensor | None = look(position_ids)  # its temporaries are part of the run
        return found if packed else None

    masking.find_packed_sequence_indices = documents


def pretend(module: nn.Module, device: torch.device) -> None:
    """Replace every parameter and buffer of a module that was built outside the fake mode by a fake one of the same dtype and
    shape, on the meta device where it was there, else on `device`; tied parameters stay tied. Call it inside the fake mode.

    A real run moves what is not on the meta device to the card when the engine adopts it; fake tensors cannot change their
    device in place."""
    replaced: dict[int, torch.Tensor] = {}

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        if isinstance(tensor, FakeTensor):
            return tensor
        if id(tensor) not in replaced:
            home = tensor.device if tensor.device.type == "meta" else device
            empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=home)
            replaced[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
        return replaced[id(tensor)]

    for child in module.modules():
        places: tuple[dict[str, Any], ...] = (child._parameters, child._buffers)
        for held in places:
            for name, tensor in held.items():
                if tensor is not None:
                    held[name] = fake(tensor)
