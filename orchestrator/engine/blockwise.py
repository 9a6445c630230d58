"""AdamW with states of 8 bits: bitsandbytes' kernels on this rank's part of each tensor (arXiv:2110.02861).

256 elements share a scale, and a code says which of 256 values between -1 and 1 an element is. A checkpoint keeps the values
themselves in fp32, so that every strategy and every AdamW reads them. Rounding them again gives the same codes only with the
same scales, and the largest value of a block does not tell its scale (the codes reach 1, but not -1): the scales are kept
beside them, by fragment, for a resume under the strategy that saved.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

import torch

from orchestrator.engine.states import Elementwise, Fragment, Read, State
from orchestrator.engine.updates import chunks, flat, kernels, like
from orchestrator.layout.moments import BLOCK, CHUNK, SMALLEST_PAGED, SMALLEST_QUANTIZED
from orchestrator.spec import Optimizer
from orchestrator.units import ceil_div

KINDS = ("exp_avg", "exp_avg_sq")
SCALE = "scale"


@lru_cache(maxsize=1)
def codebooks() -> tuple[list[float], list[float]]:
    """The 256 values of a code, signed for the first moment and unsigned for the second."""
    kernels()
    from bitsandbytes.functional import create_dynamic_map

    return create_dynamic_map(signed=True).tolist(), create_dynamic_map(signed=False).tolist()


class AdamW8bit:
    """The rule; small tensors keep fp32 states. `paged`: the codes of large tensors lie in CUDA's managed memory, which the
    driver moves to the host when the card is full."""

    def __init__(self, spec: Optimizer, paged: bool) -> None:
        self.spec, self.paged, self.kernels = spec, paged, kernels()
        self._values = dict(zip(KINDS, codebooks(), strict=True))
        self._books: dict[tuple[str, torch.device], torch.Tensor] = {}
        self.codec = Blockwise(self)

    def book(self, kind: str, device: torch.device) -> torch.Tensor:
        """The values of the codes of `kind`, fp32, on `device`."""
        if (kind, device) not in self._books:
            self._books[kind, device] = torch.tensor(self._values[kind], dtype=torch.float32, device=device)
        return self._books[kind, device]

    def fresh(self, tensor: torch.Tensor) -> State:
        own = flat(tensor)
        if own.numel() < SMALLEST_QUANTIZED:
            return {kind: like(own) for kind in KINDS}
        state: State = {}
        for kind in KINDS:
            state[kind] = self._codes(own)
            state[f"{kind}.{SCALE}"] = torch.zeros(ceil_div(own.numel(), BLOCK), dtype=torch.float32, device=own.device)
            state[f"{kind}.book"] = self.book(kind, own.device)
        return state

    def _codes(self, own: torch.Tensor) -> torch.Tensor:
        if not self.paged or own.numel() < SMALLEST_PAGED:
            return torch.zeros(own.numel(), dtype=torch.uint8, device=own.device)
        import bitsandbytes.functional as managed

        codes: torch.Tensor = managed.get_paged(own.numel(), dtype=torch.uint8, device=own.device)
        managed.fill(codes, 0)
        return codes

    def update(self, tensor: torch.Tensor, gradient: torch.Tensor | None, state: State, lr: float) -> None:
        if gradient is None:
            return
        spec, weights, slopes = self.spec, flat(tensor), gradient.reshape(-1)
        (beta1, beta2), first, second = spec.betas, *(state[kind].view(-1) for kind in KINDS)
        for part in chunks(weights.numel()):
            if first.dtype == torch.float32:
                self.kernels.optimizer_update_32bit(
                    "adam", slopes[part], weights[part], first[part], second[part], None, 0.0, 0.0, beta1, beta2, 0.0, 0.0,
                    spec.eps, spec.weight_decay, state["step"], lr, 1.0, False,
                )  # fmt: skip
                continue
            blocks = slice(part.start // BLOCK, ceil_div(part.stop, BLOCK))
            scales = [state[f"{kind}.{SCALE}"][blocks] for kind in KINDS]
            books = [state[f"{kind}.book"] for kind in KINDS]
            self.kernels.optimizer_update_8bit_blockwise(
                "adam", slopes[part], weights[part], first[part], second[part], beta1, beta2, 0.0, 0.0, spec.eps,
                state["step"], lr, *books, *scales, spec.weight_decay, 1.0, False,
            )  # fmt: skip
        if self.paged and weights.is_cuda:
            torch.cuda.synchronize(weights.device)  # the driver may move pages only when nothing works on them


class Blockwise:
    """Codes and scales as fp32 values, chunk by chunk, and back."""

    def __init__(self, rule: AdamW8bit) -> None:
        self._rule, self._exact = rule, Elementwise(KINDS)

    def _values(self, state: State, kind: str, part: slice) -> torch.Tensor:
        scales: torch.Tensor = state[f"{kind}.{SCALE}"]
        blocks = slice(part.start // BLOCK, ceil_div(part.stop, BLOCK))
        codes = state[kind][blocks.start * BLOCK : min(blocks.stop * BLOCK, state[kind].numel())].to(scales.device)
        values: torch.Tensor = self._rule.kernels.dequantize_blockwise(
            codes, scales[blocks], state[f"{kind}.book"], BLOCK, torch.float32
        )
        return values[part.start - blocks.start * BLOCK :][: part.stop - part.start]

    def saved(self, state: State, fragment: Fragment) -> Iterator[tuple[str, int, torch.Tensor]]:
        if state[KINDS[0]].dtype == torch.float32:
            yield from self._exact.saved(state, fragment)
            return
        for kind in KINDS:
            for part in chunks(fragment.count):
                own = slice(fragment.offset + part.start, fragment.offset + part.stop)
                yield kind, fragment.start + part.start, self._values(state, kind, own)
            yield self._scale_kind(kind, fragment), 0, state[f"{kind}.{SCALE}"][self._blocks(fragment)]

    @staticmethod
    def _blocks(fragment: Fragment) -> slice:
        return slice(fragment.offset // BLOCK, ceil_div(fragment.offset + fragment.count, BLOCK))

    @staticmethod
    def _scale_kind(kind: str, fragment: Fragment) -> str:
        return f"{kind}.{SCALE}@{fragment.start}"

    def restore(self, state: State, fragments: Sequence[Fragment], read: Read, same_blocks: bool) -> None:
        if state[KINDS[0]].dtype == torch.float32:
            self._exact.restore(state, fragments, read, same_blocks)
            return
        for kind in KINDS:
            scales = state[f"{kind}.{SCALE}"]
            if same_blocks:
                for fragment in fragments:
                    blocks = self._blocks(fragment)
                    saved = read(fragment.name, self._scale_kind(kind, fragment), 0, blocks.stop - blocks.start)
                    scales[blocks].copy_(saved)
            for part in chunks(state[kind].numel(), CHUNK):
                self._round(state, kind, part, _gathered(kind, fragments, part, read).to(scales.device), same_blocks)

    def _round(self, state: State, kind: str, part: slice, values: torch.Tensor, same_blocks: bool) -> None:
        book, scales = state[f"{kind}.book"], state[f"{kind}.{SCALE}"]
        blocks = slice(part.start // BLOCK, ceil_div(part.stop, BLOCK))
        if same_blocks:
            state[kind][part].copy_(nearest(values, scales[blocks], book))
            return
        codes, found = self._rule.kernels.quantize_blockwise(values, book, BLOCK)
        state[kind][part].copy_(codes)
        scales[blocks].copy_(found)


def nearest(values: torch.Tensor, scales: torch.Tensor, book: torch.Tensor) -> torch.Tensor:
    """The codes, uint8, of `values` that are multiples of a value of `book` by the scale of their block."""
    each = scales.repeat_interleave(BLOCK)[: values.numel()]
    shares = torch.where(each > 0, values / each, torch.zeros_like(values))
    between = (book[1:] + book[:-1]) / 2
    return torch.searchsorted(between, shares).to(torch.uint8)


def _gathered(kind: str, fragments: Sequence[Fragment], part: slice, read: Read) -> torch.Tensor:
    """The values of elements `part` of a tensor, fp32 on the CPU; zero where they belong to no parameter."""
    values = torch.zeros(part.stop - part.start, dtype=torch.float32)
    for fragment in fragments:
        first, last = max(part.start, fragment.offset), min(part.stop, fragment.offset + fragment.count)
        if first < last:
            shift = fragment.start - fragment.offset
            values[first - part.start : last - part.start].copy_(read(fragment.name, kind, first + shift, last + shift))
    return values
