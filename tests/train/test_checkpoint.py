import json
import math
import os
import subprocess

import pytest
import torch

from orchestrator.engine.protocol import Piece
from orchestrator.errors import CheckpointError
from orchestrator.train import checkpoint
from orchestrator.train.checkpoint import NotSaved
from orchestrator.train.resume import Reader, check_run, check_tensors

MOMENT = checkpoint.Moment(5, 1, 42, "digest", {"model": "tiny", "tuning": "full"})


def pieces():
    whole = torch.arange(12.0)
    yield Piece("a.weight", "weight", (3, 4), 0, whole[:5])  # two views of one storage, as flat partitions are
    yield Piece("a.weight", "weight", (3, 4), 5, whole[5:])
    yield Piece("a.weight", "exp_avg", (3, 4), 0, whole.bfloat16())
    yield Piece("a.weight", "exp_avg_sq", (3, 4), 0, torch.full((12,), math.nan), owned=False)


def save(folder, world, step=5, keep=2, expected=100):
    moment = checkpoint.Moment(step, 1, 42, "digest", MOMENT.about)
    return checkpoint.save(folder, moment, pieces(), world, scalars={"loss_scale": 2.0}, keep=keep, expected_bytes=expected)


def test_any_slice_of_what_was_saved_is_read_back(tmp_path, world):
    path, written = save(tmp_path, world)
    assert path.name == "step-000005" and written == 12 * 4 + 12 * 2
    reader = Reader(path)
    assert (reader.step, reader.epoch, reader.seed, reader.ranks, reader.scalars) == (5, 1, 42, 1, {"loss_scale": 2.0})
    for start in range(12):
        for stop in range(start, 13):
            assert reader.read("a.weight", "weight", start, stop).tolist() == list(map(float, range(start, stop)))
    assert reader.read("a.weight", "exp_avg", 2, 4).dtype == torch.bfloat16


@pytest.mark.parametrize("chunk", [checkpoint.CHUNK_BYTES, 30, 1])
def test_columns_are_put_together_again(tmp_path, world, monkeypatch, chunk):
    """As two ranks of a tensor-parallel group and two of its shard axis save a matrix of five rows and six columns; a piece
    that is larger than a chunk is cut between rows."""
    monkeypatch.setattr(checkpoint, "CHUNK_BYTES", chunk)
    whole = torch.arange(30.0).view(5, 6)
    parts = [
        Piece(
            "w", "weight", (5, 6), top * 6 + first, whole[top:bottom, first : first + 3].reshape(-1), True, (first, first + 3)
        )
        for first in (0, 3)
        for top, bottom in ((0, 3), (3, 5))
    ]
    path, _ = checkpoint.save(tmp_path, MOMENT, iter(parts), world, scalars={}, keep=1, expected_bytes=0)
    reader = Reader(path)
    for start in range(30):
        for stop in range(start, 31):
            assert reader.read("w", "weight", start, stop).tolist() == list(map(float, range(start, stop)))
    index = json.loads((path / "rank-00000.json").read_text())
    if chunk < checkpoint.GIB:
        assert len(index["pieces"]) == {30: 6, 1: 10}[chunk]
        return
    index["pieces"] = index["pieces"][1:]
    (path / "rank-00000.json").write_text(json.dumps(index))
    torn = Reader(path)
    assert torn.read("w", "weight", 18, 30).tolist() == list(map(float, range(18, 30)))
    with pytest.raises(CheckpointError, match=r"elements 6 to 24 of w \(weight\) are not all in it"):
        torn.read("w", "weight", 6, 24)


def test_pieces_are_split_over_files(tmp_path, world, monkeypatch):
    monkeypatch.setattr(checkpoint, "CHUNK_BYTES", 30)
    path, _ = save(tmp_path, world)
    assert len(list(path.glob("rank-00000-*.safetensors"))) == 3
    assert Reader(path).read("a.weight", "weight", 0, 12).tolist() == list(map(float, range(12)))
    monkeypatch.setattr(checkpoint, "CHUNK_BYTES", 8)  # less than a piece: two elements of fp32, four of bf16
    path, written = save(tmp_path, world, 6)
    assert len(list(path.glob("rank-00000-*.safetensors"))) == 3 + 4 + 3 and written == 12 * 4 + 12 * 2
    assert Reader(path).read("a.weight", "weight", 1, 12).tolist() == list(map(float, range(1, 12)))


def test_only_the_newest_are_kept_and_what_a_crash_left_is_removed(tmp_path, world):
    (tmp_path / ".tmp-step-000001").mkdir()
    for step in (1, 2, 3, 3):
        save(tmp_path, world, step)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000002", "step-000003"]


def test_the_random_state_comes_back(tmp_path, world):
    path, _ = save(tmp_path, world)
    expected = torch.rand(3)
    assert Reader(path).random_state(0, torch.device("cpu")) and torch.equal(torch.rand(3), expected)
    assert not Reader(path).random_state(1, torch.device("cpu"))  # there was no rank 1


def test_what_is_missing_is_told(tmp_path, world):
    path, _ = save(tmp_path, world)
    reader = Reader(path)
    with pytest.raises(CheckpointError, match=r"elements 12 to 13 of a\.weight \(weight\) are not in it"):
        reader.read("a.weight", "weight", 3, 13)
    with pytest.raises(CheckpointError, match=r"elements 0 to 1 of a\.weight \(exp_avg_sq\)"):
        reader.read("a.weight", "exp_avg_sq", 0, 1)
    (path / "rank-00000-0000.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"is incomplete: 1 of its files are missing: rank-00000-0000\.safetensors"):
        Reader(path)
    (path / "rank-00000.json").unlink()
    with pytest.raises(CheckpointError, match=r"rank-00000\.json cannot be read, and 1 ranks wrote it"):
        Reader(path)


def test_a_damaged_or_foreign_document_is_refused(tmp_path, world):
    path, _ = save(tmp_path, world)
    (path / "checkpoint.json").write_text("{")
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        Reader(path)
    (path / "checkpoint.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(CheckpointError, match="has format 99, this version reads 2"):
        Reader(path)


def test_another_run_is_refused_with_every_difference(tmp_path, world):
    path, _ = save(tmp_path, world)
    check_run(Reader(path), MOMENT.about)
    with pytest.raises(CheckpointError) as caught:
        check_run(Reader(path), {"model": "llama", "tuning": "lora", "tuning.rank": 8})
    assert "(2 faults)" in str(caught.value) and "was saved with tiny, this run has llama" in str(caught.value)
    with pytest.raises(CheckpointError) as caught:
        check_run(Reader(path), {"model": "llama", "tuning": "full", "model.hidden_size": 64})
    assert "faults" not in str(caught.value) and "resume with that model, or start afresh" in str(caught.value)


def test_another_models_tensors_are_named(tmp_path, world):
    reader = Reader(save(tmp_path, world)[0])
    assert check_tensors(reader, pieces()) is None
    other = [Piece("a.weight", "weight", (4, 4), 0, torch.zeros(16)), Piece("b.weight", "weight", (1,), 0, torch.zeros(1))]
    text = check_tensors(reader, other)
    assert text is not None and "a.weight is [3, 4] in it and [4, 4] here; b.weight is not in it" in text


def test_no_room_is_refused_before_anything_is_written(tmp_path, world):
    save(tmp_path, world, 1)
    save(tmp_path, world, 2)
    with pytest.raises(CheckpointError) as caught:
        save(tmp_path, world, 3, expected=2**60)
    text = str(caught.value)
    assert "step 3 was not saved" in text and "It needs 1073741824.00 GiB" in text and "are free" in text
    assert "the newest checkpoint, step-000002, is whole" in text and "the older step-000001" in text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000001", "step-000002"]
    assert Reader(tmp_path / "step-000002").read("a.weight", "weight", 0, 12).tolist() == list(map(float, range(12)))


@pytest.fixture
def small_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("a small disk can only be mounted by root")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_full_disk_leaves_the_previous_checkpoint_whole(small_disk, world, monkeypatch):
    monkeypatch.setattr(checkpoint, "SPARE_BYTES", 0)
    save(small_disk, world, 1)
    large = iter([Piece("w", "weight", (2**19,), 0, torch.zeros(2**19))])
    with pytest.raises(CheckpointError, match=r"No space left on device.*2\.0 MiB and .* are free; .*step-000001, is whole"):
        checkpoint.save(small_disk, MOMENT, large, world, scalars={}, keep=2, expected_bytes=0)
    assert [p.name for p in small_disk.iterdir()] == ["step-000001"]
    assert Reader(small_disk / "step-000001").read("a.weight", "weight", 0, 12).tolist() == list(map(float, range(12)))


def test_a_disk_that_became_read_only_leaves_the_previous_checkpoint_whole(small_disk, world, monkeypatch):
    monkeypatch.setattr(checkpoint, "SPARE_BYTES", 0)
    save(small_disk, world, 1)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(NotSaved) as caught:
        save(small_disk, world, 2)
    for words in ("was not saved", "Read-only file system", "step-000001, is whole", "mounted for writing again"):
        assert words in caught.value.report()
    assert Reader(small_disk / "step-000001").read("a.weight", "weight", 0, 12).tolist() == list(map(float, range(12)))
