"""What is asked of a scheduler, without one: the script, sbatch's options, and the words that are refused."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.cluster import slurm
from orchestrator.cluster.slurm import Batch
from orchestrator.config import compose, compose_job
from orchestrator.errors import CheckpointError, ConfigError
from orchestrator.spec import Slurm, digest
from orchestrator.train import submission
from orchestrator.train.folder import RunFolder

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
JOB = Slurm(cpus=4, memory_gib=0, minutes=60, grace=300, requeues=3)


def batch(**changes: object) -> Batch:
    made = Batch(JOB, "name", (Path("/runs/a b%j"),), 2, 4, True, "/usr/bin/python it's", Path("/here/train.py"))
    return replace(made, **changes)


def test_options_say_what_the_job_needs_each_as_one_argument():
    said = slurm.options(batch(job=replace(JOB, partition="gpu", gpu="a10", constraint="a&b", memory_gib=64)))
    for option in ("--nodes=2", "--gpus-per-node=a10:4", "--mem=64G", "--time=60", "--signal=B:USR1@300", "--constraint=a&b"):
        assert option in said
    assert "--output=/runs/a b%%j/job/slurm-%j.out" in said and not any(word.startswith("--array") for word in said)
    several = slurm.options(batch(on_cards=False, folders=(Path("/a"), Path("/b"))))
    assert "--array=0-1" in several and not any("gpu" in word for word in several)


def test_the_script_is_sound_for_bash_and_quotes_its_values(tmp_path):
    text = slurm.render(LAUNCH / "slurm", batch(name="x\n#SBATCH --hold", job=replace(JOB, setup="/etc/it's")))
    (tmp_path / "job").write_text(text)
    assert subprocess.run(["bash", "-n", tmp_path / "job"], capture_output=True).stderr == b""
    assert "'/usr/bin/python it'\"'\"'s'" in text and "source '/etc/it'\"'\"'s'" in text
    assert not [line for line in text.splitlines() if line.startswith("#SBATCH")]


def test_the_environment_carries_no_option_of_a_surrounding_job():
    kept = slurm.environment({"SLURM_JOB_ID": "1", "SBATCH_HOLD": "1", "SLURM_CONF": "/c", "RANK": "1", "HOME": "/h"})
    assert kept == {"SLURM_CONF": "/c", "HOME": "/h"}


@pytest.mark.parametrize(
    ("word", "field"),
    [
        ("slurm.name=--hold", "slurm.name"),
        ("slurm.name='a b'", "slurm.name"),
        ('slurm.partition="main --hold"', "slurm.partition"),
        ("slurm.account='$(id)'", "slurm.account"),
        ("slurm.constraint='a;b'", "slurm.constraint"),
        ("slurm.gpu='a10:4 '", "slurm.gpu"),
        ("run.dir='a\nb'", "run.dir"),
        ("run.dir='a\\b'", "run.dir"),
        ("slurm.setup='/no\\such'", "slurm.setup"),
        ("slurm.setup=/no/such", "slurm.setup"),
        ("slurm.cpus=0", "slurm.cpus"),
        ("slurm.hours=0.01", "slurm.hours"),
        ("cluster=local", "cluster"),
        ("slurm=none", "slurm"),
    ],
)
def test_words_that_would_change_a_job_are_refused_by_name(word, field):
    with pytest.raises(ConfigError) as caught:
        compose_job(["slurm=cpu", "zero=stage2", word])
    assert field in {fault.field for fault in caught.value.faults}


def test_faults_of_the_run_and_of_the_job_come_together():
    with pytest.raises(ConfigError) as caught:
        compose_job(["slurm=a10x4", "zero=stage2", "batch.global_size=7", "slurm.cpus=0"])
    assert {fault.field for fault in caught.value.faults} == {"batch.global_size", "slurm.cpus"}


def test_a_job_is_composed_for_its_nodes_and_not_for_this_machine():
    spec, job = compose_job(["slurm=a10x4", "cluster.nodes=2", "zero=stage3", "model=llama3_8b", "slurm.hours=0.5"])
    assert (spec.cluster.name, spec.strategy.ranks, spec.precision.compute) == ("4xa10", 8, "bf16")
    assert isinstance(job, Slurm) and job.minutes == 30


def test_a_run_that_starts_here_refuses_words_about_a_job():
    with pytest.raises(ConfigError, match=r"launch/submit\.py takes the same words"):
        compose(["slurm=cpu", "zero=stage2"], ranks=2)


def submitted(tmp_path: Path, *words: str):
    spec = compose(["model=tiny", f"run.dir={tmp_path}/run", *words], ranks=1)
    return spec, submission.save(RunFolder(tmp_path / "run"), spec, {"words": ""})


def test_what_was_planned_is_what_runs(tmp_path):
    spec, path = submitted(tmp_path)
    assert submission.load(path, 1) == spec
    document = json.loads(path.read_text())
    document["spec"]["batch"]["micro"] = 3
    path.write_text(json.dumps(document))
    with pytest.raises(ConfigError, match="changed since it was planned"):
        submission.load(path, 1)


def test_a_saved_spec_is_refused_on_other_ranks_with_other_words_and_where_it_is_none(tmp_path):
    _, path = submitted(tmp_path)
    with pytest.raises(ConfigError, match="planned for 1 ranks, but 2 run"):
        submission.load(path, 2)
    with pytest.raises(ConfigError, match=r"seed=3 would change it"):
        submission.path_in([f"spec={path}", "seed=3"])
    path.write_text("[]")
    with pytest.raises(ConfigError, match="cannot be read"):
        submission.load(path, 1)


def test_a_job_that_starts_again_goes_on_from_its_own_checkpoint(tmp_path):
    spec, path = submitted(tmp_path)
    saved = RunFolder(tmp_path / "run").checkpoint(2)
    saved.mkdir(parents=True)
    (saved / "checkpoint.json").write_text("{}")
    again = submission.load(path, 1)
    assert again.resume == "auto" and digest(replace(again, resume="none")) == digest(spec)


def test_a_folder_that_waits_for_a_job_is_not_given_to_another(tmp_path):
    spec, _ = submitted(tmp_path)
    with pytest.raises(ConfigError, match="a job was submitted for"):
        submission.placed(spec, tmp_path)
    assert submission.placed(replace(spec, resume="auto"), tmp_path).run.dir == f"{tmp_path}/run"
    free = replace(spec, run=replace(spec.run, dir=None))
    first = submission.placed(free, tmp_path)
    second = submission.placed(free, tmp_path, [Path(first.run.dir)])
    assert (first.run.dir, second.run.dir) == (f"{tmp_path}/tiny-full-plain", f"{tmp_path}/tiny-full-plain-2")
    with pytest.raises(CheckpointError):
        submission.placed(replace(free, resume=str(tmp_path)), tmp_path)


def type_submit(cwd: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, LAUNCH / "submit.py", *words], cwd=cwd, text=True, capture_output=True, timeout=120)


def test_a_dry_run_prints_the_script_and_writes_nothing(tmp_path):
    done = type_submit(tmp_path, "slurm=a10x4", "nodes=2", "zero=stage3", "tuning=lora", "model=llama3_8b", "dry=true")
    assert done.returncode == 0 and done.stdout.startswith("#!/bin/bash\n") and not list(tmp_path.iterdir()), done.stderr
    assert "plan     " in done.stderr and "--nodes=2" in done.stderr and "--nproc-per-node=4" in done.stdout


def test_a_misfit_is_refused_before_anything_is_submitted(tmp_path):
    done = type_submit(tmp_path, "slurm=a10x4", "zero=stage0", "model=llama3_8b", "tuning=full", "plan.on_misfit=refuse")
    assert done.returncode == 3 and "The run does not fit" in done.stderr and not list(tmp_path.iterdir())


def test_of_a_sweep_what_cannot_be_is_left_out_with_its_reason(tmp_path):
    done = type_submit(tmp_path, "-m", "slurm=cpu", "zero=stage2,stage3", "offload=none,cpu", "dry=true")
    assert done.returncode == 0 and done.stdout.count("#!/bin/bash") == 3
    assert "left out slurm=cpu zero=stage2 offload=cpu" in done.stderr and "offload=optimizer" in done.stderr
