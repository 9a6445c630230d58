"""A model of the CUDA caching allocator, to tell from a trace what a card would have reserved.

Written after c10/cuda/CUDACachingAllocator.cpp and c10/core/AllocatorConfig.h of torch 2.13: sizes are rounded to 512 B;
requests up to 1 MiB share segments of 2 MiB, those below 10 MiB segments of 20 MiB, larger ones get a segment of their own
rounded to 2 MiB; a free block is taken best fit and split; neighbours are merged when freed; every stream has its own free
blocks. With expandable segments there is one growing range of addresses for each stream and pool, mapped in steps of 2 or
20 MiB. When the budget is exceeded, what is wholly free is given back once and the request is tried again.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from orchestrator.planner.trace import Event, Trace
from orchestrator.units import MIB, align_up

SMALLEST_BLOCK = 512
SMALL_REQUEST = MIB
SMALL_SEGMENT = 2 * MIB
LARGE_REQUEST = 10 * MIB
LARGE_SEGMENT = 20 * MIB
LARGE_ROUNDING = 2 * MIB
ADDRESS_RANGE = 1 << 44
"""Addresses between two segments of this model, and the length of an expandable one: no card has that much memory."""


@dataclass(frozen=True, slots=True)
class Replay:
    """What the allocator would have said.

    Attributes:
        peak_allocated: `torch.cuda.max_memory_allocated()`: rounded bytes in use.
        peak_reserved: `torch.cuda.max_memory_reserved()`: bytes taken from the driver.
        by_phase: phase to its own (peak allocated, peak reserved).
        fits: whether every request was served within the budget.
        failed_phase: the phase of the first request that was not; None if it fits.
        retries: how often cached memory had to be given back first; each one stalls the card.
    """

    peak_allocated: int
    peak_reserved: int
    by_phase: Mapping[str, tuple[int, int]]
    fits: bool = True
    failed_phase: str | None = None
    retries: int = 0


class OutOfMemory(Exception):
    """A request that the budget does not allow, even after giving back every free segment."""


class _Block:
    __slots__ = ("address", "allocated", "expandable", "mapped", "next", "previous", "size")

    def __init__(self, address: int, size: int, *, expandable: bool, mapped: bool = True) -> None:
        self.address, self.size = address, size
        self.allocated, self.mapped, self.expandable = False, mapped, expandable
        self.previous: _Block | None = None
        self.next: _Block | None = None

    @property
    def free(self) -> bool:
        return self.mapped and not self.allocated


class _Pool:
    """The free blocks of one stream and one size class, ordered by (size, address), and where its segment may grow."""

    def __init__(self, small: bool) -> None:
        self.small = small
        self.step = SMALL_SEGMENT if small else LARGE_SEGMENT
        self._keys: list[tuple[int, int]] = []
        self._blocks: dict[int, _Block] = {}
        self.unmapped: list[tuple[int, _Block]] = []
        """Parts of expandable segments without memory, by address."""

    def insert(self, block: _Block) -> None:
        insort(self._keys, (block.size, block.address))
        self._blocks[block.address] = block

    def remove(self, block: _Block) -> None:
        del self._keys[bisect_left(self._keys, (block.size, block.address))]
        del self._blocks[block.address]

    def best_fit(self, size: int, *, expandable: bool) -> _Block | None:
        """The smallest block of at least `size`, taken out; None if there is none."""
        keys = self._keys
        at = bisect_left(keys, (size, 0))
        if at == len(keys):
            return None
        block = self._blocks[keys[at][1]]
        if expandable:
            # The end of a segment counts as large as it could grow, so that it is kept for last.
            while (block.previous or block.next) and at + 1 < len(keys):
                following = self._blocks[keys[at + 1][1]]
                if _room(following) >= _room(block):
                    break
                block, at = following, at + 1
        self.remove(block)
        return block

    def blocks(self) -> list[_Block]:
        """All free blocks in order of size and address."""
        return [self._blocks[address] for _, address in self._keys]


def _room(block: _Block) -> int:
    after = block.next
    return block.size + (after.size if after is not None and not after.mapped else 0)


def round_size(size: int) -> int:
    """Bytes that a request of `size` takes: a multiple of 512, at least 512."""
    return align_up(max(size, 1), SMALLEST_BLOCK)


def segment_size(size: int) -> int:
    """Bytes that are asked of the driver when no cached block can serve a rounded request."""
    if size <= SMALL_REQUEST:
        return SMALL_SEGMENT
    if size < LARGE_REQUEST:
        return LARGE_SEGMENT
    return align_up(size, LARGE_ROUNDING)


class CachingAllocator:
    """The allocator of one card. `budget`: bytes that may be reserved (None: no limit). `card`: all its memory, of which an
    expandable segment has 9/8 in addresses (None: the budget)."""

    def __init__(self, *, expandable: bool, budget: int | None = None, card: int | None = None) -> None:
        self.expandable, self.budget = expandable, budget
        self.card = budget if card is None else card
        self.allocated = self.reserved = self.peak_allocated = self.peak_reserved = 0
        self.retries = 0
        self._pools: dict[tuple[bool, int], _Pool] = {}
        self._next_address = ADDRESS_RANGE

    def allocate(self, size: int, stream: int = 0) -> tuple[_Block, _Pool]:
        """The block that serves `size` > 0 bytes on `stream`, and its pool.

        Raises:
            OutOfMemory: the budget does not allow it.
        """
        rounded = round_size(size)
        key = (rounded <= SMALL_REQUEST, stream)
        pool = self._pools.get(key)
        if pool is None:
            pool = self._pools[key] = _Pool(key[0])
        block = pool.best_fit(rounded, expandable=self.expandable) or self._grow(pool, rounded)
        rest = block.size - rounded
        if rest >= SMALLEST_BLOCK if pool.small or self.expandable else rest > SMALL_REQUEST:
            self._split(pool, block, rounded)
        block.allocated = True
        self.allocated += block.size
        self.peak_allocated = max(self.peak_allocated, self.allocated)
        return block, pool

    def free(self, block: _Block, pool: _Pool) -> None:
        """Take back a block, merging it with free neighbours."""
        self.allocated -= block.size
        block.allocated = False
        self._settle(block, pool)

    # Inside --------------------------------------------------------------------------------------------------------

    def _settle(self, block: _Block, pool: _Pool) -> None:
        """Merge a block that became free with its free neighbours and put it into the pool."""
        for neighbour in (block.previous, block.next):
            if neighbour is not None and neighbour.free:
                pool.remove(neighbour)
                block = _merged(block, neighbour)
        pool.insert(block)

    @staticmethod
    def _split(pool: _Pool, block: _Block, size: int) -> None:
        rest = _Block(block.address + size, block.size - size, expandable=block.expandable)
        rest.previous, rest.next = block, block.next
        if rest.next is not None:
            rest.next.previous = rest
        block.next, block.size = rest, size
        pool.insert(rest)

    def _grow(self, pool: _Pool, size: int) -> _Block:
        """A free block of at least `size`, which is rounded, with memory from the driver; it is in no pool."""
        for attempt in (0, 1):
            block = self._map(pool, size) if self.expandable else self._segment(segment_size(size))
            if block is not None:
                return block
            if attempt == 0:
                self.retries += 1
                self._release()
        raise OutOfMemory

    def _take(self, size: int) -> bool:
        """Reserve `size` bytes if the budget allows it."""
        if self.budget is not None and self.reserved + size > self.budget:
            return False
        self.reserved += size
        self.peak_reserved = max(self.peak_reserved, self.reserved)
        return True

    def _segment(self, size: int) -> _Block | None:
        if not self._take(size):
            return None
        block = _Block(self._next_address, size, expandable=False)
        self._next_address += ADDRESS_RANGE
        return block

    def _map(self, pool: _Pool, size: int) -> _Block | None:
        """try_allocate_expandable_block: grow the segment from the free block at its end, in whole steps."""
        candidate = self._expandable(pool, size)
        if not candidate.mapped:
            mapped = self._map_block(pool, candidate, min(candidate.size, size))
            if mapped is None:
                return None
            candidate = mapped
        while candidate.size < size:
            assert candidate.next is not None, "the range of addresses was found large enough"
            mapped = self._map_block(pool, candidate.next, min(size - candidate.size, candidate.next.size))
            if mapped is None:
                return None
            candidate = mapped
        pool.remove(candidate)
        return candidate

    def _expandable(self, pool: _Pool, size: int) -> _Block:
        """The free or unmapped block from which `size` bytes of addresses follow that are free or unmapped."""
        for _, unmapped in pool.unmapped:
            first = unmapped.previous if unmapped.previous is not None and unmapped.previous.free else unmapped
            room = 0
            block: _Block | None = first
            while block is not None and not block.allocated and room < size:
                room += block.size
                block = block.next
            if room >= size:
                return first
        length = ADDRESS_RANGE if self.card is None else align_up(self.card + self.card // 8, pool.step)
        block = _Block(self._next_address, length, expandable=True, mapped=False)
        self._next_address += 2 * ADDRESS_RANGE
        insort(pool.unmapped, (block.address, block), key=lambda item: item[0])
        return block

    def _map_block(self, pool: _Pool, block: _Block, size: int) -> _Block | None:
        """Give memory to the first `size` bytes of an unmapped block, rounded up to steps; the free block that results."""
        size = min(align_up(size, pool.step), block.size)
        if not self._take(size):
            return None
        pool.unmapped.remove((block.address, block))
        if size < block.size:
            rest = _Block(block.address + size, block.size - size, expandable=True, mapped=False)
            rest.previous, rest.next = block, block.next
            if rest.next is not None:
                rest.next.previous = rest
            block.next, block.size = rest, size
            insort(pool.unmapped, (rest.address, rest), key=lambda item: item[0])
        block.mapped = True
        previous, following = block.previous, block.next
        for neighbour in (previous, following):
            if neighbour is not None and neighbour.free:
                pool.remove(neighbour)
                block = _merged(block, neighbour)
        pool.insert(block)
        return block

    def _release(self) -> None:
        """release_cached_blocks: give wholly free segments, and wholly free steps of expandable ones, back to the driver."""
        for pool in sorted(self._pools.values(), key=lambda pool: pool.small):
            for block in pool.blocks():
                if block.expandable:
                    self._unmap(pool, block)
                elif block.previous is None and block.next is None:
                    pool.remove(block)
                    self.reserved -= block.size

    def _unmap(self, pool: _Pool, block: _Block) -> None:
        base = block.address // ADDRESS_RANGE * ADDRESS_RANGE  # steps are counted from the start of the segment
        start = base + align_up(block.address - base, pool.step)
        end = base + (block.address - base + block.size) // pool.step * pool.step
        if end <= start:
            return
        pool.remove(block)
        self.reserved -= end - start
        after = block.address + block.size - end
        if start > block.address:
            free = _Block(block.address, start - block.address, expandable=True)
            _insert_before(block, free)
            pool.insert(free)
        if after:
            free = _Block(end, after, expandable=True)
            _insert_after(block, free)
            pool.insert(free)
        block.address, block.size, block.mapped = start, end - start, False
        for neighbour in (block.previous, block.next):
            if neighbour is not None and not neighbour.mapped:
                pool.unmapped.remove((neighbour.address, neighbour))
                block = _merged(block, neighbour)
        insort(pool.unmapped, (block.address, block), key=lambda item: item[0])


def _merged(block: _Block, neighbour: _Block) -> _Block:
    """`block` grown by the block right before or right after it."""
    if neighbour is block.previous:
        block.address = neighbour.address
        block.previous = neighbour.previous
        if block.previous is not None:
            block.previous.next = block
    else:
        block.next = neighbour.next
        if block.next is not None:
            block.next.previous = block
    block.size += neighbour.size
    return block


def _insert_before(block: _Block, new: _Block) -> None:
    new.previous, new.next = block.previous, block
    if new.previous is not None:
        new.previous.next = new
    block.previous = new


def _insert_after(block: _Block, new: _Block) -> None:
    new.previous, new.next = block, block.next
    if new.next is not None:
        new.next.previous = new
    block.next = new


def replay(
    events: Trace | Iterable[Event],
    *,
    expandable: bool,
    budget: int | None = None,
    card: int | None = None,
    home: str = "gpu",
) -> Replay:
    """What the caching allocator of a card would hold while `events` happen.

    Args:
        events: a trace, or its events in order. Only those of `home` count.
        expandable: PYTORCH_ALLOC_CONF=expandable_segments:True.
        budget: bytes that the allocator may reserve: the card's memory less what context, NCCL and others take; None: no limit.
        card: all the card's memory; None: the budget.

    Returns:
        The peaks, rounded as the allocator rounds; up to the failing request where it does not fit.
    """
    allocator = CachingAllocator(expandable=expandable, budget=budget, card=card)
    held: dict[int, tuple[_Block, _Pool]] = {}
    segments = events.segments if isinstance(events, Trace) else None
    peaks: dict[str, list[int]] = {}
    failed: str | None = None
    segment, phase, here = -1, "", [0, 0]
    for block, size, note in events:
        if note.home != home:
            continue
        if note.segment != segment:
            segment = note.segment
            phase = segments[segment] if segments is not None else str(segment)
            here = peaks.setdefault(phase, [0, 0])
            here[0], here[1] = max(here[0], allocator.allocated), max(here[1], allocator.reserved)
        if block > 0:
            try:
                held[block] = allocator.allocate(size, note.stream)
            except OutOfMemory:
                failed = phase
                break
            here[0], here[1] = max(here[0], allocator.allocated), max(here[1], allocator.reserved)
        elif -block in held:
            allocator.free(*held.pop(-block))
    return Replay(
        allocator.peak_allocated, allocator.peak_reserved, {phase: (p[0], p[1]) for phase, p in peaks.items()},
        failed is None, failed, allocator.retries,
    )  # fmt: skip
