"""What a run does when a step goes wrong, from its keys."""

from __future__ import annotations

from orchestrator import spec
from orchestrator.config.schema import HealthConf, OnSpike
from orchestrator.errors import Fault


def build_health(conf: HealthConf) -> spec.Health:
    """The frozen form of keys without faults."""
    return spec.Health(
        conf.on_nonfinite.value, conf.nonfinite_limit, conf.on_spike.value, conf.spike_window, conf.spike_deviations,
        conf.spike_limit,
    )  # fmt: skip


def health_faults(conf: HealthConf, every: int) -> list[Fault]:
    """A way back without anything to go back to: checkpoints come `every` so many steps."""
    if conf.on_spike is OnSpike.ignore or every:
        return []
    problem = "a spike goes back to the last checkpoint, but checkpoint.every=0 saves at the end alone"
    return [Fault("health.on_spike", problem, "set checkpoint.every=100, or less where a step takes long")]
