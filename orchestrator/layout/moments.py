"""What each optimizer keeps for the tensors that it updates: elements at rest, and what its update needs for itself.

The states are those of `engine/optimizers.py`; `Held` is one tensor as the optimizer sees it on a rank: a whole parameter, a
shard of one, or a flat buffer of many.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from orchestrator.layout.rows import STEPPED, Buffer, Row
from orchestrator.spec import ROOT, Home, Optimizer, Parameter
from orchestrator.units import DTYPE_BYTES, ceil_div

MASTER = "fp32"
BLOCK = 256
"""Elements that share one scale in 8 bits (bitsandbytes optim/optimizer.py, init_state)."""

SMALLEST_QUANTIZED = 4096
"""Tensors with fewer elements keep fp32 states (bitsandbytes optim/optimizer.py, min_8bit_size)."""

SMALLEST_PAGED = 100_000
"""Tensors with fewer elements keep their states on the card (bitsandbytes optim/optimizer.py, get_state_buffer)."""

CODEBOOKS = 2 * 256
"""The values of the 8-bit codes, signed and unsigned, once on a rank."""

CHUNK = 2**22
"""Elements that are updated at once by what has no kernel that works in place: bounds its temporaries."""


@dataclass(frozen=True, slots=True)
class Held:
    """`shape` of the tensor on this rank, and of it `padding` elements that belong to no parameter; `hidden`: a matrix of a
    transformer block."""

    shape: tuple[int, ...]
    hidden: bool = False
    padding: int = 0

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def hidden_matrix(parameter: Parameter) -> bool:
    """Whether Muon updates `parameter`: a matrix inside a block (embeddings, head and vectors are AdamW's)."""
    return parameter.block != ROOT and len(parameter.shape) == 2


def whole(parameters: Sequence[Parameter]) -> tuple[Held, ...]:
    """Parameters that the optimizer sees as they are."""
    return tuple(Held(p.shape, hidden_matrix(p)) for p in parameters)


Count = tuple[str, bool, int]
"""(dtype, whether it can be paged out to the host, elements)."""


def _two(dtype: str) -> Callable[[Held], tuple[Count, ...]]:
    return lambda held: ((dtype, False, 2 * held.numel),)


def _one(held: Held) -> tuple[Count, ...]:
    return ((MASTER, False, held.numel),)


def _eight_bit(held: Held) -> tuple[Count, ...]:
    if held.numel < SMALLEST_QUANTIZED:
        return ((MASTER, False, 2 * held.numel),)
    scales = 2 * ceil_div(held.numel, BLOCK)
    return (("uint8", held.numel >= SMALLEST_PAGED, 2 * held.numel), (MASTER, False, scales))


def _factored(held: Held) -> tuple[Count, ...]:
    if len(held.shape) != 2:
        return _one(held)
    rows, columns = held.shape
    return ((MASTER, False, rows + columns if rows else 0),)


def _muon(held: Held) -> tuple[Count, ...]:
    return _one(held) if held.hidden else _two(MASTER)(held)


STATES: dict[str, Callable[[Held], tuple[Count, ...]]] = {
    "adamw": _two(MASTER),
    "adamw_bf16": _two("bf16"),
    "adamw_8bit": _eight_bit,
    "paged_adamw_8bit": _eight_bit,
    "adafactor": _factored,
    "lion": _one,
    "muon": _muon,
}
"""States of one held tensor, by `Optimizer.name`."""

NEEDS_MATRICES = frozenset({"adafactor", "muon"})
"""Optimizers that must see rows and columns: flat partitions make their arithmetic meaningless."""


def saved_bytes(optimizer: Optimizer, parameters: Sequence[Parameter]) -> int:
    """Bytes that a checkpoint holds of the trained `parameters`: fp32 weights, and states with 8-bit codes as fp32 values."""
    sizes = DTYPE_BYTES | {"uint8": DTYPE_BYTES[MASTER]}
    states = (count for held in whole(parameters) for count in STATES[optimizer.name](held))
    return sum(p.numel for p in parameters) * sizes[MASTER] + sum(sizes[dtype] * elements for dtype, _, elements in states)


def moment_rows(optimizer: Optimizer, tensors: Sequence[Held], home: Home, shards: int = 1) -> tuple[Row, ...]:
    """The rows "moments" of a rank, one for each dtype and home, from the first step on."""
    elements: dict[tuple[str, Home], int] = {}
    padding: dict[tuple[str, Home], int] = {}
    for held in tensors:
        for dtype, pageable, count in STATES[optimizer.name](held):
            key = (dtype, Home.CPU if pageable and optimizer.name.startswith("paged") else home)
            elements[key] = elements.get(key, 0) + count
            padding[key] = padding.get(key, 0) + (count // held.numel * held.padding if held.numel else 0)
    if any(dtype == "uint8" for dtype, _ in elements):
        elements[MASTER, home] = elements.get((MASTER, home), 0) + CODEBOOKS
    return tuple(
        Row("moments", dtype, at, count, shards, padding.get((dtype, at), 0), since=STEPPED)
        for (dtype, at), count in elements.items()
    )


def _chunked(size: int) -> Callable[[Sequence[Held]], int]:
    return lambda tensors: min(CHUNK, max((held.numel for held in tensors), default=0)) * size


def _orthogonal(tensors: Sequence[Held]) -> int:
    """Newton-Schulz on one whole matrix (torch/optim/_muon.py): the matrix in fp32, twice in bf16, and two squares of its
    shorter side."""

    def one(shape: tuple[int, ...]) -> int:
        short, long = min(shape), max(shape)
        return short * long * (4 + 2 + 2) + 2 * 2 * short * short

    return max((one(held.shape) for held in tensors if held.hidden), default=0)


def update_buffer(
    optimizer: Optimizer, parameters: Sequence[Parameter], tensors: Sequence[Held], home: Home
) -> tuple[Buffer, ...]:
    """What the update holds for itself, at most: nothing where a kernel does all in place."""
    name = optimizer.name
    if name == "muon":
        # Each rank gathers the whole matrix, and holds its own part of the update beside it.
        size = _orthogonal(whole(parameters)) + 4 * max((held.numel for held in tensors if held.hidden), default=0)
        return (Buffer("update", Home.GPU, size, ("step",), "engine/muon.py, torch/optim/_muon.py"),)
    if name == "adamw_bf16":
        return (Buffer("update", home, _chunked(16)(tensors), ("step",), "engine/updates.py AdamWBf16"),)
    if name == "adafactor":
        return (Buffer("update", home, _chunked(8)(tensors), ("step",), "engine/adafactor.py"),)
    return ()
