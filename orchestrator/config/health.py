"""What a run does when a step goes wrong, from its keys."""

from __future__ import annotations

from orchestrator import spec
from orchestrator.config.schema import HealthConf, OnOom, OnSpike
from orchestrator.errors import Fault


def build_health(conf: HealthConf) -> spec.Health:
    """The frozen form of keys without faults."""
    return spec.Health(
        conf.on_nonfinite.value, conf.nonfinite_limit, conf.on_spike.value, conf.spike_window, conf.spike_deviations,
        conf.spike_limit, conf.on_oom.value,
    )  # fmt: skip


def health_faults(conf: HealthConf, every: int, micro: int | None, swaps: bool) -> list[Fault]:
    """A way back without anything to go back to (checkpoints come `every` so many steps), a micro-batch that cannot be halved,
    and processes that cannot replace each other because they swap to a disk."""
    faults = []
    if conf.on_spike is OnSpike.rollback and not every:
        problem = "a spike goes back to the last checkpoint, but checkpoint.every=0 saves at the end alone"
        faults.append(Fault("health.on_spike", problem, "set checkpoint.every=100, or less where a step takes long"))
    if conf.on_oom is OnOom.halve and micro == 1:
        problem = "batch.micro=1 cannot be halved"
        faults.append(Fault("health.on_oom", problem, "leave it out; recompute=full or a shorter data.seq_len need less"))
    if conf.on_oom is OnOom.halve and swaps:
        problem = "with offload=nvme the disk holds what a process that is replaced leaves behind"
        faults.append(Fault("health.on_oom", problem, "leave it out, or use offload=cpu"))
    return faults
