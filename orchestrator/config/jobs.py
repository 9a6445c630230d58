"""The job that a run is submitted as: its words checked, and the spec composed for the cluster of the job."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from orchestrator import spec
from orchestrator.config.catalog import CONF_DIR
from orchestrator.config.compose import compose, compose_conf
from orchestrator.config.overrides import check_overrides
from orchestrator.config.schema import JobKind, KubernetesConf, RootConf, SlurmConf
from orchestrator.errors import ConfigError, Fault
from orchestrator.units import GIB

WORD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@/:-]*")
"""Names of partitions, accounts, types of card."""

JOB_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")
FEATURES = re.compile(r"[A-Za-z0-9_\[(][A-Za-z0-9_.&|,*()\[\]-]*")
"""Slurm's constraint: features joined by & | , * and brackets (sbatch(1), --constraint)."""

OBJECT = re.compile(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?")
"""A TrainJob's name: RFC 1035, and short enough for the names of its pods, "NAME-node-0-0.NAME", to be host names."""

LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
IMAGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/:@-]{0,254}")
RESOURCE = re.compile(r"[a-z0-9][a-z0-9.-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
MOUNT = re.compile(r"(/[A-Za-z0-9_.-]+)+")

UNSAFE = re.compile(r"[\x00-\x1f\x7f\\]")
"""What no path of a job may hold: control characters, newlines among them, and backslashes, which sbatch reads itself."""

LEAST_SECONDS_OF_WORK = 5
"""A time limit must leave the run this much before it is told to save."""


def unsafe_path(field: str, path: str | None) -> list[Fault]:
    """The fault of a path that a batch system would read otherwise than it stands."""
    if path is None or not UNSAFE.search(path):
        return []
    problem = f"{path!r} holds a newline, another control character or a backslash"
    return [Fault(field, problem, "use a path without them; spaces and quotes are well")]


def _word(field: str, value: str | None, allowed: re.Pattern[str], example: str) -> list[Fault]:
    if value is None or allowed.fullmatch(value):
        return []
    return [Fault(field, f"{value!r} is no name that may be passed on", f"letters, digits, dots, dashes: {example}")]


def _slurm_faults(conf: SlurmConf) -> list[Fault]:
    faults = [
        *_word("slurm.name", conf.name, JOB_NAME, "llama3-lora"),
        *_word("slurm.partition", conf.partition, WORD, "gpu"),
        *_word("slurm.account", conf.account, WORD, "my-project"),
        *_word("slurm.qos", conf.qos, WORD, "normal"),
        *_word("slurm.gpu", conf.gpu, WORD, "a10"),
        *_word("slurm.constraint", conf.constraint, FEATURES, "a10&ib"),
        *unsafe_path("slurm.setup", conf.setup),
    ]
    if conf.setup is not None and not faults and not Path(conf.setup).expanduser().is_file():
        faults.append(Fault("slurm.setup", f"there is no file {conf.setup}", "give a shell file that every node can read"))
    for name, least in (("cpus", 1), ("memory_gib", 0), ("grace", 0), ("requeues", 0)):
        value = getattr(conf, name)
        if value < least:
            faults.append(Fault(f"slurm.{name}", f"slurm.{name}={value} must be at least {least}", "leave it out, or raise it"))
    if _minutes(conf) * 60 < conf.grace + LEAST_SECONDS_OF_WORK:
        problem = f"a limit of {conf.hours:g} h leaves nothing before the {conf.grace} s in which the run saves"
        faults.append(Fault("slurm.hours", problem, "raise slurm.hours, or lower slurm.grace"))
    return faults


def _kubernetes_faults(conf: KubernetesConf) -> list[Fault]:
    faults = [
        *_word("kubernetes.name", conf.name, OBJECT, "llama3-lora, at most 40 small letters"),
        *_word("kubernetes.namespace", conf.namespace, LABEL, "training"),
        *_word("kubernetes.claim", conf.claim, LABEL, "training"),
        *_word("kubernetes.image", conf.image, IMAGE, "my-registry/orchestrator:1.0"),
        *_word("kubernetes.resource", conf.resource, RESOURCE, "nvidia.com/gpu"),
        *_word("kubernetes.mount", conf.mount, MOUNT, "an absolute path as /shared"),
    ]
    for name, least in (("cpus", 1), ("memory_gib", 1), ("shm_gib", 1), ("grace", 1), ("requeues", 0)):
        value = getattr(conf, name)
        if value < least:
            faults.append(Fault(f"kubernetes.{name}", f"kubernetes.{name}={value} must be at least {least}"))
    if conf.shm_gib > conf.memory_gib:
        problem = f"{conf.shm_gib} GiB of shared memory come out of {conf.memory_gib} GiB of the pod's"
        faults.append(Fault("kubernetes.shm_gib", problem, "lower it, or raise kubernetes.memory_gib"))
    return faults


def _minutes(conf: SlurmConf) -> int:
    """Slurm counts time limits in whole minutes."""
    return max(1, math.ceil(conf.hours * 60 - 1e-6))


def _job_faults(conf: RootConf) -> list[Fault]:
    on_slurm, on_kubernetes = conf.slurm.kind is JobKind.job, conf.kubernetes.kind is JobKind.job
    if not on_slurm and not on_kubernetes:
        remedy = "name one, e.g. slurm=a10x4 nodes=2 or kubernetes=a10x4; --help lists the choices"
        return [Fault("slurm", "no job is named", remedy)]
    if on_slurm and on_kubernetes:
        return [Fault("slurm, kubernetes", "a run is one job, of Slurm or of Kubernetes", "leave one out")]
    faults = _slurm_faults(conf.slurm) if on_slurm else _kubernetes_faults(conf.kubernetes)
    if conf.cluster.name == "local":
        problem = "cluster=local is this machine, and the job runs on others"
        faults.append(Fault("cluster", problem, "name the nodes' cards: cluster=4xa10, for example"))
    return faults


def _kubernetes(asked: KubernetesConf) -> spec.Kubernetes:
    return spec.Kubernetes(
        image=asked.image, claim=asked.claim, mount=asked.mount, cpus=asked.cpus, memory_gib=asked.memory_gib,
        shm_gib=asked.shm_gib, grace=asked.grace, requeues=asked.requeues, resource=asked.resource, name=asked.name,
        namespace=asked.namespace,
    )  # fmt: skip


def _slurm(asked: SlurmConf) -> spec.Slurm:
    return spec.Slurm(
        cpus=asked.cpus, memory_gib=asked.memory_gib, minutes=_minutes(asked), grace=asked.grace,
        requeues=asked.requeues, name=asked.name, partition=asked.partition, account=asked.account, qos=asked.qos,
        constraint=asked.constraint, gpu=asked.gpu, array=asked.array,
        setup=None if asked.setup is None else str(Path(asked.setup).expanduser().resolve()),
    )  # fmt: skip


def _within_pod(cluster: spec.Cluster, job: spec.Kubernetes) -> spec.Cluster:
    """`cluster` with no more host memory than a pod may have."""
    host = min(cluster.host_bytes or job.memory_gib * GIB, job.memory_gib * GIB)
    shared = replace(cluster.card, memory_bytes=min(cluster.card.memory_bytes, host // cluster.cards_per_node))
    return replace(cluster, host_bytes=host, card=shared if cluster.card.name == "cpu" else cluster.card)


def compose_job(overrides: Sequence[str], conf_dir: Path = CONF_DIR) -> tuple[spec.RunSpec, spec.Job]:
    """(the run, composed for the cluster of the job and not for this machine; the job that carries it).

    Raises:
        ConfigError: with all faults of both.
    """
    faults: list[Fault] = []
    run: spec.RunSpec | None = None
    try:
        run = compose(overrides, strict=False, config_dir=conf_dir)
    except ConfigError as error:
        faults += error.faults
    good, _, misspelt = check_overrides(overrides, conf_dir)
    try:
        conf = compose_conf(good, conf_dir)
    except ConfigError:  # `compose` has met the same, and its faults stand above
        raise ConfigError(faults) from None
    if not misspelt:
        faults += _job_faults(conf)
    faults += unsafe_path("run.dir", conf.run.dir)
    if faults or run is None:
        raise ConfigError(faults)
    if conf.slurm.kind is JobKind.job:
        return run, _slurm(conf.slurm)
    job = _kubernetes(conf.kubernetes)
    return replace(run, cluster=_within_pod(run.cluster, job)), job
