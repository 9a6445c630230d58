"""What is found out about a disk before a run swaps to it: every message, and a look at the real one."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from ctypes.util import find_library
from pathlib import Path

import pytest

from orchestrator.engine.swap_folder import MARK, PREFIX, claim
from orchestrator.errors import ConfigError
from orchestrator.layout import Layout, Row
from orchestrator.spec import Home, Nvme
from orchestrator.train import disk

MIB = 2**20
needs_op = pytest.mark.skipif(
    find_library("aio") is None or shutil.which("c++") is None,
    reason="DeepSpeed's async_io cannot be built here: no libaio or c++",
)


def layout(mib: int) -> Layout:
    rows = (Row("master", "fp32", Home.NVME, mib * MIB // 4), Row("staging", "fp32", Home.CPU, 2 * MIB))
    return Layout(0, 1, rows)


def refused(path: Path, mib: int = 1) -> str:
    with pytest.raises(ConfigError) as caught:
        disk.look(Nvme(str(path), 1), layout(mib), (0, 0), 1, print)
    return str(caught.value)


def test_a_disk_that_is_too_small_is_refused_with_the_numbers(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    text = refused(tmp_path / "swap", free // MIB + 5000)
    assert re.search(r"[\d.]+ GiB will be swapped to .* by the ranks of this machine, and [\d.]+ GiB are free there", text)
    assert "short with 1.00 GiB to spare" in text and "name a larger disk" in text


def test_memory_is_no_disk() -> None:
    shared = Path("/dev/shm")
    if disk.file_system(shared) != "tmpfs":
        pytest.skip("/dev/shm is no tmpfs here")
    place = shared / f"{PREFIX}test"
    try:
        assert "lies in memory (tmpfs)" in refused(place)
    finally:
        place.rmdir()


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "swap").write_text("")
    text = refused(tmp_path / "swap")
    assert "cannot be made" in text and "name a folder on a local disk" in text


def test_the_file_system_is_that_of_the_nearest_mount(tmp_path: Path) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text("/dev/a / ext4 rw 0 0\nserver:/x /data nfs4 rw 0 0\n/dev/b /data/my\\040disk xfs rw 0 0\n")
    kinds = {path: disk.file_system(Path(path), mounts) for path in ("/home", "/data/x", "/data/my disk/swap")}
    assert kinds == {"/home": "ext4", "/data/x": "nfs4", "/data/my disk/swap": "xfs"}
    assert "nfs4" in disk.REMOTE


def test_a_limit_on_locked_memory_is_told_before_deepspeed_dies_of_it() -> None:
    (fault,) = disk.lock_faults(512 * MIB, 8 * MIB)
    assert "page-locks 512.0 MiB" in fault.problem and "allows 8.0 MiB" in fault.problem
    assert "ulimit -l unlimited" in fault.remedy
    assert disk.lock_faults(512 * MIB, -1) == []


@needs_op
def test_a_real_disk_is_measured_and_swept(tmp_path: Path) -> None:
    """A dead job's folder goes, the probe leaves nothing, and the sentence says what a step costs."""
    told: list[str] = []
    claim(tmp_path / "swap", "dead").lock.close()
    assert (tmp_path / "swap" / f"{PREFIX}dead" / MARK).is_file()
    said = disk.look(Nvme(str(tmp_path / "swap"), 1), layout(1), (3 * 2**30, 2**30), 2, told.append)
    assert any("which a job that died has left" in line for line in told)
    assert re.search(
        r"reads [\d.]+ and writes [\d.]+ GB/s now; a step reads 6.00 GiB and writes 2.00 GiB, so .* at least", said
    )
    assert not list(tmp_path.glob("swap/*"))


def test_a_rank_ends_with_its_code_after_all_exit_functions() -> None:
    """And before the interpreter takes its objects apart, which is where threads of gloo abort a process."""
    script = (
        "import atexit, sys, torch\n"
        "from orchestrator.train.launcher import Ending\n"
        "ending = Ending()\n"
        "class Thing:\n"
        "    def __del__(self): print('taken apart')\n"
        "thing = Thing()\n"
        "atexit.register(print, 'exit function')\n"
        "ending.code = 5\n"
        "sys.exit(5)\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert (ended.returncode, ended.stdout) == (5, "exit function\n"), ended.stderr
