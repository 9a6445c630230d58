"""Jobs on a real Slurm of two nodes: they train, are preempted, come back, stay cancelled, and no value runs anything."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from slurm.cluster import Cluster, wait_for

from orchestrator.config import compose
from orchestrator.train.folder import RunFolder
from orchestrator.train.metrics import read_metrics
from orchestrator.train.run import Run
from orchestrator.train.world import World

pytestmark = pytest.mark.slurm

SUBMIT = Path(__file__).resolve().parents[2] / "launch" / "submit.py"
SMALL = (
    "model=tiny", "model.hidden_size=32", "model.head_dim=8", "model.intermediate_size=64", "model.num_hidden_layers=2",
    "batch.global_size=8", "data.seq_len=64", "schedule=constant", "schedule.warmup=0", "export.format=none",
)  # fmt: skip
SAVING = ("checkpoint.every=1", "logging.every=100000")
"""Flushing a checkpoint at each step takes time and hardly any processor: the run lasts, and leaves the cores to the others."""

ENDLESS = ("run.steps=1000000", *SAVING)

ONE = ("nodes=1", "cluster.cards_per_node=1")
EVIL = """it's "a" $(touch hacked) `touch hacked` ; touch hacked"""
HOSTILE = {"SBATCH_PARTITION": "nowhere", "SBATCH_HOLD": "1", "SLURM_NNODES": "7", "SBATCH_TIMELIMIT": "0", "RANK": "3"}


class Desk:
    """A person at the login node, in a folder of their own."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder

    def type(self, *words: str, **variables: str) -> str:
        """What `launch/submit.py` says to `words`."""
        cache = {"XDG_CACHE_HOME": str(self.folder / ".cache"), "OMP_NUM_THREADS": "1"}
        return self.cluster.run(sys.executable, SUBMIT, "slurm=cpu", *words, cwd=self.folder, **cache, **variables)

    def submit(self, *words: str, **variables: str) -> tuple[str, RunFolder]:
        """(the job's number, the folder of its run)."""
        said = self.type(*words, **variables)
        number, folder = re.search(r"^job +(\d+)", said, re.MULTILINE), re.search(r"^run +(.+)$", said, re.MULTILINE)
        assert number and folder, said
        return number[1], RunFolder(Path(folder[1]))


@dataclass(frozen=True)
class Queued:
    desk: Desk
    number: str
    folder: RunFolder


@pytest.fixture(scope="module", autouse=True)
def limited(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Queued:
    """A job of one minute that wants to train for hours. Slurm looks at time limits every 30 s, so it runs beside the others:
    first on the first node, with one core, where nothing preempts it."""
    desk = Desk(cluster, tmp_path_factory.mktemp("limited"))
    words = ("slurm.partition=high", "slurm.cpus=1", "slurm.hours=0.016", "slurm.grace=55", "slurm.requeues=9")
    return Queued(desk, *desk.submit(*ONE, *words, *ENDLESS, *SMALL))


@pytest.fixture
def desk(cluster: Cluster, tmp_path: Path) -> Desk:
    return Desk(cluster, tmp_path)


def running(queued: Queued, steps: int = 3) -> None:
    """Return when the run has taken `steps` steps."""

    def stepped() -> bool:
        lines = read_metrics(queued.folder.metrics)
        return bool(lines) and lines[-1]["step"] >= steps

    wait_for(f"{steps} steps of job {queued.number}", stepped, 240)


def losses(folder: RunFolder) -> list[float]:
    lines = read_metrics(folder.metrics)
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


def log(folder: RunFolder) -> str:
    return "".join(path.read_text() for path in sorted(folder.job.glob("slurm-*.out")))


def finished(cluster: Cluster, number: str, folder: RunFolder, restarts: int) -> None:
    ended = cluster.wait(number)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", str(restarts)) and folder.done.exists(), log(folder)


def test_two_nodes_of_two_ranks_train_and_hostile_values_do_nothing(desk: Desk) -> None:
    quoted = EVIL.replace('"', '\\"')
    number, folder = desk.submit("nodes=2", "zero=stage2", "run.steps=3", f'run.dir="{quoted}"', *SMALL, **HOSTILE)
    finished(desk.cluster, number, folder, restarts=0)
    assert folder.path == desk.folder / EVIL and len(losses(folder)) == 3
    assert "zero2, 4 ranks on cpu" in log(folder) and "start 0 on n[1-2]" in log(folder)
    assert {path.name for path in desk.folder.iterdir()} == {".cache", EVIL}
    assert desk.cluster.job(number)["Partition"] == "main"


def test_a_preempted_run_saves_and_comes_back(desk: Desk) -> None:
    victim = Queued(desk, *desk.submit(*ONE, "slurm.cpus=4", *ENDLESS, *SMALL))
    running(victim)
    node = desk.cluster.job(victim.number)["NodeList"]
    rival = ("-p", "high", "-c4", f"--nodelist={node}", "-o", "/dev/null", "--wrap", "sleep 1")
    desk.cluster.run("sbatch", "--parsable", *rival, cwd=desk.folder)
    wait_for("a second start", lambda: "resume   after step" in log(victim.folder), 240)
    (saved,) = re.findall(r"saved: SIGTERM after step (\d+) of 1000000", log(victim.folder))
    running(victim, int(saved) + 2)
    assert f"resume   after step {saved} of 1000000" in log(victim.folder)
    assert desk.cluster.job(victim.number)["Restarts"] == "1"
    desk.cluster.run("scancel", victim.number)
    assert desk.cluster.wait(victim.number)["JobState"] == "CANCELLED"


@pytest.mark.slow
def test_a_run_whose_node_dies_is_started_again_and_finishes(desk: Desk) -> None:
    words = ("nodes=2", "cluster.cards_per_node=1", "slurm.cpus=2", "fsdp=full_shard", "run.steps=200", "checkpoint.every=20")
    queued = Queued(desk, *desk.submit(*words, *SMALL))
    running(queued, 30)
    desk.cluster.kill_node("n2")
    desk.cluster.start_node("n2")
    finished(desk.cluster, queued.number, queued.folder, restarts=1)
    assert len(losses(queued.folder)) == 200 and "start 1 on n[1-2]" in log(queued.folder)


def test_of_an_array_one_task_starts_again_as_often_as_allowed_and_a_cancelled_one_never(desk: Desk) -> None:
    words = (*ONE, "slurm.array=true", "slurm.cpus=1", "slurm.requeues=1", "seed=1,2")
    said = desk.type("-m", *words, *ENDLESS, *SMALL)
    number = re.search(r"^job +(\d+)", said, re.MULTILINE)
    first, second = (RunFolder(Path(path)) for path in re.findall(r"^run +(.+)$", said, re.MULTILINE))
    assert number and f"launch/compare.py runs={first.path},{second.path}" in said
    told, other = (Queued(desk, f"{number[1]}_{task}", folder) for task, folder in enumerate((first, second)))
    save = ("scancel", "-b", "-s", "USR1", told.number)
    running(told)
    desk.cluster.run(*save)
    wait_for("a second start", lambda: "start 1 on" in log(first), 240)
    running(told, int(re.findall(r"saved: SIGUSR1 after step (\d+) of", log(first))[0]) + 2)
    desk.cluster.run(*save)
    ended = desk.cluster.wait(told.number)
    assert (ended["JobState"], ended["Restarts"]) == ("FAILED", "1")
    assert "was started again 1 times already (slurm.requeues); submit it anew with resume=auto" in log(first)
    running(other)
    desk.cluster.run("scancel", other.number)
    ended = desk.cluster.wait(other.number)
    assert (ended["JobState"], ended["Restarts"]) == ("CANCELLED", "0")
    assert re.match(r"SIGTERM after step \d+ of 1000000", second.stopped.read_text()) and not second.done.exists()
    assert losses(first)[:3] != losses(second)[:3]


def test_a_job_that_slurm_would_refuse_is_not_queued(desk: Desk) -> None:
    with pytest.raises(RuntimeError, match=r"sbatch refuses: .*invalid partition") as caught:
        desk.type(*ONE, "slurm.partition=nowhere", *SMALL)
    assert "Traceback" not in str(caught.value) and not (desk.folder / "runs").exists()


def test_the_time_limit_interrupts_twice_and_the_losses_are_those_of_an_uninterrupted_run(
    limited: Queued, world: World, tmp_path: Path
) -> None:
    cluster, number, folder = limited.desk.cluster, limited.number, limited.folder

    def saved() -> list[int]:
        return [int(step) for step in re.findall(r"saved: SIGUSR1 after step (\d+) of", log(folder))]

    wait_for("two interruptions by the time limit", lambda: len(saved()) >= 2, 240)
    length = saved()[1] + 3
    running(limited, length)
    cluster.run("scancel", number)
    assert cluster.wait(number)["JobState"] == "CANCELLED" and "told to save (USR1)" in log(folder)
    whole = compose([*SMALL, f"run.steps={length}", f"run.dir={tmp_path}/whole", "logging.every=100000"], ranks=1)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the job, which has one core: sums are split among threads
    try:
        assert losses(Run(whole, world).execute().folder) == losses(folder)[:length]
    finally:
        torch.set_num_threads(threads)
