"""A job for Kubernetes: the documents of a TrainJob of Kubeflow Trainer v2, and their submission.

Three documents: a ConfigMap with the spec that was planned, a TrainingRuntime that says how pods live, restart and end, and the
TrainJob that runs it (Kubeflow Trainer 2.3, `trainer.kubeflow.org/v1alpha1`; a TrainJob alone cannot change its runtime's
restarts). Trainer's torch plugin gives each pod the PET_ variables that torchrun reads. Every value is data of a YAML
document that a library writes; none is pasted into text.
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from orchestrator.errors import ConfigError, Fault
from orchestrator.spec import Kubernetes

API = "trainer.kubeflow.org/v1alpha1"
NODE = "node"
"""What Trainer calls the replicated job and the container that train."""

HOME = "/opt/orchestrator"
"""Where docker/Dockerfile puts the project, and its user."""
USER = 10001

SPEC, SPEC_FILE = "/job", "submitted.json"
REFUSED = (2, 3, 4, 5)
"""Exit codes of errors that a person must mend (orchestrator/errors.py): a pod that ends with one is not started again."""

AFTER_SAVING = 30
"""Seconds between the end of the ranks' grace and the pod's: torchrun and the script end in them."""

ANSWER_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Pods:
    """One submission: `ranks` processes in each of `nodes` pods, with a card for each where `on_cards`. They run `document`,
    which launch/train.py reads, in `folder` on the shared claim."""

    job: Kubernetes
    name: str
    folder: Path
    nodes: int
    ranks: int
    on_cards: bool
    document: str


def literal(argument: str) -> str:
    """`argument` for a container's command, where Kubernetes would replace $(NAME) and reads $$ as $ (core/v1 Container)."""
    return argument.replace("$", "$$")


def _metadata(pods: Pods) -> dict[str, Any]:
    named = {"name": pods.name, "labels": {"app.kubernetes.io/name": "orchestrator"}}
    return named | ({"namespace": pods.job.namespace} if pods.job.namespace is not None else {})


def _config_map(pods: Pods) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": _metadata(pods), "data": {SPEC_FILE: pods.document}}


def _pod(pods: Pods) -> dict[str, Any]:
    """The pod: not root, the claim, the spec, and shared memory of its own, since a pod has 64 MiB."""
    job = pods.job
    volumes = {
        "shared": (job.mount, {"persistentVolumeClaim": {"claimName": job.claim}}),
        "spec": (SPEC, {"configMap": {"name": pods.name}}),
        "shm": ("/dev/shm", {"emptyDir": {"medium": "Memory", "sizeLimit": f"{job.shm_gib}Gi"}}),
    }
    return {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": job.grace + AFTER_SAVING,
        "securityContext": {
            "runAsNonRoot": True, "runAsUser": USER, "runAsGroup": USER, "fsGroup": USER,
            "fsGroupChangePolicy": "OnRootMismatch",
        },
        "containers": [
            {
                "name": NODE,
                "image": job.image,
                "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
                "volumeMounts": [{"name": name, "mountPath": path} for name, (path, _) in volumes.items()],
            }
        ],
        "volumes": [{"name": name, **source} for name, (_, source) in volumes.items()],
    }  # fmt: skip


def _runtime(pods: Pods) -> dict[str, Any]:
    """How pods end: one that ends takes its job with it, and the JobSet makes all anew, unless the run was refused."""
    refused = {"containerName": NODE, "operator": "In", "values": list(REFUSED)}
    template = {
        "metadata": {"labels": {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}},
        "spec": {
            "backoffLimit": 0,
            "podFailurePolicy": {"rules": [{"action": "FailJob", "onExitCodes": refused}]},
            "template": {"spec": _pod(pods)},
        },
    }
    restarts = {
        "maxRestarts": pods.job.requeues,
        "rules": [{"name": "refused", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
    }
    return {
        "apiVersion": API,
        "kind": "TrainingRuntime",
        "metadata": _metadata(pods),
        "spec": {
            "mlPolicy": {"numNodes": pods.nodes, "torch": {}},
            "template": {"spec": {"failurePolicy": restarts, "replicatedJobs": [{"name": NODE, "template": template}]}},
        },
    }


def _train_job(pods: Pods) -> dict[str, Any]:
    job = pods.job
    limits = {"cpu": str(job.cpus), "memory": f"{job.memory_gib}Gi"}
    if pods.on_cards:
        limits[job.resource] = str(pods.ranks)
    arguments = [f"{SPEC}/{SPEC_FILE}", str(pods.folder), str(job.grace)]
    cache = {"XDG_CACHE_HOME": f"{job.mount}/cache", "HF_HOME": f"{job.mount}/cache/huggingface"}
    return {
        "apiVersion": API,
        "kind": "TrainJob",
        "metadata": _metadata(pods),
        "spec": {
            "runtimeRef": {"apiGroup": API.partition("/")[0], "kind": "TrainingRuntime", "name": pods.name},
            "trainer": {
                "image": job.image,
                "command": ["bash", f"{HOME}/launch/kubernetes/pod.sh"],
                "args": [literal(argument) for argument in arguments],
                "env": [{"name": name, "value": literal(value)} for name, value in cache.items()],
                "numNodes": pods.nodes,
                "numProcPerNode": pods.ranks,
                "resourcesPerNode": {"limits": limits, "requests": dict(limits)},
            },
        },
    }


class _Dumper(yaml.SafeDumper):
    """Writes text of several lines as such, and repeats nothing by reference: a person reads the manifest."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def manifest(pods: Pods) -> str:
    """The three documents as YAML, in the order in which they must be made."""
    documents = [_config_map(pods), _runtime(pods), _train_job(pods)]
    return yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def command(manifest_file: Path) -> list[str]:
    """What is typed to submit `manifest_file`: create, and not apply, so that no earlier job of the name is changed."""
    return ["kubectl", "create", "-f", str(manifest_file)]


def submit(words: Sequence[str]) -> None:
    """Make what `command` names.

    Raises:
        ConfigError: there is no kubectl, or the cluster refuses.
    """
    try:
        ended = subprocess.run(words, text=True, capture_output=True, timeout=ANSWER_SECONDS, check=False)
    except FileNotFoundError:
        remedy = "dry=true prints the manifest, which `kubectl create -f -` takes wherever it is"
        raise ConfigError(Fault("kubernetes", "there is no kubectl on this machine", remedy)) from None
    except subprocess.TimeoutExpired:
        problem = f"kubectl has not answered within {ANSWER_SECONDS:.0f} s"
        raise ConfigError(Fault("kubernetes", problem, "look whether the cluster answers: kubectl get nodes")) from None
    if ended.returncode:
        said = "; ".join(line for line in ended.stderr.splitlines() if line.strip()) or f"code {ended.returncode}"
        remedy = f"what was made before it goes with: kubectl delete -f {words[-1]}"
        raise ConfigError(Fault("kubernetes", f"kubectl refuses: {said}", remedy))
