"""ZeRO without its peers and without a card: what one process must answer for them where all is only pretended."""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch


def load() -> None:
    """Import the library now, for the engines of forks to come."""
    import deepspeed  # noqa: F401


@lru_cache(maxsize=1)
def agree_with_peers() -> None:
    """Let ZeRO-3's checks that every rank walks the modules in the same order (runtime/zero/utils.py) hear this rank's own list
    as rank 0's. The tensors of the exchange are still made. For the rest of the process; deepspeed must be imported."""
    marks: Any = sys.modules["deepspeed.utils.nvtx"]
    marks.enable_nvtx = False  # nobody profiles a process without peers, and the marks take a tenth of its time
    zero: Any = sys.modules["deepspeed.runtime.zero.utils"]
    exchange, compare = zero.get_lst_from_rank0, zero.assert_lst_len_same_as_other_ranks

    def own(values: list[int]) -> list[int]:
        exchange(values)
        return values

    def same_length(values: list[int]) -> None:
        with contextlib.suppress(RuntimeError):  # the length that comes back was never sent
            compare(values)

    zero.get_lst_from_rank0 = own
    zero.assert_lst_len_same_as_other_ranks = same_length


class BucketListener(Protocol):
    """Hears of ZeRO-3's reduce bucket."""

    def filled(self, elements: int) -> None:
        """A gradient of so many elements goes into it."""

    def emptied(self) -> None:
        """It is about to be reduced and emptied."""


_LISTENING: list[BucketListener] = []


@contextlib.contextmanager
def listening_to_buckets(listener: BucketListener) -> Iterator[None]:
    """Let `listener` hear of ZeRO-3's reduce bucket."""
    _tell_of_buckets()
    _LISTENING.append(listener)
    try:
        yield
    finally:
        _LISTENING.remove(listener)


@lru_cache(maxsize=1)
def _tell_of_buckets() -> None:
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3 as Optimizer

    kind: Any = Optimizer
    add = kind._DeepSpeedZeroOptimizer_Stage3__add_grad_to_ipg_bucket
    reduce = kind._DeepSpeedZeroOptimizer_Stage3__reduce_and_partition_ipg_grads

    def telling_add(optimizer: Any, parameter: Any) -> None:
        for listener in _LISTENING:
            listener.filled(parameter.grad.numel())
        add(optimizer, parameter)

    def telling_reduce(optimizer: Any, dtype: torch.dtype) -> None:
        for listener in _LISTENING:
            listener.emptied()
        reduce(optimizer, dtype)

    kind._DeepSpeedZeroOptimizer_Stage3__add_grad_to_ipg_bucket = telling_add
    kind._DeepSpeedZeroOptimizer_Stage3__reduce_and_partition_ipg_grads = telling_reduce


class FakeHandle:
    """DeepSpeed's handle to a disk that is not there: what would be written becomes a sparse file of the same size, what would
    be read stays as it is. Locked memory is memory whose storage it has made."""

    _locked: ClassVar[dict[int, torch.Tensor]] = {}

    def __init__(self, *settings: Any, **further: Any) -> None:
        self._pending = 0

    def new_cpu_locked_tensor(self, elements: int, example: torch.Tensor) -> torch.Tensor:
        made = torch.empty(int(elements), dtype=example.dtype, device="cpu")
        self._locked[made.untyped_storage()._cdata] = made
        return made

    def free_cpu_locked_tensor(self, tensor: torch.Tensor) -> bool:
        return self._locked.pop(tensor.untyped_storage()._cdata, None) is not None

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._locked

    def async_pwrite(self, tensor: torch.Tensor, path: str, offset: int) -> int:
        with Path(path).open("a") as file:
            file.truncate(tensor.numel() * tensor.element_size())
        return self.async_pread(tensor, path, offset)

    def async_pread(self, tensor: torch.Tensor, path: str, offset: int) -> int:
        self._pending += 1
        return 0

    def wait(self) -> int:
        done, self._pending = self._pending, 0
        return done


@lru_cache(maxsize=1)
def without_disk() -> None:
    """Let DeepSpeed swap to `FakeHandle` for the rest of the process."""
    import deepspeed.ops.op_builder as builders

    op = types.SimpleNamespace(aio_handle=FakeHandle)
    builders.AsyncIOBuilder._loaded_ops[builders.AsyncIOBuilder.NAME] = op
    builders.AsyncIOBuilder.load = lambda self, verbose=False: op


@lru_cache(maxsize=1)
def use_device(name: str) -> None:
    """Make DeepSpeed compute on the device type `name`, whose module torch knows (`torch.<name>`), as it would on a card with
    its own streams. For the rest of the process, before an engine is made."""
    import deepspeed.accelerator as accelerators
    from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator

    module = torch.get_device_module(name)

    def method(attribute: str) -> Any:
        def ask(self: Any, *args: Any, **kwargs: Any) -> Any:
            return getattr(module, attribute)(*args, **kwargs)

        return ask

    asked = [
        "is_available", "device_count", "set_device", "current_device", "synchronize", "Stream", "stream", "current_stream",
        "default_stream", "empty_cache", "memory_allocated", "max_memory_allocated", "memory_reserved", "memory_stats",
        "max_memory_reserved", "reset_peak_memory_stats",
    ]  # fmt: skip

    def device_name(self: Any, index: int | None = None) -> str:
        return name if index is None else f"{name}:0"

    def filled(dtype: torch.dtype) -> Any:
        return property(lambda self: lambda values: torch.tensor(values, dtype=dtype, device=f"{name}:0"))

    members: dict[str, Any] = {attribute: method(attribute) for attribute in asked if attribute not in ("Stream", "stream")}
    members |= {
        "__init__": lambda self: self.__dict__.update(
            _name=name, _communication_backend_name="fake", _compile_backend="inductor", _nvtx_domains={}
        ),
        "device_name": device_name,
        "current_device_name": lambda self: f"{name}:0",
        "on_accelerator": lambda self, tensor: tensor.device.type == name,
        "Stream": property(lambda self: module.Stream),
        "Event": property(lambda self: module.Event),
        "stream": lambda self, stream: module.stream(stream),
        "is_bf16_supported": lambda self: module.is_bf16_supported(),
        "is_fp16_supported": lambda self: True,
        "total_memory": lambda self, device=None: module.mem_get_info()[1],
        "available_memory": lambda self, device=None: module.mem_get_info()[0],
        "range_push": lambda self, *args, **kwargs: None,
        "range_pop": lambda self, *args, **kwargs: None,
        "pin_memory": lambda self, tensor, align_bytes=1: tensor.pin_memory(),
        "FloatTensor": filled(torch.float32),
        "ByteTensor": filled(torch.uint8),
        "BFloat16Tensor": filled(torch.bfloat16),
        "HalfTensor": filled(torch.float16),
        "IntTensor": filled(torch.int32),
        "LongTensor": filled(torch.int64),
    }
    accelerators.set_accelerator(type("Accelerator", (CUDA_Accelerator,), members)())
