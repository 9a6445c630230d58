"""A short sample of the sweeps that `make faults` runs whole."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def run(script: str, *arguments: str, **environment: str) -> dict:
    """What the sweep `script` found, as it wrote it."""
    paths = os.pathsep.join(str(path) for path in (ROOT, ROOT / "tests"))
    done = subprocess.run(
        [sys.executable, HERE / script, *arguments], capture_output=True, text=True, timeout=600,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip
    assert done.stdout.startswith("{"), done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def boundary(tmp_path_factory):
    """The library that kills a process at a chosen change to the disk."""
    if shutil.which("gcc") is None:
        pytest.skip("gcc compiles what stands between a process and its disk")
    library = tmp_path_factory.mktemp("boundary") / "boundary.so"
    subprocess.run(["gcc", "-O1", "-Wall", "-shared", "-fPIC", "-o", library, HERE / "boundary.c", "-ldl"], check=True)
    return library


def test_a_kill_at_any_change_to_the_disk_leaves_a_whole_checkpoint(boundary):
    found = run("kills.py", "--ranks", "1", "2", "--every", "13", "--random", "5", LD_PRELOAD=str(boundary))
    assert found["wrong"] == [] and found["kills"] > 20


def test_a_run_killed_anywhere_goes_on_to_the_same_end(boundary):
    found = run("lives.py", "--every", "90", LD_PRELOAD=str(boundary))
    assert found["wrong"] == [] and found["kills"]["changes"] > 0


def test_every_damage_is_seen_and_passed_over():
    found = run("damage.py", "--cases", "60")
    assert found["missed"] == [] and sum(found["tried"].values()) == 60


def test_a_poisoned_batch_is_gone_back_from_and_left_out():
    found = run("spikes.py", "--only", "zero3@2")
    assert found["wrong"] == {} and found["same"] == 1


def test_a_checkpoint_of_one_strategy_goes_on_under_another_on_another_number_of_ranks():
    found = run("moves.py", "--only", "plain", "zero3_cpu@2", "tensor2@2", "--tunings", "lora")
    assert found["wrong"] == [] and found["moves"] == 9
    assert found["loss_apart"] < 1e-6


def test_no_rank_gathers_the_model_to_save_it_or_to_resume():
    """The second and third state resume what another strategy has saved. `make faults` has all of them, on 1, 2 and 4 ranks."""
    found = run("frugal.py", "--only", "zero2@2", "full_shard@2", "tensor2@2")
    assert found["wrong"] == [], found
    for name, took in found["states"].items():
        assert took["whole"] > 40 * max(took["save"], took["resume"], took["move"]) > 0, name


def test_a_disk_that_refuses_is_told_and_nothing_is_lost(boundary):
    found = run("disks.py", "--every", "18", LD_PRELOAD=str(boundary))["saves"]
    assert found["wrong"] == [] and found["refused"].keys() == {"ENOSPC", "EDQUOT", "EROFS", "EIO"}


def test_any_composition_is_a_plan_or_a_clear_refusal():
    found = run("compositions.py", "--cases", "60")
    assert found["broken"] == {} and found["valid"] > 2 and found["valid"] + found["refused"] == found["cases"] == 60


def test_a_rank_that_stops_the_others_is_named_and_the_run_ends():
    found = run("hangs.py", "--seconds", "9", "--ranks", "3")["cases"]
    assert {case["kind"] for case in found} == {"stop", "sleep", "skip", "raise", "no data", "late"} and len(found) == 12
    for case in found:  # a busy machine may be late; `make faults` holds them to two seconds
        assert case["named"] and not case["others_named"] and not case["orphans"] and case["seconds"] < 30, case


@pytest.mark.slow
def test_what_the_checks_call_valid_trains():
    found = run("pairs.py", "--only", "6")
    assert found["wrong"] == [] and found["trained"] == 6
