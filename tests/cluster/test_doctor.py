"""What the doctor says of machines as they are found, and of this one."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from machines import CARD, GIB, SOUND, T4

from orchestrator.cluster import doctor
from orchestrator.cluster.doctor import Need, Severity, examine
from orchestrator.cluster.machine import this_machine, version
from orchestrator.report.findings import verdict

ROOT = Path(__file__).resolve().parents[2]


def test_a_sound_machine_has_nothing_to_mend():
    found = examine(SOUND, Need(ranks=4, on_cards=True, bf16=True))
    assert {finding.severity for finding in found} == {Severity.FINE} and verdict(found).endswith("nothing to mend")


@pytest.mark.parametrize(
    ("changes", "need", "severity", "about", "words"),
    [
        ({}, Need(ranks=8), "fails", "ranks", "8 ranks, 4 cards visible of 4"),
        ({"cards": (CARD,), "visible": "0"}, Need(ranks=2), "fails", "ranks", "CUDA_VISIBLE_DEVICES (now 0)"),
        ({"cards": (), "visible": ""}, Need(on_cards=True), "fails", "cards", "none visible of 4"),
        ({"driver": None, "cards": ()}, Need(on_cards=True), "fails", "driver", "--gpus all"),
        ({"driver": "470.57.02"}, Need(), "fails", "driver", "update the driver to 525.60.13"),
        ({"torch_cuda": None}, Need(), "fails", "torch", "the cards stay idle"),
        ({"cards": (T4,)}, Need(bf16=True), "fails", "bf16", "precision=fp16"),
        ({"cards": (T4,)}, Need(), "risk", "bf16", "Tesla T4 has none"),
        ({"cards": (CARD, replace(CARD, memory_bytes=GIB))}, Need(), "risk", "cards", "the slowest"),
        ({"cards": (replace(CARD, link=(4, 4)),)}, Need(), "risk", "card 0", "4/16 of the speed"),
        ({"unpeered": ((0, 1),)}, Need(), "risk", "peers", "through host memory"),
        ({"nccl": None}, Need(), "risk", "NCCL", "nvidia-nccl"),
        ({"shm_bytes": 64 * 2**20}, Need(), "fails", "/dev/shm", "--ipc=host"),
        ({"shm_bytes": 64 * 2**20, "cards": ()}, Need(), "risk", "/dev/shm", "--shm-size=8g"),
        ({"available_bytes": 100 * GIB}, Need(pinned_bytes=130 * GIB), "fails", "host memory", "code -9"),
        (
            {"usable_bytes": 100 * GIB},
            Need(pinned_bytes=130 * GIB),
            "fails",
            "host memory",
            "the limit of the container or job",
        ),
        ({"available_bytes": 10 * GIB}, Need(), "risk", "host memory", "10.00 GiB free"),
        ({"open_files": 1024}, Need(ranks=4, nodes=8), "risk", "open files", "ulimit -n 4096"),
        ({"locked_bytes": 65536}, Need(nodes=2), "risk", "locked memory", "InfiniBand"),
        ({"locked_bytes": 65536}, Need(nvme=True), "risk", "locked memory", "memlock=-1"),
        ({"host_resolves": False}, Need(), "risk", "host name", "GLOO_SOCKET_IFNAME"),
        ({"free": {"runs": GIB}}, Need(), "risk", "disk", "1.00 GiB free for runs"),
        ({"free": {"runs": GIB}}, Need(disk_bytes=90 * GIB), "fails", "disk", "90.00 GiB does not fit"),
        ({"compiler": None, "ninja": False}, Need(), "risk", "operators", "no a C++ compiler and no ninja"),
        ({"compiler": None}, Need(compiles=True), "fails", "operators", "cannot be built"),
        ({"nvcc": (11, 8)}, Need(), "risk", "operators", "CUDA_HOME"),
        ({"libaio": False}, Need(nvme=True), "fails", "libaio", "libaio-dev"),
        ({"locks": ("/x/lock",)}, Need(), "risk", "operators", "rm /x/lock"),
        ({"installed": {"torch": "2.14.0"}}, Need(), "risk", "versions", "torch 2.14.0 (tested: 2.13.0)"),
    ],
)
def test_what_is_wrong_is_named_with_its_severity_effect_and_mend(changes, need, severity, about, words):
    (finding,) = [found for found in examine(replace(SOUND, **changes), need) if found.severity is not Severity.FINE]
    assert (finding.severity.value, finding.about) == (severity, about)
    assert words in f"{finding.found}\n{finding.effect}\n{finding.mend}" and finding.effect and finding.mend


def test_findings_that_fail_stand_first():
    found = examine(replace(SOUND, libaio=False), Need(ranks=8))
    assert [finding.severity.value for finding in found][:2] == ["fails", "risk"]
    assert "1 of" in verdict(found) and doctor.fails(found) == found[:1]


def test_a_link_is_judged_by_its_speed_and_by_what_arrives():
    assert doctor.link("cpu", "cuda:0", 24.0, True).severity is Severity.FINE
    assert doctor.link("cpu", "cuda:0", 2.0, True).severity is Severity.RISK
    assert "NCCL_P2P_DISABLE=1" in doctor.link("cuda:0", "cuda:1", 24.0, False).mend


def test_a_taken_port_is_named_with_the_flag_that_helps():
    with socket.socket() as listener:
        listener.bind(("", 0))
        listener.listen()
        number = listener.getsockname()[1]
        assert f"--master-port={number + 1}" in doctor.port(number).mend
    assert doctor.port(number).severity is Severity.FINE


def test_versions_are_compared_by_their_leading_numbers():
    assert version("2.13.0+cpu") == (2, 13, 0) and version("?") == ()


def test_this_machine_is_read_in_a_moment(tmp_path):
    this_machine()
    began = time.process_time()
    machine = this_machine([tmp_path / "not" / "there"])
    assert time.process_time() - began < 1.0
    assert machine.cores and machine.usable_bytes <= machine.memory_bytes and machine.free[str(tmp_path / "not" / "there")] > 0
    assert machine.installed["torch"].startswith(machine.tested["torch"])


def test_the_command_shows_one_screen_and_a_code(tmp_path):
    command = [sys.executable, ROOT / "launch" / "doctor.py"]
    done = subprocess.run(command, cwd=tmp_path, text=True, capture_output=True, timeout=60)
    assert done.returncode == 0 and "a run can start" in done.stdout and len(done.stdout.splitlines()) < 30, done.stderr
    done = subprocess.run([*command, "rank=4"], cwd=tmp_path, text=True, capture_output=True, timeout=60)
    assert done.returncode == 2 and "rank=4: is not understood" in done.stderr
