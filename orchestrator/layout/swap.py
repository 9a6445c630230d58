"""What DeepSpeed's swappers keep on a local disk, in which pieces, and what stays in host memory for it.

Read from deepspeed 0.19.8: runtime/swap_tensor/{partitioned_param_swapper,optimizer_utils,utils,async_swapper}.py and
runtime/zero/stage3.py (_create_fp16_sub_groups, _create_fp32_partitions, partition_grads).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.layout.rows import STEPPED, Row
from orchestrator.spec import Home, Nvme, Parameter, Strategy
from orchestrator.units import MIB, align_up, ceil_div, dtype_bytes

SMALLEST_BYTES = MIB
"""A tensor below this (or below one request, where that is larger) stays in host memory (utils.py MIN_AIO_BYTES)."""

ALIGNED_BYTES = 1024
"""Each thread moves a multiple of this (utils.py AIO_ALIGNED_BYTES)."""

STATE_BUFFERS = 4
"""Buffers for the largest sub-group: master, both moments, and its gradient (offload_config.py buffer_count)."""

MASTER = "fp32"


@dataclass(frozen=True, slots=True)
class Swap:
    """The swappers' rules for one setting."""

    nvme: Nvme

    def moves(self, elements: int, dtype: str) -> bool:
        """Whether a tensor of so many elements goes to the disk."""
        return elements * dtype_bytes(dtype) >= max(SMALLEST_BYTES, self.nvme.block_bytes)

    def unit(self, dtype: str) -> int:
        """Elements of which every transfer is a multiple."""
        return ALIGNED_BYTES * self.nvme.threads // dtype_bytes(dtype)

    def padded(self, elements: int, dtype: str) -> int:
        """Elements of the file, or of the buffer, for a tensor."""
        return align_up(elements, self.unit(dtype))

    def whole_units(self, elements: int, dtype: str) -> int:
        """Elements of a gradient that are swapped; what is left over stays in host memory until the update."""
        return elements // self.unit(dtype) * self.unit(dtype)


def sub_groups(sizes: Sequence[int], limit: int) -> list[list[int]]:
    """Indices of the parameters that are updated together: a sub-group is closed once it has reached `limit` elements."""
    if sum(sizes) <= limit:
        return [list(range(len(sizes)))] if sizes else []
    groups: list[list[int]] = [[]]
    held = 0
    for index, size in enumerate(sizes):
        if held >= limit:
            groups.append([])
            held = 0
        groups[-1].append(index)
        held += size
    return groups


def _part(parameter: Parameter, ranks: int) -> int:
    return ceil_div(parameter.numel, ranks)


def _own(parameter: Parameter, ranks: int, rank: int) -> int:
    """Elements of the parameter itself, without padding, in the part of `rank`."""
    part = _part(parameter, ranks)
    return max(0, min(part, parameter.numel - rank * part))


def weight_rows(strategy: Strategy, parameters: Sequence[Parameter], line: str, compute: str) -> tuple[Row, ...]:
    """Rows of working copies that rest on the disk, each part in a file of its own, and of those too small for it."""
    assert strategy.nvme is not None, "a strategy with a home on NVMe says how it swaps"
    swap, ranks = Swap(strategy.nvme), strategy.dp_shard
    parts = [_part(p, ranks) for p in parameters]
    away = [part for part in parts if swap.moves(part, compute)]
    stored = sum(swap.padded(part, compute) for part in away)
    return (
        Row(line, compute, Home.NVME, stored, ranks, padding=stored - sum(away)),
        Row(line, compute, Home.CPU, sum(parts) - sum(away), ranks),
    )


def state_rows(strategy: Strategy, trainable: Sequence[Parameter], rank: int) -> tuple[Row, ...]:
    """Rows of masters, moments and fp32 gradients, which move by sub-group; small sub-groups stay in host memory whole."""
    assert strategy.nvme is not None and strategy.buckets is not None, "a swapping strategy carries both"
    swap, ranks = Swap(strategy.nvme), strategy.dp_shard
    parts = [_part(p, ranks) for p in trainable]
    stored = resting = gradients = 0
    for group in sub_groups(parts, strategy.buckets.sub_group):
        size = sum(parts[index] for index in group)
        if not swap.moves(size, MASTER):
            resting += size
            continue
        stored += swap.padded(size, MASTER)
        reduced = [_own(trainable[index], ranks, rank) and parts[index] for index in group]
        gradients += sum(swap.whole_units(part, MASTER) for part in reduced if swap.moves(part, MASTER))
    return (
        Row("master", MASTER, Home.NVME, stored, ranks),
        Row("moments", MASTER, Home.NVME, 2 * stored, ranks, since=STEPPED),
        Row("gradients", MASTER, Home.NVME, gradients, ranks, since=STEPPED),
        Row("master", MASTER, Home.CPU, resting, ranks),
        Row("moments", MASTER, Home.CPU, 2 * resting, ranks, since=STEPPED),
        Row("gradients", MASTER, Home.CPU, resting, ranks),
    )


def _largest_group(strategy: Strategy, trainable: Sequence[Parameter]) -> list[Parameter]:
    """The parameters of the sub-group with the largest parts; of equal ones the first."""
    assert strategy.buckets is not None, "a swapping strategy carries its buckets"
    parts = [_part(p, strategy.dp_shard) for p in trainable]
    groups = sub_groups(parts, strategy.buckets.sub_group)
    return [trainable[index] for index in max(groups, key=lambda group: sum(parts[index] for index in group), default=[])]


def swapped_at_once(strategy: Strategy, trainable: Sequence[Parameter]) -> int:
    """Elements of the largest sub-group on a rank: what is in memory of each state at once."""
    return sum(_part(p, strategy.dp_shard) for p in _largest_group(strategy, trainable))


def buffer_rows(strategy: Strategy, trainable: Sequence[Parameter], compute: str) -> tuple[Row, ...]:
    """Page-locked host memory through which everything passes."""
    nvme = strategy.nvme
    if nvme is None:
        return ()
    swap = Swap(nvme)
    rows = []
    if strategy.parameter_home is Home.NVME:
        through = nvme.buffer_count * swap.padded(nvme.buffer_size, compute)
        # stage3.py reserves for whole parameters where parts pass (reserve_partitioned_swap_space).
        updated = sum(swap.padded(p.numel, compute) for p in _largest_group(strategy, trainable))
        rows.append(Row("staging", compute, Home.CPU, through + updated))
    if strategy.optimizer_home is Home.NVME:
        rows.append(Row("staging", MASTER, Home.CPU, STATE_BUFFERS * swap.padded(swapped_at_once(strategy, trainable), MASTER)))
    return tuple(rows)
