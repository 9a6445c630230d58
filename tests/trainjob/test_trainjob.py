"""A TrainJob: its documents hold to Kubeflow's models, no value becomes anything else, and what its pods run really runs."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from kubeflow_trainer_api import models
from ranks import free_port

from orchestrator.config import compose, compose_job
from orchestrator.errors import ConfigError
from orchestrator.jobs import kubernetes
from orchestrator.jobs.planned import plan
from orchestrator.spec import Kubernetes, RunSpec, digest, from_json
from orchestrator.train import submission
from orchestrator.train.folder import RunFolder

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
POD = LAUNCH / "kubernetes" / "pod.sh"
MODELS = {
    "ConfigMap": models.IoK8sApiCoreV1ConfigMap,
    "TrainingRuntime": models.TrainerV1alpha1TrainingRuntime,
    "TrainJob": models.TrainerV1alpha1TrainJob,
}
SMALL = (
    "model=tiny", "model.hidden_size=32", "model.head_dim=8", "model.intermediate_size=64", "model.num_hidden_layers=2",
    "batch.global_size=8", "data.seq_len=64", "export.format=none", "logging.every=100000",
)  # fmt: skip
PATIENCE = 600
"""Seconds for a start or an end, on a machine that others use as well."""

KUBECTL = r"""#!/bin/bash
# Notes what it is told, and refuses all but the first time.
printf "%s\n" "$@" >> said
[[ $(wc -l < said) -lt 4 ]] || { echo "no such kind" >&2; exit 1; }
"""
EVIL = '/shared/it\'s "a" $(HOME) $$ `id` {{x}} %s: #'


def type_submit(cwd: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, LAUNCH / "submit.py", *words]
    return subprocess.run(command, cwd=cwd, text=True, capture_output=True, timeout=240)


def expanded(argument: str, variables: dict[str, str]) -> str:
    """`argument` as a container gets it: $(NAME) replaced where NAME is known, $$ read as $ (core/v1 Container, args)."""
    return re.sub(r"\$\$|\$\(([^)]*)\)", lambda m: "$" if m[0] == "$$" else variables.get(m[1], m[0]), argument)


def test_the_documents_hold_to_the_models_of_kubernetes_and_trainer_and_carry_the_spec(tmp_path):
    quoted = EVIL.replace('"', '\\"')
    words = ("kubernetes=a10x4", "nodes=2", "zero=stage3", "tuning=lora", "model=llama3_8b", "kubernetes.namespace=ml")
    done = type_submit(tmp_path, *words, f'run.dir="{quoted}"', "dry=true")
    assert done.returncode == 0 and not list(tmp_path.iterdir()), done.stderr
    documents = {document["kind"]: document for document in yaml.safe_load_all(done.stdout)}
    for kind, document in documents.items():
        read = MODELS[kind].from_dict(document)
        assert json.loads(read.to_json()) == document, f"{kind} loses or gains something in its model"
    spec, train_job = documents["TrainingRuntime"]["spec"], documents["TrainJob"]["spec"]
    trainer = train_job["trainer"]
    assert (trainer["numNodes"], trainer["numProcPerNode"]) == (2, 4) == (spec["mlPolicy"]["numNodes"], 4)
    assert trainer["resourcesPerNode"]["limits"]["nvidia.com/gpu"] == "4"
    assert [expanded(word, {"HOME": "/root"}) for word in trainer["args"]] == ["/job/submitted.json", EVIL, "300"]
    pod = spec["template"]["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] > 300 and pod["securityContext"]["runAsNonRoot"]
    names = {document["metadata"]["name"] for document in documents.values()}
    assert names == {train_job["runtimeRef"]["name"], pod["volumes"][1]["configMap"]["name"]} and len(names) == 1
    saved = json.loads(documents["ConfigMap"]["data"]["submitted.json"])
    planned = from_json(RunSpec, saved["spec"])
    assert saved["digest"] == digest(planned) and (planned.run.dir, planned.strategy.ranks) == (EVIL, 8)
    assert planned.cluster.host_bytes == 256 * 2**30


@pytest.mark.parametrize(
    ("word", "field"),
    [
        ("kubernetes.name='a b'", "kubernetes.name"),
        ("kubernetes.name=Upper", "kubernetes.name"),
        ("kubernetes.name=--dry-run", "kubernetes.name"),
        ("kubernetes.namespace='a\nb'", "kubernetes.namespace"),
        ("kubernetes.image='x --privileged'", "kubernetes.image"),
        ("kubernetes.claim='$(id)'", "kubernetes.claim"),
        ("kubernetes.mount=relative", "kubernetes.mount"),
        ("kubernetes.resource=gpu", "kubernetes.resource"),
        ("kubernetes.shm_gib=100", "kubernetes.shm_gib"),
        ("kubernetes.cpus=0", "kubernetes.cpus"),
        ("run.dir='a\nb'", "run.dir"),
        ("slurm=cpu", "slurm, kubernetes"),
        ("cluster=local", "cluster"),
    ],
)
def test_words_that_would_change_a_job_are_refused_by_name(word, field):
    with pytest.raises(ConfigError) as caught:
        compose_job(["kubernetes=cpu", "zero=stage2", word])
    assert field in {fault.field for fault in caught.value.faults}


def test_a_run_is_planned_with_the_memory_of_its_pod():
    spec, job = compose_job(["kubernetes=cpu", "zero=stage2", "kubernetes.memory_gib=4"])
    assert isinstance(job, Kubernetes) and spec.cluster.host_bytes == 4 * 2**30 == 2 * spec.cluster.card.memory_bytes


def test_what_is_submitted_is_what_kubectl_is_given_and_its_refusal_is_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one, two = (plan(["kubernetes=cpu", "zero=stage2", f"kubernetes.name={name}"]) for name in ("one", "two"))
    file = tmp_path / "runs/one/job/trainjob.yaml"
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(ConfigError, match="there is no kubectl on this machine"):
        kubernetes.create(one)
    file.unlink()
    kubectl = tmp_path / "bin" / "kubectl"
    kubectl.parent.mkdir()
    kubectl.write_text(KUBECTL)
    kubectl.chmod(0o755)
    monkeypatch.setenv("PATH", f"{kubectl.parent}:/usr/bin:/bin")
    made = kubernetes.create(one)
    assert (made.name, made.command) == ("one", "kubectl create -f runs/one/job/trainjob.yaml")
    assert (tmp_path / "said").read_text().split() == ["create", "-f", "runs/one/job/trainjob.yaml"]
    assert "kind: TrainJob" in file.read_text()
    with pytest.raises(ConfigError, match="is that of an earlier job"):
        kubernetes.create(one)
    with pytest.raises(ConfigError, match=r"kubectl refuses: no such kind(.|\n)*kubectl delete -f"):
        kubernetes.create(two)


class Pod:
    """What the container of a pod runs, with the variables that Trainer's torch plugin gives it."""

    def __init__(self, folder: Path, *words: str, ranks: int = 1) -> None:
        self.run = RunFolder(folder / "run")
        spec = compose([*SMALL, f"run.dir={self.run.path}", *words], ranks=ranks)
        self._spec = submission.save(RunFolder(folder / "config"), spec, {"words": ""})
        self._variables = {
            **{name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")},
            "PET_NNODES": "1", "PET_NPROC_PER_NODE": str(ranks), "PET_NODE_RANK": "0", "PET_MASTER_ADDR": "127.0.0.1",
            "ERROR_FILE": str(folder / "termination-log"), "XDG_CACHE_HOME": str(folder / ".cache"), "OMP_NUM_THREADS": "1",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }  # fmt: skip
        self.log = folder / "log"
        self._started: list[subprocess.Popen[bytes]] = []

    def close(self) -> None:
        """Leave no process, also when a test has given up on it."""
        for process in self._started:
            if process.poll() is None:
                for each in (*psutil.Process(process.pid).children(recursive=True), process):
                    each.kill()
                process.wait()

    def start(self) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as log:
            started = subprocess.Popen(
                ["bash", POD, self._spec, self.run.path, "60"], stdout=log, stderr=log, start_new_session=True,
                env={**self._variables, "PET_MASTER_PORT": str(free_port())},
            )  # fmt: skip
        self._started.append(started)
        return started


@pytest.mark.timeout(3 * PATIENCE)
def test_a_pod_that_is_told_to_end_saves_and_the_one_after_it_finishes(tmp_path, request):
    pod = Pod(tmp_path, "run.steps=60", "checkpoint.every=1")
    request.addfinalizer(pod.close)
    started = pod.start()
    deadline = time.monotonic() + PATIENCE
    while not (pod.run.metrics.exists() and pod.run.metrics.stat().st_size):
        assert started.poll() is None and time.monotonic() < deadline, pod.log.read_text()
        time.sleep(0.05)
    os.kill(started.pid, signal.SIGTERM)  # as the kubelet does: to the first process alone
    assert started.wait(PATIENCE) == 75, pod.log.read_text()
    assert re.match(r"SIGTERM after step \d+ of 60", pod.run.stopped.read_text()) and not pod.run.done.exists()
    assert pod.start().wait(PATIENCE) == 0, pod.log.read_text()
    steps = [json.loads(line)["step"] for line in pod.run.metrics.read_text().splitlines()]
    assert steps == list(range(1, 61)) and pod.run.done.exists()


def test_a_pod_whose_run_is_refused_says_so_by_its_code_and_its_last_message(tmp_path, request):
    pod = Pod(tmp_path)
    request.addfinalizer(pod.close)
    document = json.loads(pod._spec.read_text())
    document["spec"]["batch"]["micro"] = 3
    pod._spec.write_text(json.dumps(document))
    assert pod.start().wait(PATIENCE) == 2, pod.log.read_text()
    assert "changed since it was planned" in (tmp_path / "termination-log").read_text()
