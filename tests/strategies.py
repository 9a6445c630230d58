"""Every sharded strategy in miniature, for the suites that go through all of them."""

from __future__ import annotations

from dataclasses import replace

from orchestrator import spec as s

BUCKETS = s.Buckets(reduce=20_000, allgather=20_000, prefetch=10_000, persistence=100, max_live=50_000, max_reuse=50_000)


def swapping(ranks: int) -> dict[str, s.Strategy]:
    """Every strategy that swaps to NVMe; apart, because what is tiny stays in memory."""
    knobs = replace(BUCKETS, prefetch=0, max_reuse=0)
    optimizer = replace(strategies(ranks)["zero3_optimizer"], optimizer_home=s.Home.NVME, nvme=s.Nvme("swap", 0, 0))
    weights = replace(optimizer, parameter_home=s.Home.NVME, buckets=knobs, nvme=s.Nvme("swap", 8_000))
    return {"zero3_nvme_optimizer": optimizer, "zero3_nvme": weights}


def strategies(ranks: int) -> dict[str, s.Strategy]:
    """Every strategy that exists on `ranks` ranks."""
    cpu = s.Home.CPU
    found: dict[str, s.Strategy] = {}
    for stage, shard in s.ZERO_STAGES.items():
        zero = s.Strategy(s.Engine.DEEPSPEED, shard, dp_shard=ranks, buckets=BUCKETS)
        found[f"zero{stage}"] = zero
        if stage:
            found[f"zero{stage}_optimizer"] = replace(zero, optimizer_home=cpu)
        if stage == 3:
            found["zero3_cpu"] = replace(zero, optimizer_home=cpu, parameter_home=cpu)
    fsdp = s.Strategy(s.Engine.FSDP, s.Shard.PARAMETERS, dp_shard=ranks)
    found["full_shard"] = fsdp
    found["full_shard_cpu"] = replace(fsdp, optimizer_home=cpu, parameter_home=cpu)
    found["shard_grad_op"] = replace(fsdp, reshard_after_forward=False)
    if ranks > 1:
        found["hybrid_shard"] = replace(fsdp, dp_replicate=2, dp_shard=ranks // 2)
        found["tensor2"] = replace(fsdp, dp_replicate=ranks // 2, dp_shard=1, tp=2)
        found["zero1_tensor2"] = replace(found["zero1"], dp_shard=ranks // 2, tp=2)
        found["zero2_optimizer_tensor2"] = replace(found["zero2_optimizer"], dp_shard=ranks // 2, tp=2)
    if ranks > 2:
        found["zero2_tensor2"] = replace(found["zero2"], dp_shard=ranks // 2, tp=2)
        found["full_shard_tensor2"] = replace(fsdp, dp_shard=ranks // 2, tp=2)
        found["tensor4"] = replace(fsdp, dp_replicate=ranks // 4, dp_shard=1, tp=4)
    return found
