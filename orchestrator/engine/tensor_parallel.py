"""Tensor parallelism: the ranks of a group compute a part of each block, and of the vocabulary, on the same samples.

Shoeybi et al., arXiv:1909.08053, section 3: attention and MLP begin with matrices cut by rows and end with one cut by columns,
so that each half of a block sums its output over the group once in the forward and the gradient of its input once in the
backward. Parameters are ordinary tensors of their part's shape: PEFT's adapters, recompute and `fully_shard` work on them
unchanged, and what each rank holds is a slice of the whole tensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import loss_parallel
from torch.nn import functional

from orchestrator.engine.materialize import StoredWeights
from orchestrator.engine.protocol import LossGivingHead, Piece, Weights
from orchestrator.engine.states import READ_AT_ONCE, Read
from orchestrator.spec import Division, division
from orchestrator.spec.division import INPUTS, OUTPUTS, VOCABULARY
from orchestrator.units import align_up


class _Spread(torch.autograd.Function):
    """The tensor itself; backward, its gradient summed over the group: what every rank computes from it is a part."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        # Only linear layers read the result, and each of their gradients is a tensor of its own: it may be summed in place.
        gradient = gradients[0].contiguous()
        dist.all_reduce(gradient, group=ctx.group)
        return gradient, None


class _Sum(torch.autograd.Function):
    """The tensor summed over the group, in place; backward, the gradient itself: every rank holds all of it."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.mark_dirty(tensor)
        dist.all_reduce(tensor, group=group)
        return tensor

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0], None


@dataclass(frozen=True, slots=True)
class Region:
    """Where a part of a parameter lies in the flattened whole: elements [start, stop), or `columns` of these whole rows.

    `first` is the offset of the part's first element.
    """

    start: int
    stop: int
    columns: tuple[int, int] | None = None

    @property
    def first(self) -> int:
        return self.start + (self.columns[0] if self.columns is not None else 0)


def _read_region(read: Read, name: str, kind: str, region: Region, width: int) -> torch.Tensor:
    """The elements of `region` of a saved tensor with rows of `width`, flattened; few whole rows are in memory at a time."""
    if region.columns is None:
        return read(name, kind, region.start, region.stop)
    span = max(1, READ_AT_ONCE // width) * width
    rows = [
        read(name, kind, start, min(start + span, region.stop)).view(-1, width)[:, slice(*region.columns)].clone()
        for start in range(region.start, region.stop, span)
    ]
    return torch.cat(rows).reshape(-1)


class TensorParallel:
    """One rank's place in the group that `mesh` is; in a group of one, and without a mesh, everything is as without it."""

    def __init__(self, mesh: DeviceMesh | None) -> None:
        self._mesh = mesh
        self.size, self.rank = (mesh.size(), mesh.get_local_rank()) if mesh is not None else (1, 0)
        self._group = mesh.get_group() if mesh is not None else None
        self._kinds: dict[str, Division] = {}

    # The module ----------------------------------------------------------------------------------------------------

    def divide(self, model: nn.Module) -> None:
        """Cut every parameter of `model`, which holds no values yet, to this rank's part, and sum where parts meet."""
        if self.size == 1:
            return
        made: dict[int, nn.Parameter] = {}
        for prefix, module in model.named_modules():
            for leaf, parameter in list(module._parameters.items()):
                if parameter is None:
                    continue
                name = f"{prefix}.{leaf}"
                self._kinds[name] = division(name)
                if id(parameter) not in made:  # a tied head stays tied
                    made[id(parameter)] = self._part(name, parameter)
                setattr(module, leaf, made[id(parameter)])
        for prefix, module in list(model.named_modules()):
            self._join(prefix.rpartition(".")[2], module)

    def _part(self, name: str, parameter: nn.Parameter) -> nn.Parameter:
        shape, dim = list(parameter.shape), self._dim(name)
        if dim is None:
            return parameter
        shape[dim] //= self.size
        part = torch.empty(shape, dtype=parameter.dtype, device=parameter.device)
        return nn.Parameter(part, requires_grad=parameter.requires_grad)

    def _dim(self, name: str) -> int | None:
        return {Division.ROWS: 0, Division.COLUMNS: 1}.get(self._kinds.get(name, Division.WHOLE))

    def _join(self, name: str, module: nn.Module) -> None:
        """Put in the sums that `module`, called `name` by its parent, needs in forward and backward."""
        if isinstance(module, nn.Linear):
            module.out_features, module.in_features = module.weight.shape
        if any(child in INPUTS for child, _ in module.named_children()):
            module.register_forward_pre_hook(self._spread_input, with_kwargs=True)
        if name in OUTPUTS:
            self._share_bias(module)
            module.register_forward_hook(lambda _, arguments, output: _Sum.apply(output, self._group))
        if name == VOCABULARY[0]:
            self._divide_embedding(module)
        if name == VOCABULARY[1]:
            self._divide_head(module)

    def _spread_input(
        self, module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """transformers passes the hidden state first or by name."""
        if arguments:
            return (_Spread.apply(arguments[0], self._group), *arguments[1:]), named
        return arguments, named | {"hidden_states": _Spread.apply(named["hidden_states"], self._group)}

    def _share_bias(self, module: nn.Module) -> None:
        """Every rank adds an equal share of the bias of a linear layer whose outputs are summed."""
        linear: Any = getattr(module, "base_layer", module)
        if linear.bias is not None:
            linear.forward = lambda inputs: functional.linear(inputs, linear.weight, linear.bias / self.size)

    def _divide_embedding(self, embedding: Any) -> None:
        """Each rank looks up the tokens of its rows of the vocabulary and gives zero for the others."""
        rows, look_up = embedding.weight.shape[0], embedding.forward
        begin = self.rank * rows
        embedding.num_embeddings = rows
        if embedding.padding_idx is not None:
            embedding.padding_idx -= begin
            if not 0 <= embedding.padding_idx < rows:
                embedding.padding_idx = None

        def forward(tokens: torch.Tensor) -> torch.Tensor:
            own = tokens - begin
            foreign = (own < 0) | (own >= rows)
            part = look_up(own.masked_fill(foreign, 0))
            return _Sum.apply(part.masked_fill(foreign.unsqueeze(-1), 0), self._group)

        embedding.forward = forward

    def _divide_head(self, head: nn.Module) -> None:
        """Each rank makes the logits of its words, and ranks exchange the largest, the sum of the exponentials and the label's
        logit of each token: inside a head that gives the loss, or in torch's cross-entropy of divided logits."""
        head.register_forward_pre_hook(self._spread_input, with_kwargs=True)
        if isinstance(head, LossGivingHead):
            head.share(self.rank * cast(torch.Tensor, head.weight).shape[0], self._exchange)
        else:
            head.register_forward_hook(lambda _, arguments, output: DTensor.from_local(output, self._mesh, [Shard(-1)]))

    def _exchange(self, tensor: torch.Tensor, how: str) -> None:
        if tensor.numel():
            operation = {"largest": dist.ReduceOp.MAX, "sum": dist.ReduceOp.SUM}[how]
            dist.all_reduce(tensor, operation, group=self._group)

    def loss(self) -> AbstractContextManager[object]:
        """A context for forward and backward in which torch's cross-entropy takes divided logits."""
        return loss_parallel() if self.size > 1 else nullcontext()

    @torch.no_grad()
    def fill(self, model: nn.Module, weights: Weights) -> None:
        """Copy this rank's part of every parameter from `weights`, one at a time."""
        weights = StoredWeights(model, weights)
        for name, parameter in model.named_parameters():
            region = self.region(name, parameter.shape, 0, parameter.numel())
            parameter.copy_(weights.read(name, region.start, region.stop, region.columns).view(parameter.shape))

    # Gradients and state ---------------------------------------------------------------------------------------------

    def add_up(self, gradients: Iterable[tuple[str, torch.Tensor]], device: torch.device) -> None:
        """Sum, in place, those of the (name, gradient) pairs of which every rank has computed a part only."""
        parts = [gradient for name, gradient in gradients if self._kinds.get(name) is Division.SUMMED and gradient.numel()]
        if not parts:
            return
        flat = torch.cat([part.reshape(-1) for part in parts]).to(device)
        dist.all_reduce(flat, group=self._group)
        for part, total in zip(parts, flat.split([part.numel() for part in parts]), strict=True):
            part.copy_(total.view(part.shape))

    def add_up_as_made(self, model: nn.Module) -> None:
        """Sum over the group each gradient of `model` of which every rank computes a part only, before anything else sees it:
        for an engine that takes gradients to itself as they are made."""
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and self._kinds.get(name) is Division.SUMMED:
                parameter.register_hook(self._total)

    def _total(self, gradient: torch.Tensor) -> torch.Tensor:
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=self._group)
        return total

    def is_divided(self, name: str) -> bool:
        """Whether every rank of the group holds another part of the parameter `name`."""
        return self._dim(name) is not None

    def add_squares(self, divided: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
        """The square of the norm over the group: those of divided parameters summed, those that all hold counted once."""
        if self.size > 1:
            dist.all_reduce(divided, group=self._group)
        return divided + whole

    def whole_shape(self, name: str, part: torch.Size) -> tuple[int, ...]:
        """The shape of the parameter `name` of which each rank holds a `part`."""
        shape, dim = list(part), self._dim(name)
        if dim is not None:
            shape[dim] *= self.size
        return tuple(shape)

    def region(self, name: str, part: torch.Size, start: int, count: int) -> Region:
        """Where elements [start, start + count) of the flattened part of this rank, whole rows of it, lie in the whole."""
        dim = self._dim(name)
        if dim == 1:
            width = part[1] * self.size
            first, last = start // part[1] * width, (start + count) // part[1] * width
            return Region(first, last, (self.rank * part[1], (self.rank + 1) * part[1]))
        begin = self.rank * math.prod(part) if dim == 0 else 0
        return Region(begin + start, begin + start + count)

    def runs(self, name: str, part: torch.Size, start: int, count: int) -> Iterator[tuple[int, int, Region]]:
        """(offset, elements, where they lie in the whole) of what elements [start, start + count) of this rank's flattened part
        consist of: of a part cut by columns whole rows, and before and behind them what is not a whole row."""
        if self._dim(name) != 1:
            yield 0, count, self.region(name, part, start, count)
            return
        width, stop = part[1], start + count
        first = min(align_up(start, width), stop)
        for begin, end in pairwise(sorted({start, first, max(first, stop // width * width), stop})):
            if begin % width == 0 and end % width == 0:
                yield begin - start, end - begin, self.region(name, part, begin, end - begin)
                continue
            place = (begin // width * self.size + self.rank) * width + begin % width
            yield begin - start, end - begin, Region(place, place + end - begin)

    def placed(self, pieces: Iterable[Piece]) -> Iterator[Piece]:
        """Pieces of this rank's parts as pieces of the whole parameters; what all hold, the first rank saves."""
        for piece in pieces:
            part = torch.Size(piece.shape)
            owned = piece.owned and (self.rank == 0 or self.is_divided(piece.name))
            for offset, count, region in self.runs(piece.name, part, piece.start, piece.data.numel()):
                yield replace(
                    piece, shape=self.whole_shape(piece.name, part), start=region.first, owned=owned, columns=region.columns,
                    data=piece.data[offset : offset + count],
                )  # fmt: skip

    def reader(self, read: Read, parts: Mapping[str, tuple[int, ...]]) -> Read:
        """`read`, for elements of this rank's parts, whose shapes are `parts`, in place of the whole parameters'."""

        def own(name: str, kind: str, start: int, stop: int) -> torch.Tensor:
            part = torch.Size(parts[name])
            width = self.whole_shape(name, part)[-1]
            runs = [_read_region(read, name, kind, region, width) for *_, region in self.runs(name, part, start, stop - start)]
            return runs[0] if len(runs) == 1 else torch.cat(runs)

        return own

    def gather(self, name: str, part: torch.Tensor) -> torch.Tensor:
        """The whole of the parameter `name` from the parts of all ranks, which all must call it."""
        dim = self._dim(name)
        if dim is None:
            return part
        whole = part.new_empty(self.size * part.shape[0], *part.shape[1:])
        dist.all_gather_into_tensor(whole, part.contiguous(), group=self._group)
        return whole if dim == 0 else whole.view(self.size, *part.shape).movedim(0, 1).reshape(part.shape[0], -1)
