"""How long an optimizer step takes: a roofline for each class of operation on the card's sourced peaks.

Matrix products run at the tensor cores' peak, everything else at the memory's, both at the share of it in `COMPUTE`, which was
measured; links and hosts at theirs, which were not. The first duty of the seconds is to rank strategies: all of them share
the same computing, and differ by traffic, recompute and offload.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.layout.moments import hidden_matrix
from orchestrator.planner.activations import FP32, Sizes, activations, recomputed, sizes
from orchestrator.planner.device import CPU, HOST_MEMORY_GB_PER_S, NETWORK_GB_PER_S, nvme_rate, rates
from orchestrator.planner.traffic import Traffic, traffic
from orchestrator.spec import HEAD, Cluster, ModelShape, Parameter, RunSpec, divided_table, owner
from orchestrator.spec.quant import WEIGHTS_PER_BYTE
from orchestrator.units import dtype_bytes

GIGA, TERA = 1e9, 1e12


@dataclass(frozen=True, slots=True)
class Factor:
    """Share of a peak that is reached, the lowest and highest that were recorded, and where. Without a record 1.0."""

    share: float
    low: float
    high: float
    source: str


COMPUTE = Factor(
    0.78, 0.76, 0.79, "fsdp_qlora's LoRA of Llama 2 7B without sharding, 4 × 2048 tokens: 2,380 tokens/s on two RTX 3090, "
    "4,799 on two RTX 4090 (published_memory.csv, fsdpqlora-010 and -014)"
)  # fmt: skip
LINK = Factor(1.0, 1.0, 1.0, "not recorded")
HOST = Factor(1.0, 1.0, 1.0, "not recorded")

PCIE_HIDES = 0.0
"""Share of the collectives that computing hides where cards speak over PCIe. The same runs with FSDP took longer than their
computing by 0.6 s (RTX 4090) and 3.7 to 4.7 s (RTX 3090, alike at four lengths and batches): the whole of their traffic, at
23 and 3.3 GB/s (fsdpqlora-003, -004, -007, -008, -015). Over NVLink all of it can hide, which was not recorded."""

UPDATE_BYTES = {
    "adamw": 30,  # one fused pass: gradient, master and both moments read, the last three written, the working copy
    "adamw_8bit": 18,  # the same, a moment in one byte
    "paged_adamw_8bit": 18,
    "lion": 22,  # the same, with one moment
    "adafactor": 82,  # the squares and their sums; the update made twice, once for its size; the decay
    "adamw_bf16": 290,  # 24 passes over fp32 chunks, half of them for the random bits
    "muon": 50,  # momentum, its mixture with the gradient, the cast, the decay and the sum
}
"""Bytes that one element's update moves, counted from the operations in `orchestrator/engine`."""

ORTHOGONAL_ROUNDS = 5
"""Rounds of Newton-Schulz for each matrix (torch/optim/_muon.py, DEFAULT_NS_STEPS)."""


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds of one optimizer step on the slowest part of the way; `total` is their sum.

    `compute` is forward and backward, `recompute` the forward that is run again, `communication` and `offload` only
    what computing does not hide, `update` the optimizer, `nvme` the disk. `overlapped` is communication that computing hides:
    not in the sum.
    """

    compute: float
    recompute: float
    communication: float
    offload: float
    update: float
    overlapped: float
    nvme: float = 0.0

    @property
    def total(self) -> float:
        return self.compute + self.recompute + self.communication + self.offload + self.update + self.nvme

    def parts(self) -> dict[str, float]:
        """Seconds by part, in the order of the sum."""
        return {
            "compute": self.compute,
            "recompute": self.recompute,
            "communication": self.communication,
            "offload": self.offload,
            "update": self.update,
            "NVMe": self.nvme,
        }


@dataclass(frozen=True, slots=True)
class _Pass:
    """Work for one token: FLOP of matrix products and of attention, bytes of everything else."""

    matmul: float
    attention: float
    moved: float


def _scores(spec: RunSpec, s: Sizes) -> float:
    """Bytes that `attention=eager` moves for each token of a block: products, scale, mask, softmax in fp32 and its cast pass
    over every pair of positions (transformers, eager_attention_forward)."""
    return spec.data.seq_len * s.heads * (8 * s.c + 2 * FP32) if spec.attention == "eager" else 0.0


def _blocks(spec: RunSpec, table: Sequence[Parameter], shape: ModelShape, s: Sizes) -> _Pass:
    """The forward of all blocks. Two FLOP for each weight; four for each earlier token and query width, and for each later one
    too where the kernel does not leave it out."""
    weights = sum(p.numel for p in table if p.block >= 0 and len(p.shape) == 2) / spec.strategy.tp
    seen = spec.data.seq_len / (1 if spec.attention == "eager" else 2)
    attention = 4 * seen * s.query * shape.num_hidden_layers
    # Norms pass six times over fp32 copies, the residual twice, rotary four times, the MLP's product over three tensors.
    moved = (2 * (6 * FP32 + 6 * s.c) + 6 * s.c) * s.hidden + 9 * s.c * (s.query + s.key) + 5 * s.c * s.inner
    if spec.compile != "none":
        # One kernel from product to product: a norm with the sum before it reads two tensors and writes two, rotary and the
        # MLP's product read and write once (inductor fuses what is elementwise with the reductions beside it).
        moved = 2 * 4 * s.c * s.hidden + 2 * s.c * (s.query + s.key) + 3 * s.c * s.inner
    return _Pass(2 * weights, attention, (moved + _scores(spec, s)) * shape.num_hidden_layers)


def _head(s: Sizes) -> _Pass:
    """The head and the loss, forward: the product, the cast to fp32 and log_softmax."""
    return _Pass(2 * s.hidden * s.vocabulary, 0, (s.c + 3 * FP32) * s.vocabulary)


ATTENTION_BACKWARD = {"eager": 2.0, "sdpa": 2.5, "flash": 2.5}
"""FLOP of the backward of attention for each of the forward: four products for two, and in the flash kernels, which make the
scores again, five (arXiv:2307.08691, section 4.1)."""


def _seconds(work: _Pass, factor: float, spec: RunSpec, tokens: int, attention_factor: float = 1.0) -> float:
    """`factor` times the matrix products and the other traffic of a pass, and `attention_factor` times its attention."""
    card = spec.cluster.card
    peak = card.half_tflops if spec.precision.compute != "fp32" else rates(card).fp32_tflops
    matmul = work.matmul / (peak * TERA * COMPUTE.share)
    attention = work.attention / (peak * TERA * COMPUTE.share)
    memory = work.moved / (card.memory_gb_per_s * GIGA * COMPUTE.share)
    return tokens * (factor * (matmul + memory) + attention_factor * attention)


def _unpacking(spec: RunSpec, table: Sequence[Parameter]) -> float:
    """Seconds to unpack every quantised weight once in each micro-batch: it is read packed and written in the compute dtype, at
    the memory's rate. Forward and backward do so alike (model/quantised.py _Product)."""
    values = sum(p.numel for p in table if p.quant)
    each = 1 / WEIGHTS_PER_BYTE.get(spec.tuning.form, 1) + dtype_bytes(spec.precision.compute)
    moved = values * each * spec.batch.accumulation
    return moved / (spec.cluster.card.memory_gb_per_s * GIGA * COMPUTE.share)


def _measuring(spec: RunSpec, table: Sequence[Parameter]) -> float:
    """Seconds that DoRA takes in each micro-batch's forward to measure the rows of adapted weights: a unit matrix through both
    adapters, and passes over matrices of the weight's size (peft/tuners/lora/dora.py forward)."""
    if not spec.tuning.dora:
        return 0.0
    card, rank, c = spec.cluster.card, spec.tuning.rank, dtype_bytes(spec.precision.compute)
    shapes = [p.shape for p in table if len(p.shape) == 2 and owner(p.name) == "base_layer"]
    flop = sum(2 * rank * columns * (columns + rows) for rows, columns in shapes)
    moved = sum(c * columns * (2 * columns + 7 * rows) for rows, columns in shapes)
    seconds = flop / (card.half_tflops * TERA) + moved / (card.memory_gb_per_s * GIGA)
    return seconds * spec.batch.accumulation / COMPUTE.share


def link_rate(cluster: Cluster, ranks: int) -> float:
    """Bytes a second that one rank can send to the next: its link, or across machines its share of the network."""
    own = cluster.card.link_gb_per_s
    if ranks > cluster.cards_per_node:
        own = min(own, NETWORK_GB_PER_S / cluster.cards_per_node)
    return own * GIGA * LINK.share


def _orthogonalisation(spec: RunSpec, table: Sequence[Parameter]) -> float:
    """Seconds that Muon takes for its matrices, all of them on every rank: three products a round in bf16."""
    flop = 0.0
    for parameter in table:
        if spec.optimizer.name == "muon" and parameter.trainable and hidden_matrix(parameter):
            short, long = sorted(parameter.shape)
            flop += ORTHOGONAL_ROUNDS * 2 * short * short * (2 * long + short)
    return flop / (spec.cluster.card.half_tflops * TERA * COMPUTE.share)


def _update(spec: RunSpec, table: Sequence[Parameter], moved: Traffic) -> float:
    trained = sum(p.numel for p in divided_table(table, spec.strategy.tp) if p.trainable)
    sharded = spec.strategy.dp_shard if spec.strategy.shard != "none" else 1
    each = UPDATE_BYTES[spec.optimizer.name]
    if moved.updated:
        share = HOST_MEMORY_GB_PER_S / spec.cluster.cards_per_node * HOST.share
        return moved.updated * each / (share * GIGA) + _orthogonalisation(spec, table)
    passes = trained / sharded * each / (spec.cluster.card.memory_gb_per_s * GIGA * COMPUTE.share)
    return passes + _orthogonalisation(spec, table)


def _again(blocks: _Pass, spec: RunSpec, shape: ModelShape, tokens: int) -> float:
    """Seconds of the part of the forward that the backward repeats; selective recompute repeats neither matrix products nor
    attention."""
    share = recomputed(spec, shape.num_hidden_layers) / shape.num_hidden_layers
    if spec.recompute == "selective":
        blocks = _Pass(0.0, 0.0, blocks.moved)
    return share * _seconds(blocks, 1, spec, tokens)


def step_time(spec: RunSpec, table: Sequence[Parameter], shape: ModelShape) -> StepTime | None:
    """The parts of one optimizer step at full sequences; None where the card's rates are not known.

    The backward costs twice the forward: once for the gradients of inputs, once for those of weights, which LoRA leaves
    out. Over NVLink collectives inside forward and backward hide behind the computing of the same pass; without
    `overlap_comm` they do not, and those of tensor parallelism and offload traffic never do.
    """
    card = spec.cluster.card
    if card.name == CPU or not (card.half_tflops and card.memory_gb_per_s):
        return None
    s = sizes(shape, spec.precision.compute, spec.strategy.tp)
    tokens = spec.batch.micro * spec.batch.accumulation * spec.data.seq_len
    blocks, head = _blocks(spec, table, shape, s), _head(s)
    backward_factor = 2.0 if spec.tuning.kind == "full" else 1.0
    forward = _seconds(blocks, 1, spec, tokens) + _seconds(head, 1, spec, tokens)
    alone = spec.tuning.kind == "head"  # its backward ends before the blocks, and is of its weights alone
    learned = 2.0 if HEAD in spec.tuning.modules else backward_factor
    backward = _seconds(head, learned, spec, tokens)
    backward += 0.0 if alone else _seconds(blocks, backward_factor, spec, tokens, ATTENTION_BACKWARD[spec.attention])
    again = 0.0 if alone else _again(blocks, spec, shape, tokens)
    unpacking = _unpacking(spec, table)
    measuring = _measuring(spec, table)
    forward, backward = forward + unpacking + measuring, backward + (0.0 if alone else unpacking)
    again += unpacking + measuring if again else 0.0
    moved = traffic(spec, table)
    rate = link_rate(spec.cluster, spec.strategy.ranks)
    near = link_rate(spec.cluster, spec.strategy.tp)
    sent = [count / rate if rate else 0.0 for count in (moved.forward, moved.backward, moved.boundary)]
    sent.append(moved.tensor / near if near else 0.0)
    overlap = spec.strategy.buckets is None or spec.strategy.buckets.overlap_comm
    hides = 1.0 if rates(card).nvlink else PCIE_HIDES
    hidden = hides * (min(sent[0], forward) + min(sent[1], backward + again)) if overlap else 0.0
    waiting = 2 * spec.batch.accumulation * activations(spec, shape).host  # out in the forward, back in the backward
    host = (moved.fetched + moved.returned + waiting) / (rates(card).host_gb_per_s * GIGA * LINK.share)
    return StepTime(
        compute=forward + backward,
        recompute=again,
        communication=sum(sent) - hidden,
        offload=host,
        update=_update(spec, table, moved),
        overlapped=hidden,
        nvme=(moved.disk_read + moved.disk_written) / (nvme_rate(spec.cluster) * GIGA),
    )
