"""A card that is not there: a device named "card" on which fake tensors live, with streams, on any build of torch.

torch lets Python register a backend (`torch.utils.backend_registration`); libraries then find streams, events and the rest in
`torch.card` as they find them in `torch.cuda`. So what the engine places on the card and on the host is told apart, and each
allocation knows its stream. Importing this module changes nothing; `install()` is for the life of the process.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, ClassVar, Self

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

DEVICE = "card"


class Stream:
    """A queue of work; only its number matters here."""

    _made = 0

    def __init__(self, *_: Any, **__: Any) -> None:
        self.stream_id = Stream._made
        Stream._made += 1

    @property
    def device(self) -> torch.device:
        return torch.device(DEVICE, 0)

    def wait_stream(self, other: Stream) -> None:
        """Order only: no work is queued."""

    def wait_event(self, event: Event) -> None:
        """Order only: no work is queued."""

    def record_event(self, event: Event | None = None) -> Event:
        return event or Event()

    def synchronize(self) -> None:
        """Nothing is ever pending."""

    def query(self) -> bool:
        return True

    def __enter__(self) -> Self:
        Card.streams.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        Card.streams.pop()


class Event:
    """A mark in a stream, always reached."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def record(self, stream: Stream | None = None) -> None:
        """Nothing to mark."""

    def wait(self, stream: Stream | None = None) -> None:
        """Already reached."""

    def synchronize(self) -> None:
        """Already reached."""

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: Event) -> float:
        return 0.0


CardStream = Stream


class Card:
    """What torch and the libraries ask of a device module; registered as `torch.card`."""

    streams: ClassVar[list[Stream]] = [Stream()]
    bf16 = True
    memory_bytes = 1 << 40
    Stream, Event = Stream, Event

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def is_in_bad_fork(self) -> bool:
        return False

    _is_in_bad_fork = is_in_bad_fork

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def set_device(self, device: object) -> None:
        """There is one."""

    def synchronize(self, device: object = None) -> None:
        """Nothing is ever pending."""

    def current_stream(self, device: object = None) -> CardStream:
        return self.streams[-1]

    def default_stream(self, device: object = None) -> CardStream:
        return self.streams[0]

    def stream(self, stream: CardStream | None) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext() if stream is None else stream

    @contextlib.contextmanager
    def device(self, device: object) -> Iterator[None]:
        yield

    def is_bf16_supported(self, *_: Any) -> bool:
        return self.bf16

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def memory_allocated(self, device: object = None) -> int:
        return 0

    memory_reserved = max_memory_allocated = max_memory_reserved = memory_allocated

    def memory_stats(self, device: object = None) -> dict[str, int]:
        return {}

    def mem_get_info(self, device: object = None) -> tuple[int, int]:
        return self.memory_bytes, self.memory_bytes

    def empty_cache(self) -> None:
        """Nothing is cached."""

    def reset_peak_memory_stats(self, device: object = None) -> None:
        """Nothing is counted here."""

    def get_rng_state(self, device: object = None) -> torch.Tensor:
        return torch.zeros(16, dtype=torch.uint8)

    def set_rng_state(self, state: torch.Tensor, device: object = None) -> None:
        """Fake tensors hold no values."""

    def manual_seed(self, seed: int) -> None:
        """Fake tensors hold no values."""

    manual_seed_all = manual_seed


def forget_streams() -> None:
    """Let the next stream be number 1 again, so that two rehearsals in one process number theirs alike."""
    Stream._made = 0
    Card.streams[:] = [Stream()]


def current_stream_number() -> int:
    """Number of the stream in which work is being queued; 0 is the default one."""
    return Card.streams[-1].stream_id


FUSED = ("silu_backward", "mish_backward", "_fused_rms_norm", "_fused_rms_norm_backward")
"""Operations that CUDA runs as one kernel and that would otherwise fall apart into others, with temporaries that no card makes
(aten/src/ATen/native/native_functions.yaml: a CompositeImplicit entry beside a CUDA one)."""

_registered: list[torch.library.Library] = []


@lru_cache(maxsize=1)
def install() -> torch.device:
    """The device, after registering its backend with torch."""
    from torch._subclasses.fake_impls import op_implementations_dict
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend(DEVICE, backend_module=Card())
    library = torch.library.Library("aten", "IMPL", "PrivateUse1")
    for name in FUSED:
        library.impl(name, _never)
    _registered.append(library)
    op_implementations_dict[torch.ops.aten._pin_memory.default] = _pin
    op_implementations_dict[torch.ops.aten.is_pinned.default] = lambda mode, func, tensor, *args: True
    tensors: Any = torch.Tensor
    tensors.record_stream = lambda tensor, stream: None
    # torch.tensor(value, device=card) must make its value on the host and leave the move to the fake mode.
    modes: Any = FakeTensorMode
    modes.avoid_device_init = property(lambda mode: True)
    return torch.device(DEVICE, 0)


def _never(*_: Any, **__: Any) -> None:
    raise AssertionError("a fake operation must not run")


def _pin(mode: Any, func: Any, tensor: torch.Tensor, device: object = None) -> torch.Tensor:
    """Pinning copies into page-locked memory of the host."""
    return torch.empty_like(tensor)


def choose_attention(compute: str, bf16: bool) -> None:
    """Let `scaled_dot_product_attention` on fake card tensors run the kernel that CUDA would choose, for the process.

    Flash for half precision and head_dim up to 256 on cards from sm80 on (those with bf16), the memory-efficient kernel for
    fp32 and for older cards (aten/src/ATen/native/transformers/cuda/sdp_utils.cpp, use_flash_attention and
    use_mem_efficient_attention), and that kernel also under the mask of packed rows, which flash does not take.
    """
    native = functional.scaled_dot_product_attention
    half = compute in ("bf16", "fp16") and bf16

    def attention(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
    ) -> torch.Tensor:  # fmt: skip
        if query.device.type != DEVICE:
            return native(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        width = query.shape[-1]
        scale = scale if scale is not None else 1 / math.sqrt(width)
        bias = None
        if attn_mask is not None:  # convert_boolean_attn_mask, then expanded without a copy
            bias = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(attn_mask.logical_not(), -math.inf)
            bias = bias.expand(query.shape[0], query.shape[1], -1, -1)
        elif half and width <= 256:
            if width % 8:  # pad_last_dim<8> in aten/src/ATen/native/transformers/attention.cpp
                query, key, value = (functional.pad(t, (0, 8 - width % 8)) for t in (query, key, value))
            flash = torch.ops.aten._scaled_dot_product_flash_attention
            return flash(query, key, value, dropout_p, is_causal, False, scale=scale)[0][..., :width]
        if enable_gqa:  # only flash reads grouped keys; pre_process_group_query_attention_input repeats them
            groups = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        efficient = torch.ops.aten._scaled_dot_product_efficient_attention
        return efficient(query, key, value, bias, True, dropout_p, is_causal, scale=scale)[0]

    replaced: Any = functional
    replaced.scaled_dot_product_attention = attention
