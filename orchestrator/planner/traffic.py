"""Bytes that one rank sends in an optimizer step, by where they travel and what they can hide behind.

Ring collectives: all-gather and reduce-scatter of M bytes over n ranks send M (n−1)/n from each, an all-reduce twice that
(Patarasu and Yuan, J. Parallel Distrib. Comput. 69, 2009). Volumes of ZeRO: arXiv:1910.02054, section 7; of FSDP:
arXiv:2304.11277, section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from orchestrator.layout import lay_out
from orchestrator.layout.moments import hidden_matrix
from orchestrator.planner.activations import recomputed
from orchestrator.spec import (
    ROOT,
    Division,
    Engine,
    Home,
    ModelShape,
    Parameter,
    RunSpec,
    Shard,
    divided_table,
    division,
    stored,
)
from orchestrator.units import dtype_bytes

FP32 = 4


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes for each rank and optimizer step.

    `forward` and `backward` are sent while blocks compute, `boundary` between the backward and the next forward, where
    nothing computes; `tensor` stays inside a tensor-parallel group, whose next product waits for it. `fetched` and
    `returned` cross the link to the host, of an offload; `updated` are elements that
    the CPU updates. `disk_read` and `disk_written` cross to and from NVMe.
    """

    forward: int = 0
    backward: int = 0
    boundary: int = 0
    tensor: int = 0
    fetched: int = 0
    returned: int = 0
    updated: int = 0
    disk_read: int = 0
    disk_written: int = 0

    @property
    def sent(self) -> int:
        """Everything that goes from card to card."""
        return self.forward + self.backward + self.boundary + self.tensor


def _ring(size: int, ranks: int) -> int:
    """Bytes that a rank sends to gather, or to reduce and scatter, `size` bytes."""
    return size * (ranks - 1) // ranks


def _deepspeed(spec: RunSpec, table: Sequence[Parameter]) -> Traffic:
    strategy, c, micro = spec.strategy, dtype_bytes(spec.precision.compute), spec.batch.accumulation
    ranks = strategy.dp_shard
    table = divided_table(table, strategy.tp)
    trained = sum(p.numel for p in table if p.trainable)
    own = trained // ranks
    reduce = _ring(trained * c, ranks)
    offloaded = strategy.optimizer_home is not Home.GPU
    back = own * c if offloaded else 0
    update = own if offloaded else 0
    if strategy.shard is Shard.NONE:
        return Traffic(boundary=2 * reduce)
    if strategy.shard is Shard.OPTIMIZER:
        # Reduced once, when the last micro-batch of the step ends (stage_1_and_2.py reduce_gradients).
        hidden = reduce if micro == 1 else 0
        return Traffic(backward=hidden, boundary=2 * reduce - hidden, fetched=back, returned=back, updated=update)
    if strategy.shard is Shard.GRADIENTS:
        return Traffic(backward=reduce * micro, boundary=reduce, fetched=back, returned=back * micro, updated=update)
    assert strategy.buckets is not None, "a DeepSpeed strategy carries its buckets"
    sharded = sum(p.numel for p in table if p.numel > strategy.buckets.persistence)
    gather = _ring(sharded * c, ranks)
    fetched = back
    if strategy.parameter_home is not Home.GPU:
        fetched += 2 * micro * sharded // ranks * c
    read, written = _swapped(spec, table)
    return Traffic(
        gather * micro, (gather + reduce) * micro, fetched=fetched, returned=back * micro, updated=update, disk_read=read,
        disk_written=written,
    )  # fmt: skip


WORKING_COPIES = ("frozen", "weights", "adapters")


def _on_nvme(spec: RunSpec, table: Sequence[Parameter]) -> dict[str, int]:
    """Bytes by line that rest on NVMe of the parameters in `table`."""
    held: dict[str, int] = {}
    for row in lay_out(spec, table).rows if table else ():
        if row.home is Home.NVME:
            held[row.line] = held.get(row.line, 0) + row.bytes
    return held


def _swapped(spec: RunSpec, table: Sequence[Parameter]) -> tuple[int, int]:
    """(read, written) on NVMe. A weight is read for the forward and for the backward of each micro-batch, and written once;
    states and gradients are read for the update and written before or after it. A block that is run again reads its weights
    once more, but for its last layer, whose result nothing needs (torch/utils/checkpoint.py stops early there). Both figures
    were what the kernel counted (docs/nvme.md)."""
    if spec.strategy.nvme is None:
        return 0, 0
    held, micro = _on_nvme(spec, table), spec.batch.accumulation
    inside = [p for p in table if p.block != ROOT]
    blocks = len({p.block for p in inside}) or 1
    again = _on_nvme(spec, [p for p in inside if not p.name.endswith("down_proj.weight")])
    rerun = sum(again.get(line, 0) for line in WORKING_COPIES) * recomputed(spec, blocks) // blocks
    copies = sum(held.get(line, 0) for line in WORKING_COPIES)
    states = sum(held.values()) - copies
    return micro * (2 * copies + rerun) + states, copies - held.get("frozen", 0) + states


def _fsdp(spec: RunSpec, table: Sequence[Parameter]) -> Traffic:
    strategy, c, micro = spec.strategy, dtype_bytes(spec.precision.compute), spec.batch.accumulation
    ranks, copies = strategy.dp_shard, strategy.dp_replicate
    table = divided_table(table, strategy.tp)
    every = sum(p.numel for p in table)
    trained = sum(p.numel for p in table if p.trainable)
    gather, reduce = _ring(every * c, ranks), _ring(trained * FP32, ranks)
    across = 2 * _ring(trained // ranks * FP32, copies)
    gathers = 2 if strategy.reshard_after_forward and spec.tuning.kind != "head" else 1
    fetched = returned = updated = 0
    if strategy.parameter_home is not Home.GPU:
        at_rest = trained // ranks * FP32 + (every - trained) // ranks * c
        fetched, returned, updated = gathers * micro * at_rest, micro * trained // ranks * FP32, trained // ranks
    # Muon gathers each matrix once in fp32 (engine/muon.py).
    turned = sum(p.numel for p in table if p.trainable and hidden_matrix(p)) if spec.optimizer.name == "muon" else 0
    return Traffic(
        forward=gather * micro,
        backward=(gather * (gathers - 1) + reduce + across) * micro,
        boundary=_ring(turned * FP32, ranks),
        fetched=fetched,
        returned=returned,
        updated=updated,
    )


def _tensor(spec: RunSpec, table: Sequence[Parameter], shape: ModelShape) -> int:
    """Bytes inside a tensor-parallel group: each block sums its hidden states twice in the forward and their gradients twice in
    the backward, embedding and head once each (arXiv:1909.08053, section 3); recompute repeats the first of a block's two
    sums, since nothing is kept behind the second. The partial gradients of what is whole on every rank too: under FSDP2 once a
    step, of its shard, under ZeRO as they are made."""
    strategy, c = spec.strategy, dtype_bytes(spec.precision.compute)
    tokens = spec.batch.micro * spec.batch.accumulation * spec.data.seq_len
    backward = 0 if spec.tuning.kind == "head" else 2 + (spec.recompute != "none")  # the head alone has none in the blocks
    sums = shape.num_hidden_layers * (2 + backward) + 2
    partial = sum(p.numel for p in table if p.trainable and division(p.name) is Division.SUMMED)
    added = partial // strategy.dp_shard * FP32 if strategy.engine is Engine.FSDP else partial * c * spec.batch.accumulation
    return 2 * _ring(sums * tokens * shape.hidden_size * c + added, strategy.tp)


def traffic(spec: RunSpec, table: Sequence[Parameter]) -> Traffic:
    """What one rank sends in one optimizer step of `spec`."""
    table = stored(table, spec.precision.compute)
    if spec.strategy.engine is Engine.PLAIN:
        return Traffic()
    base = _deepspeed(spec, table) if spec.strategy.engine is Engine.DEEPSPEED else _fsdp(spec, table)
    if spec.strategy.tp == 1 or spec.model.shape is None:
        return base
    return replace(base, tensor=_tensor(spec, table, spec.model.shape))
