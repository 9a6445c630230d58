"""The door of a launch script, as real processes: help, Hydra's flags, sweeps, exit codes; nothing heavy, no folders."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.config.entry import run_app, sweep, without_local_rank
from orchestrator.config.manual import help_text
from orchestrator.errors import CheckpointError, ConfigError, Fault

REPO = Path(__file__).resolve().parents[2]

SCRIPT = """
import sys
from orchestrator.config import compose, run_app

def task(overrides):
    spec = compose(overrides)
    print("task", spec.strategy.label, spec.seed)
    return 7 if spec.seed == 7 else 0

code = run_app(task)
heavy = sorted({"torch", "transformers", "numpy", "deepspeed", "huggingface_hub", "datasets", "pyarrow"} & set(sys.modules))
assert not heavy, heavy
sys.exit(code)
"""


@pytest.fixture
def run(tmp_path):
    """Runs the script with arguments in an empty folder; the folder must stay empty."""
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    folder = tmp_path / "here"
    folder.mkdir()

    def call(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": str(REPO), "COLUMNS": "100", **environment}
        command = [sys.executable, str(script), *arguments]
        done = subprocess.run(command, check=False, cwd=folder, env=environment, capture_output=True, text=True, timeout=60)
        assert not list(folder.iterdir()), "no folder and no file may appear"
        return done

    return call


def test_help_lists_groups_choices_costs_keys_and_examples(run):
    for flag in ("--help", "-h"):
        done = run("zero=stage3", flag)
        assert (done.returncode, done.stderr) == (0, "")
    text = done.stdout
    assert re.search(r"\* none +no DeepSpeed; costs nothing", text)
    assert "stage3" in text and "half as much traffic" in text and "batch.global_size=16" in text and "[samples]" in text
    assert "cluster.cards_per_node=0" in text and "model.vocab_size=0" not in text
    assert "zero=stage3 offload=cpu" in text and "--cfg" in text
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize("width", [60, 80, 120])
def test_help_fits_the_terminal(width):
    lines = help_text("train", width=width).splitlines()
    examples = lines.index("EXAMPLES")
    assert max(map(len, lines[:examples])) <= width
    assert {"  zero=", "  model=", "  cluster=", "  logger="} <= set(lines)


def test_hydra_s_own_flags_work(run):
    done = run("--cfg", "job", "zero=stage3", "batch.global_size=12")
    assert done.returncode == 0 and "stage: 3" in done.stdout and "global_size: 12" in done.stdout
    assert run("zero=stage3", "--cfg", "job", "seed=5").stdout.count("seed: 5") == 1, "flags may stand anywhere"
    assert "dir: ~/runs/a" in run("--cfg", "job", "run.dir=~/runs/a").stdout
    assert "output_subdir: null" in run("--cfg", "hydra").stdout
    assert "Defaults List" in run("--info", "defaults").stdout
    assert run("--cfg", "job", "-p", "tuning").stdout.startswith("# @package tuning")
    assert "lr" in run("--cfg", "job", "--resolve").stdout
    assert "Hydra" in run("--version").stdout
    assert "Hydra" in run("--hydra-help").stdout


def test_cfg_refuses_what_is_misspelt(run):
    done = run("--cfg", "job", "zero=stag3")
    assert done.returncode == 2 and "did you mean stage3?" in done.stderr and "Traceback" not in done.stderr


def test_task_gets_the_overrides_and_its_code_comes_back(run):
    done = run("zero=stage3", "offload=cpu", "--local_rank=0")
    assert (done.returncode, done.stdout) == (0, "task zero3-cpu 0\n")
    assert run("seed=7").returncode == 7


def test_errors_are_told_once_without_traceback(run):
    done = run("zero=stage3", "fsdp=full_shard", RANK="0", WORLD_SIZE="2")
    assert (
        done.returncode == 2 and done.stderr.startswith("The configuration cannot be used") and "Traceback" not in done.stderr
    )
    done = run("zero=stage3", "fsdp=full_shard", RANK="1", WORLD_SIZE="2")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "")


def test_other_ranks_print_no_help_and_no_config(run):
    for flags in (["--help"], ["--cfg", "job"], ["--version"]):
        done = run(*flags, RANK="1")
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_sweep_runs_each_combination_and_stops_at_a_failure(run):
    done = run("-m", "zero=stage1,stage2", "seed=1,2")
    assert done.stdout.split("\n")[:4] == ["task zero1 1", "task zero1 2", "task zero2 1", "task zero2 2"]
    assert "[4/4] zero=stage2 seed=2" in done.stderr and done.returncode == 0
    done = run("--multirun", "seed=1,7,2")
    assert done.stdout == "task plain 1\ntask plain 7\n" and done.returncode == 7


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--foo"], "--foo"),
        (["--cfg", "jo"], "invalid choice"),
        (["--config-dir", "/tmp"], "reads its own conf/ alone"),
        (["--resolve"], "--resolve"),
        (["--cfg", "job", "--info"], "Only one of"),
        (["-m", "zero"], "key=value1,value2"),
    ],
)
def test_bad_flags_are_refused(run, arguments, part):
    done = run(*arguments)
    assert done.returncode == 2 and part in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("given", [["--local_rank=3"], ["--local-rank=3"], ["--local_rank", "3"], ["--local-rank", "0"]])
def test_local_rank_is_taken_away(given):
    assert without_local_rank(["zero=stage3", *given, "seed=1"]) == ["zero=stage3", "seed=1"]


def test_sweep_keeps_lists_together():
    assert sweep(["tuning.targets=[q_proj,v_proj]", "seed=1,2"]) == [
        ["tuning.targets=[q_proj,v_proj]", "seed=1"],
        ["tuning.targets=[q_proj,v_proj]", "seed=2"],
    ]


def test_an_error_of_one_rank_names_it(monkeypatch, capsys):
    def task(overrides: list[str]) -> int:
        raise CheckpointError(Fault("checkpoint", "no space left"))

    monkeypatch.setenv("RANK", "3")
    assert run_app(task, []) == 4
    assert "rank 3: " in capsys.readouterr().err


def test_sweep_refuses_what_it_cannot_read():
    with pytest.raises(ConfigError):
        sweep(["a"])


def test_a_reader_that_has_read_enough_is_no_error():
    command = f"{sys.executable} launch/train.py --help | head -n 1; echo ${{PIPESTATUS[0]}}"
    ended = subprocess.run(["bash", "-c", command], cwd=REPO, capture_output=True, text=True, timeout=60)
    assert ended.stdout.splitlines()[-1] == "0" and "Traceback" not in ended.stderr
