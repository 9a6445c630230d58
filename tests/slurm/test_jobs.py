"""Jobs on a real Slurm of two nodes: they train, are preempted, come back, stay cancelled, and no value runs anything."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from slurm.cluster import SILENCE, Cluster, wait_for

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


def log(folder: RunFolder) -> str:
    return "".join(path.read_text() for path in sorted(folder.job.glob("slurm-*.out")))


@dataclass(frozen=True)
class Queued:
    desk: Desk
    number: str
    folder: RunFolder

    @property
    def job(self) -> dict[str, str]:
        return self.desk.cluster.job(self.number)

    @property
    def log(self) -> str:
        return log(self.folder)

    def moves(self) -> object:
        """Something else whenever the job has done anything."""
        return self.log, len(read_metrics(self.folder.metrics))

    def until(self, what: str, seen: Callable[[], object]) -> None:
        """Return when `seen` gives something true; as long as the job moves, it is waited for."""
        try:
            wait_for(f"{what} of job {self.number}", seen, SILENCE, self.moves)
        except TimeoutError as error:
            raise TimeoutError(f"{error}\n{self.desk.cluster.account(self.number)}\n{self.log}") from None

    def running(self, steps: int = 3) -> None:
        """Return when the run has taken `steps` steps."""

        def stepped() -> bool:
            lines = read_metrics(self.folder.metrics)
            return bool(lines) and lines[-1]["step"] >= steps

        self.until(f"{steps} steps", stepped)

    def started(self, times: int) -> None:
        """Return when the job has been started again `times` times and its run goes on from a checkpoint."""
        self.until(f"start {times}", lambda: f"start {times} on" in self.log)
        self.until("a resumed run", lambda: "resume   after step" in self.log.rpartition(f"start {times} on")[2])

    def saved(self, signal: str) -> list[int]:
        """The steps after which `signal` made the run save."""
        return [int(step) for step in re.findall(rf"saved: {signal} after step (\d+) of", self.log)]

    def ends(self, state: str, restarts: int) -> None:
        ended = self.desk.cluster.wait(self.number, moving=self.moves)
        assert (ended["JobState"], ended["Restarts"]) == (state, str(restarts)), self.log


@pytest.fixture(scope="module", autouse=True)
def limited(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Queued:
    """A job of four minutes that wants to train for hours, and is told to save almost at once. Slurm looks at time limits every
    30 s, so it runs beside the others, with one core of the first node, where nothing preempts it."""
    desk = Desk(cluster, tmp_path_factory.mktemp("limited"))
    words = ("slurm.partition=high", "slurm.constraint=only_n1", "slurm.cpus=1", "slurm.hours=0.066", "slurm.grace=235")
    return Queued(desk, *desk.submit(*ONE, *words, "slurm.requeues=99", *ENDLESS, *SMALL))


@pytest.fixture
def desk(cluster: Cluster, tmp_path: Path) -> Desk:
    return Desk(cluster, tmp_path)


def losses(folder: RunFolder) -> list[float]:
    lines = read_metrics(folder.metrics)
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


def test_two_nodes_of_two_ranks_train_and_hostile_values_do_nothing(desk: Desk) -> None:
    quoted = EVIL.replace('"', '\\"')
    queued = Queued(desk, *desk.submit("nodes=2", "zero=stage2", "run.steps=3", f'run.dir="{quoted}"', *SMALL, **HOSTILE))
    queued.ends("COMPLETED", restarts=0)
    assert queued.folder.path == desk.folder / EVIL and len(losses(queued.folder)) == 3 and queued.folder.done.exists()
    assert "zero2, 4 ranks on cpu" in queued.log and "start 0 on n[1-2]" in queued.log
    assert {path.name for path in desk.folder.iterdir()} == {".cache", EVIL}
    assert queued.job["Partition"] == "main"


def test_preempted_runs_save_and_come_back_and_one_whose_node_dies_finishes(desk: Desk) -> None:
    """In "main" Slurm ends the whole job and requeues it. In "patient" only the ranks are told, and the script requeues it."""
    words = (*ONE, "slurm.constraint=only_n2", "slurm.cpus=2", *SAVING, *SMALL)
    told = Queued(desk, *desk.submit("slurm.partition=patient", "run.steps=1000000", *words))
    ended = Queued(desk, *desk.submit("slurm.partition=main", "run.steps=400", *words))
    told.running()
    ended.running()
    rival = ("-p", "high", "-c4", "--nodelist=n2", "-o", "/dev/null", "--wrap", "sleep 1")
    desk.cluster.run("sbatch", "--parsable", *rival, cwd=desk.folder)
    for queued in (told, ended):
        queued.started(1)
        (saved,) = queued.saved("SIGTERM")
        assert f"resume   after step {saved} of" in queued.log and queued.job["Restarts"] == "1"
    assert "goes on in the same job, start 1 of at most 3" in told.log and "ended by Slurm (TERM)" in ended.log
    desk.cluster.run("scancel", told.number)
    told.ends("CANCELLED", restarts=1)
    ended.running(ended.saved("SIGTERM")[0] + 2)
    desk.cluster.kill_node("n2")
    desk.cluster.start_node("n2")
    ended.ends("COMPLETED", restarts=2)
    assert len(losses(ended.folder)) == 400 and ended.folder.done.exists() and "start 2 on n2" in ended.log


@pytest.mark.slow
def test_a_run_of_two_nodes_of_which_one_dies_is_started_again_and_finishes(desk: Desk) -> None:
    words = ("nodes=2", "cluster.cards_per_node=1", "slurm.cpus=2", "fsdp=full_shard", "run.steps=80", "checkpoint.every=10")
    queued = Queued(desk, *desk.submit(*words, *SMALL))
    queued.running(12)
    desk.cluster.kill_node("n2")
    desk.cluster.start_node("n2")
    queued.ends("COMPLETED", restarts=1)
    assert len(losses(queued.folder)) == 80 and "start 1 on n[1-2]" in queued.log and queued.folder.done.exists()


def test_of_an_array_one_task_starts_again_as_often_as_allowed_and_a_cancelled_one_never(desk: Desk) -> None:
    words = (*ONE, "slurm.array=true", "slurm.cpus=1", "slurm.requeues=1", "seed=1,2")
    said = desk.type("-m", *words, *ENDLESS, *SMALL)
    number = re.search(r"^job +(\d+)", said, re.MULTILINE)
    first, second = (RunFolder(Path(path)) for path in re.findall(r"^run +(.+)$", said, re.MULTILINE))
    later = re.search(r"python launch/(compare\.py) (runs=.+)$", said, re.MULTILINE)
    assert number and later and later[2] == f"runs={first.path},{second.path}"
    told, other = (Queued(desk, f"{number[1]}_{task}", folder) for task, folder in enumerate((first, second)))
    save = ("scancel", "-b", "-s", "USR1", told.number)
    told.running()
    desk.cluster.run(*save)
    told.started(1)
    told.running(told.saved("SIGUSR1")[0] + 2)
    desk.cluster.run(*save)
    told.ends("FAILED", restarts=1)
    assert "was started again 1 times already (slurm.requeues); submit it anew with resume=auto" in told.log
    other.running()
    desk.cluster.run("scancel", other.number)
    other.ends("CANCELLED", restarts=0)
    assert re.match(r"SIGTERM after step \d+ of 1000000", second.stopped.read_text()) and not second.done.exists()
    assert losses(first)[:3] != losses(second)[:3]
    shown = desk.cluster.run(sys.executable, SUBMIT.with_name(later[1]), later[2], cwd=desk.folder)
    table = shown.splitlines()
    assert [table[row].split()[0] for row in (1, 2)] == [first.path.name, second.path.name] and "MiB (" in table[2]
    assert (desk.folder / "plans" / "runs.png").is_file()


def test_a_job_that_slurm_would_refuse_is_not_queued(desk: Desk) -> None:
    with pytest.raises(RuntimeError, match=r"sbatch refuses: .*invalid partition") as caught:
        desk.type(*ONE, "slurm.partition=nowhere", *SMALL)
    assert "Traceback" not in str(caught.value) and not (desk.folder / "runs").exists()


def test_the_time_limit_interrupts_twice_and_the_losses_are_those_of_an_uninterrupted_run(
    limited: Queued, world: World, tmp_path: Path
) -> None:
    folder = limited.folder
    limited.until("two interruptions by the time limit", lambda: len(limited.saved("SIGUSR1")) >= 2)
    length = limited.saved("SIGUSR1")[1] + 3
    limited.running(length)
    limited.desk.cluster.run("scancel", limited.number)
    ended = limited.desk.cluster.wait(limited.number, moving=limited.moves)
    assert ended["JobState"] == "CANCELLED" and int(ended["Restarts"]) >= 2 and "told to save (USR1)" in limited.log
    whole = compose([*SMALL, f"run.steps={length}", f"run.dir={tmp_path}/whole", "logging.every=100000"], ranks=1)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the job, which has one core: sums are split among threads
    try:
        assert losses(Run(whole, world).execute().folder) == losses(folder)[:length]
    finally:
        torch.set_num_threads(threads)
