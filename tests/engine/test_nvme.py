"""NVMe offload on two real ranks: the same run as from memory, its checkpoints, its files; and the op that moves the bytes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from ctypes.util import find_library
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from engine.nvme_worker import specs
from ranks import run_ranks

from orchestrator.engine.swap_folder import MARK, PREFIX, claim, sweep
from orchestrator.layout import lay_out, parameter_table
from orchestrator.planner.rehearsal import rehearse
from orchestrator.planner.traffic import traffic

MISSING = [name for name, there in (("libaio", find_library("aio")), ("c++", shutil.which("c++"))) if not there]
needs_op = pytest.mark.skipif(bool(MISSING), reason=f"DeepSpeed's async_io cannot be built here: no {', '.join(MISSING)}")

CASES = [
    ("fp32", "full"),
    pytest.param("bf16", "full", marks=pytest.mark.slow),
    pytest.param("bf16", "lora", marks=pytest.mark.slow),
    pytest.param("fp16", "full", marks=pytest.mark.slow),
]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("nvme")


@lru_cache(maxsize=4)
def runs(folder: Path, compute: str, tuning: str) -> dict[str, Any]:
    own = folder / f"{compute}-{tuning}"
    own.mkdir()
    ended = run_ranks(Path(__file__).with_name("nvme_worker.py"), [str(own), compute, tuning], 2, timeout=850)
    assert all(code == 0 for code, _ in ended), "\n".join(text[-3000:] for _, text in ended)
    found: dict[str, Any] = json.loads((own / "found.json").read_text())
    return found


@needs_op
@pytest.mark.parametrize(("compute", "tuning"), CASES)
def test_a_run_from_the_disk_is_the_run_from_memory(compute: str, tuning: str, folder: Path) -> None:
    """Bit for bit: loss and gradient norm of every step, and the weights at the end. The worker also takes the census."""
    found = runs(folder, compute, tuning)
    for name in ("nvme", "nvme_optimizer"):
        assert found[name]["steps"] == found["memory"]["steps"]
        assert found[name]["weights"] == found["memory"]["weights"]


@needs_op
@pytest.mark.parametrize(("compute", "tuning"), CASES)
def test_a_checkpoint_from_the_disk_goes_on_anywhere(compute: str, tuning: str, folder: Path) -> None:
    """Resumed on the disk it is the uninterrupted run, moments and all; also to and from memory, and nearly so to FSDP2."""
    found = runs(folder, compute, tuning)
    rest = found["nvme"]["steps"][2:]
    for way in ("resumed", "from memory", "to memory"):
        assert found[way] == rest, way
    bound = 1e-4 if compute == "fp32" else 3e-2
    apart = [
        abs(a - b) / abs(b)
        for again, once in zip(found["to fsdp"], rest, strict=True)
        for a, b in zip(again, once, strict=True)
    ]
    assert max(apart) < bound


@needs_op
def test_what_rests_on_the_disk_left_the_memory(folder: Path) -> None:
    found = runs(folder, "fp32", "full")
    memory, disk = found["memory"]["rows"], found["nvme"]["rows"]
    moved = {row: size for row, size in disk.items() if row.endswith(" nvme")}
    assert set(moved) == {f"{line} fp32 nvme" for line in ("weights", "master", "moments", "gradients")}
    for row in ("weights fp32 cpu", "master fp32 cpu", "moments fp32 cpu"):
        assert disk[row] < memory[row] / 5, row
        assert disk[row] + disk[row.replace("cpu", "nvme")] == pytest.approx(memory[row], abs=16 * 1024)
    assert found["left"] == [], "every engine removes its folder"


def test_a_swapping_run_is_rehearsed_without_a_disk(tmp_path: Path) -> None:
    """The engine's own code on fake tensors and files of nothing: the census is held to the layout there too."""
    spec = specs(tmp_path, "bf16", "full")["nvme"]
    found = rehearse(spec, 1)
    assert set(found.peaks["gpu"]) == {"load", "forward", "backward", "step", "save"}
    table = parameter_table(spec)
    assert table is not None
    staging = sum(row.bytes for row in lay_out(spec, table, 1).rows if row.line == "staging")
    assert all(peak > staging for peak in found.peaks["gpu"].values())
    assert not (tmp_path / "swap").exists()


@pytest.mark.parametrize(("recompute", "read"), [("none", 249_434_112), ("full", 253_661_184)])
def test_a_step_moves_what_the_kernel_counted(recompute: str, read: int, tmp_path: Path) -> None:
    """One rank, bf16: read_bytes and write_bytes of /proc/self/io over the second and third step of that run."""
    spec = specs(tmp_path, "bf16", "full")["nvme"]
    nvme = replace(spec.strategy.nvme, buffer_size=2 * spec.strategy.nvme.buffer_size) if spec.strategy.nvme else None
    one = replace(spec.strategy, dp_shard=1, nvme=nvme)
    spec = replace(spec, strategy=one, recompute=recompute, batch=replace(spec.batch, micro=8))
    table = parameter_table(spec)
    assert table is not None
    moved = traffic(spec, table)
    assert (moved.disk_read, moved.disk_written) == (read, 226_185_216)


HOLDER = """
import sys, time
from pathlib import Path
from orchestrator.engine.swap_folder import claim
held = claim(Path(sys.argv[1]), "held")
print("held", flush=True)
time.sleep(120)
"""


def test_only_folders_of_dead_jobs_are_swept(tmp_path: Path) -> None:
    """A live job's folder stays while its process lives, however it then ends; a folder without our mark is never touched."""
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        (tmp_path / f"{PREFIX}somebody").mkdir()
        (tmp_path / f"{PREFIX}held" / "0.tensor.swp").write_bytes(bytes(5000))
        assert sweep(tmp_path) == []
    finally:
        holder.kill()
        holder.communicate()
    ((gone, size),) = sweep(tmp_path)
    assert gone.name == f"{PREFIX}held"
    assert size >= 5000
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{PREFIX}somebody"]


def test_the_last_rank_removes_the_folder(tmp_path: Path) -> None:
    first, second = claim(tmp_path / "swap", "job"), claim(tmp_path / "swap", "job")
    assert (first.path / MARK).is_file()
    first.release()
    assert second.path.is_dir()
    second.release()
    assert not (tmp_path / "swap").exists()
