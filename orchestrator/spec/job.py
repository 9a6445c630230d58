"""What a scheduler is asked for: everything about a job that does not change what is trained."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Slurm:
    """A Slurm job. `memory_gib` 0: all of a node's; `minutes` is the time limit, `grace` (seconds) how long before it the run
    is told to save. None leaves a choice to the cluster's defaults; `name` None: that of the run folder."""

    cpus: int
    memory_gib: int
    minutes: int
    grace: int
    requeues: int
    name: str | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    gpu: str | None = None
    setup: str | None = None
    array: bool = False


@dataclass(frozen=True, slots=True)
class Kubernetes:
    """A TrainJob of Kubeflow Trainer. Each pod gets `cpus` and `memory_gib`, and a card of the kind `resource` for each rank.
    `claim` is the volume that all pods share, at `mount`; `grace` (seconds) is what a pod that is told to end has for saving.
    """

    image: str
    claim: str
    mount: str
    cpus: int
    memory_gib: int
    shm_gib: int
    grace: int
    requeues: int
    resource: str
    name: str | None = None
    namespace: str | None = None


Job = Slurm | Kubernetes
