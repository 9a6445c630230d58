"""The commands that people type, as they are typed, from another folder, without installing the package."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from ranks import free_port

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
SMALL = [
    "model=tiny", "model.hidden_size=32", "model.head_dim=8", "model.intermediate_size=64", "model.num_hidden_layers=2",
    "batch.global_size=8", "data.seq_len=64", "run.steps=2",
]  # fmt: skip
PYTHON = [sys.executable]


def call(command: list[object], cwd: Path, stdin: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command in `cwd` with a cache of its own, as a shell without our PYTHONPATH would."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment |= {"XDG_CACHE_HOME": str(cwd / ".cache"), "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, input=stdin, text=True, capture_output=True, timeout=300
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder in which a plain run has finished as runs/tiny-full-plain."""
    folder = tmp_path_factory.mktemp("work")
    done = call([*PYTHON, LAUNCH / "train.py", "tuning=full", *SMALL], folder)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "" and "ask.py run=runs/tiny-full-plain" in done.stdout.splitlines()[-1]
    assert {p.name for p in folder.iterdir()} == {"runs", ".cache"}
    return folder


def test_the_report_is_shown_again(trained):
    done = call([*PYTHON, LAUNCH / "report.py", "run=runs/tiny-full-plain"], trained)
    assert done.returncode == 0, done.stderr
    for text in (
        "Run runs/tiny-full-plain",
        "tokens/s, median",
        "At rest after a step",
        "| same",
        "Resident memory during the run",
    ):
        assert text in done.stdout


def test_a_trained_model_answers(trained):
    ask = [*PYTHON, LAUNCH / "ask.py", "run=runs/tiny-full-plain", "max_new_tokens=4"]
    one = call([*ask, "What is 2+2?"], trained)
    assert one.returncode == 0 and one.stderr == "", one.stderr
    several = call(ask, trained, stdin="What is 2+2?\n\nWho?\n")
    assert [line for line in several.stdout.splitlines() if line.startswith(">")] == ["> What is 2+2?", "> Who?"]


@pytest.mark.parametrize(
    ("script", "arguments", "code", "message"),
    [
        ("ask.py", ["run=runs/none", "Hi"], 4, "there is no folder runs/none"),
        ("ask.py", ["run=runs", "Hi"], 4, "runs holds no export"),
        ("ask.py", ["Hi"], 2, "no run folder is named"),
        ("ask.py", ["run=runs", "max_new_tokens=many", "Hi"], 2, "'many' is not a whole number above zero"),
        ("ask.py", ["run=runs", "--fast"], 2, "there is no such flag"),
        ("report.py", ["run=runs/none"], 4, "there is no folder runs/none"),
        ("report.py", ["run=runs"], 4, "runs is not a run folder"),
        ("report.py", ["run=runs", "more"], 2, "more: is not understood"),
        ("train.py", ["run.dir=runs/tiny-full-plain"], 2, "already holds a run, and nothing is written over"),
        ("train.py", ["resume=runs"], 4, "neither a run folder nor a checkpoint"),
        ("train.py", ["batch.global_siz=8"], 2, "batch.global_size"),
    ],
)
def test_what_cannot_be_done_is_said_on_one_screen_with_a_code(trained, script, arguments, code, message):
    done = call([*PYTHON, LAUNCH / script, *arguments], trained)
    assert (done.returncode, done.stdout) == (code, "") and message in done.stderr
    assert len(done.stderr.splitlines()) < 24 and "Traceback" not in done.stderr


def test_lower_prints_json_and_nothing_else(tmp_path):
    done = call([*PYTHON, LAUNCH / "lower.py", "zero=stage3", "offload=cpu"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["zero_optimization"]["offload_param"]["device"] == "cpu"
    done = call([*PYTHON, LAUNCH / "lower.py", "fsdp=full_shard", "tensor=2", "cluster=4xa10"], tmp_path)
    assert done.returncode == 2 and "accelerate's file has no word for it" in done.stderr and done.stdout == ""
    done = call([*PYTHON, LAUNCH / "lower.py", "fsdp=full_shard", "cluster=4xa10"], tmp_path)
    assert done.returncode == 0 and "FSDP" in json.dumps(json.loads(done.stdout)), done.stderr
    assert not list(tmp_path.iterdir())


def test_help_refusals_and_config_come_without_torch(tmp_path):
    script = str(LAUNCH / "train.py")
    code = f"import sys, runpy; sys.argv = ['train.py', '--help']; runpy.run_path({script!r}, run_name='__main__')"
    done = call([*PYTHON, "-X", "importtime", "-c", code], tmp_path)
    assert done.returncode == 0 and "zero" in done.stdout and "| torch\n" not in done.stderr
    done = call([*PYTHON, "-X", "importtime", "-c", code.replace("--help", "zero=stage9")], tmp_path)
    assert done.returncode == 2 and "did you mean stage3?" in done.stderr and "| torch\n" not in done.stderr
    done = call([*PYTHON, LAUNCH / "train.py", "--cfg", "job", "zero=stage3"], tmp_path)
    assert done.returncode == 0 and "global_size" in done.stdout and not list(tmp_path.iterdir())


def test_the_main_job_as_the_deepspeed_launcher_starts_it(tmp_path):
    launcher = [Path(sys.executable).parent / "deepspeed", f"--master_port={free_port()}"]
    done = call([*launcher, LAUNCH / "train.py", "zero=stage3", "offload=cpu", *SMALL], tmp_path, LOCAL_SIZE="2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "zero3-cpu, 2 ranks on cpu" in done.stdout and done.stdout.count("run      runs/") == 1
    run = tmp_path / "runs" / "tiny-full-zero3-cpu"
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2 and (run / "export" / "model.safetensors").exists()
    accounts = json.loads((run / "ledger.json").read_text())["ranks"]
    assert [account["memory"]["rank"] for account in accounts] == [0, 1]


def test_lora_under_fsdp_as_torchrun_starts_it(tmp_path):
    launcher = [Path(sys.executable).parent / "torchrun", "--nproc-per-node=2", f"--master-port={free_port()}"]
    done = call([*launcher, LAUNCH / "train.py", "fsdp=full_shard", "tuning=lora", *SMALL], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "runs" / "tiny-lora-fsdp-full_shard" / "export" / "adapter_config.json").exists()


@pytest.mark.parametrize(
    ("words", "ranks"),
    [
        (["tensor=2"], 2),
        pytest.param(["fsdp=full_shard", "tensor=2"], 4, marks=pytest.mark.slow),
        pytest.param(["zero=stage1", "tensor=2"], 4, marks=pytest.mark.slow),
        pytest.param(["zero=stage2", "tensor=2", "offload=optimizer"], 4, marks=pytest.mark.slow),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else f"{value}ranks",
)
def test_ranks_that_compute_together_learn_what_one_learns(trained, tmp_path, words, ranks):
    launcher = [Path(sys.executable).parent / "torchrun", f"--nproc-per-node={ranks}", f"--master-port={free_port()}"]
    done = call([*launcher, LAUNCH / "train.py", *words, "run.dir=together", *SMALL], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    losses = [
        [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (tmp_path / "together", trained / "runs" / "tiny-full-plain")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert (tmp_path / "together" / "export" / "model.safetensors").exists()


def test_a_fault_of_the_configuration_is_said_once_by_two_ranks(tmp_path):
    launcher = [Path(sys.executable).parent / "torchrun", "--nproc-per-node=2", f"--master-port={free_port()}"]
    done = call([*launcher, LAUNCH / "train.py", "fsdp=full_shard", "batch.global_size=7"], tmp_path)
    assert done.returncode != 0 and "batch.global_size" in done.stderr
    assert done.stderr.count("The configuration cannot be used") == 2  # rank 0, and torchrun's summary of it
    assert not list(tmp_path.glob("runs"))


def test_a_flag_that_is_not_there_is_the_last_thing_on_the_screen(tmp_path):
    launcher = [Path(sys.executable).parent / "deepspeed", f"--master_port={free_port()}"]
    done = call([*launcher, LAUNCH / "train.py", "zero=stage3", "--fast"], tmp_path, LOCAL_SIZE="2")
    assert done.returncode != 0 and done.stderr.count("unrecognized arguments: --fast") == 1
    assert done.stderr.rstrip().endswith("-> --help lists what can be typed")
