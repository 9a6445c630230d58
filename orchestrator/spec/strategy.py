"""What is sharded over which ranks, and where it rests: the neutral vocabulary of every engine."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum


class Engine(StrEnum):
    PLAIN = "plain"
    DEEPSPEED = "deepspeed"
    FSDP = "fsdp"


class Shard(StrEnum):
    """What is divided among the ranks of the `dp_shard` axis; each includes those before it (ZeRO, arXiv:1910.02054, §5)."""

    NONE = "none"
    OPTIMIZER = "optimizer"
    GRADIENTS = "gradients"
    PARAMETERS = "parameters"


class Home(StrEnum):
    """Where bytes rest between steps. On a machine without cards "gpu" is the memory of the device that computes."""

    GPU = "gpu"
    CPU = "cpu"
    NVME = "nvme"

    @property
    def in_memory(self) -> Home:
        """Where that rests which cannot be on a disk: the host for what otherwise is on NVMe."""
        return Home.CPU if self is Home.NVME else self


ZERO_STAGES: dict[int, Shard] = {0: Shard.NONE, 1: Shard.OPTIMIZER, 2: Shard.GRADIENTS, 3: Shard.PARAMETERS}


@dataclass(frozen=True, slots=True)
class Buckets:
    """DeepSpeed's knobs that cost memory, in elements; their meaning is told in deepspeed/runtime/zero/config.py."""

    reduce: int = 50_000_000
    allgather: int = 50_000_000
    prefetch: int = 50_000_000
    persistence: int = 100_000
    max_live: int = 1_000_000_000
    max_reuse: int = 1_000_000_000
    sub_group: int = 1_000_000_000
    overlap_comm: bool = True


@dataclass(frozen=True, slots=True)
class Nvme:
    """How DeepSpeed swaps to a local disk. `path`: the folder in which a job makes one of its own.

    `block_bytes` go into one request, `queue_depth` requests are under way at once in each of `threads`. `single_submit` hands
    them to the kernel one by one, `overlap_events` submits new ones before the old are done (deepspeed/ops/csrc/aio).
    `buffer_count` buffers of `buffer_size` elements in page-locked host memory take the weights that are being moved.
    """

    path: str
    buffer_size: int
    buffer_count: int = 8
    block_bytes: int = 2**20
    queue_depth: int = 8
    threads: int = 1
    single_submit: bool = False
    overlap_events: bool = True


@dataclass(frozen=True, slots=True)
class Strategy:
    """One way to spread a run over ranks = dp_replicate × dp_shard × tp, `tp` turning fastest: rank r is number r % tp of its
    tensor-parallel group, whose ranks see the same samples and each hold a part of every matrix (`spec/division.py`).

    `reshard_after_forward` is FSDP2's: False keeps the gathered weights from forward to backward. It is not ZeRO-2:
    the weights still rest sharded. `buckets` is set for DeepSpeed alone, `nvme` where a home is NVMe. `gradients` is the dtype
    in which ZeRO-2 and 3 add up micro-batches; None: the compute dtype. FSDP2 and the plain engine add up in fp32.
    """

    engine: Engine
    shard: Shard
    dp_replicate: int = 1
    dp_shard: int = 1
    tp: int = 1
    optimizer_home: Home = Home.GPU
    parameter_home: Home = Home.GPU
    pin_memory: bool = False
    reshard_after_forward: bool = True
    buckets: Buckets | None = field(default=None)
    gradients: str | None = None
    nvme: Nvme | None = None

    @property
    def dp(self) -> int:
        """Number of ranks that see different samples."""
        return self.dp_replicate * self.dp_shard

    @property
    def ranks(self) -> int:
        return self.dp * self.tp

    @property
    def stage(self) -> int:
        """The ZeRO stage that `shard` is called in DeepSpeed."""
        return next(stage for stage, shard in ZERO_STAGES.items() if shard == self.shard)

    @property
    def label(self) -> str:
        """Short name for folders, tables and pictures: "zero3-cpu", "fsdp-full_shard-tp2", "tp2", "plain"."""
        if self.engine is Engine.PLAIN:
            return "plain"
        if self.engine is Engine.DEEPSPEED:
            name = f"zero{self.stage}"
        elif self.tp > 1 and self.dp_shard == 1:
            name = ""
        elif self.dp_replicate > 1:
            name = "fsdp-hybrid_shard"
        else:
            name = "fsdp-full_shard" if self.reshard_after_forward else "fsdp-shard_grad_op"
        if self.tp > 1:
            name = f"{name}-tp{self.tp}".lstrip("-")
        if self.parameter_home is not Home.GPU:
            apart = "" if self.optimizer_home is self.parameter_home else f"-{self.optimizer_home}_optimizer"
            return f"{name}-{self.parameter_home}{apart}"
        return name if self.optimizer_home is Home.GPU else f"{name}-{self.optimizer_home}_optimizer"
