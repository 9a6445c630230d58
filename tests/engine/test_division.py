"""Parts of divided parameters as runs of the whole: wherever a run begins and ends, inside a row of columns too."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.engine.protocol import Piece
from orchestrator.engine.tensor_parallel import TensorParallel
from orchestrator.spec import Division

WIDTH = 6
KINDS = {"rows": Division.ROWS, "columns": Division.COLUMNS, "whole": Division.WHOLE}


def place(rank: int, size: int) -> TensorParallel:
    """Rank `rank` of a group of `size` that does not exist."""
    found = TensorParallel(None)
    found.size, found.rank = size, rank
    found._kinds.update(KINDS)
    return found


def part_of(whole: torch.Tensor, kind: Division, rank: int, size: int) -> torch.Tensor:
    if kind is Division.WHOLE:
        return whole
    return whole.chunk(size, dim=0 if kind is Division.ROWS else 1)[rank].contiguous()


@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from(list(KINDS)), size=st.integers(2, 4), rows=st.integers(1, 4),
    cuts=st.lists(st.integers(0, 10_000), max_size=4),
)  # fmt: skip
def test_runs_of_a_part_are_saved_where_they_lie_in_the_whole_and_read_back(
    name: str, size: int, rows: int, cuts: list[int]
) -> None:
    """However an engine cuts the flattened part, its pieces fill the whole once, and each run is read back as it was."""
    whole = torch.arange(float(rows * size * WIDTH * size)).view(rows * size, WIDTH * size)
    saved = torch.full_like(whole, math.nan)
    for rank in range(size):
        tensor, part = place(rank, size), part_of(whole, KINDS[name], rank, size)
        flat = part.reshape(-1)
        ends = sorted({0, *(cut % (flat.numel() + 1) for cut in cuts), flat.numel()})
        runs = list(pairwise(ends))
        pieces = [Piece(name, "weight", tuple(part.shape), start, flat[start:stop], True) for start, stop in runs]
        for piece in tensor.placed(pieces):
            assert piece.shape == tuple(whole.shape)
            if not piece.owned:
                continue
            if piece.columns is None:
                target = saved.view(-1)[piece.start : piece.start + piece.data.numel()]
            else:
                first, last = piece.columns
                row = piece.start // whole.shape[1]
                target = saved[row : row + piece.data.numel() // (last - first), first:last]
            assert bool(target.isnan().all())
            target.copy_(piece.data.view(target.shape))
        read = tensor.reader(lambda _, __, start, stop: whole.view(-1)[start:stop], {name: tuple(part.shape)})
        for start, stop in runs:
            assert torch.equal(read(name, "weight", start, stop), flat[start:stop])
    assert torch.equal(saved, whole)
