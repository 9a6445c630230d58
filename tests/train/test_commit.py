import hashlib
import json
import re

import pytest
import torch

from orchestrator.engine.protocol import Piece
from orchestrator.errors import CheckpointError
from orchestrator.train import checkpoint, commit
from orchestrator.train.resume import Reader, first_sound
from orchestrator.train.saving import Saver


def content(step):
    return torch.arange(64.0) + 1000 * step


def save(folder, world, step, keep=3):
    moment = checkpoint.Moment(step, 0, 1, "digest", {})
    piece = Piece("w", "weight", (64,), 0, content(step))
    return checkpoint.save(folder, moment, iter([piece]), world, scalars={}, keep=keep, expected_bytes=256)[0]


def test_every_file_is_listed_with_its_digest_and_the_list_is_committed(tmp_path, world):
    path = save(tmp_path, world, 1)
    listed = json.loads((path / "checkpoint.json").read_text())["files"]
    others = {file.name for file in path.iterdir()} - {"checkpoint.json", "COMMITTED"}
    assert set(listed) == others and len(others) == 3
    for name, file in listed.items():
        data = (path / name).read_bytes()
        assert file == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert (path / "COMMITTED").read_text().strip() == hashlib.sha256((path / "checkpoint.json").read_bytes()).hexdigest()
    assert list(commit.problems(path)) == []


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


DAMAGE = {
    "is not what was saved: its SHA-256 differs": flip,
    r"has \d+ bytes, \d+ were saved": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "is missing": lambda file: file.unlink(),
}


@pytest.mark.parametrize("words", DAMAGE)
@pytest.mark.parametrize("name", ["rank-00000-0000.safetensors", "rank-00000.json", "rank-00000.rng.safetensors"])
def test_a_damaged_checkpoint_is_passed_over_by_name_for_the_newest_sound_one(tmp_path, world, words, name):
    paths = [save(tmp_path, world, step) for step in (1, 2)]
    DAMAGE[words](paths[1] / name)
    said: list[str] = []
    assert first_sound(paths[::-1], world, said.append) == paths[0]
    assert len(said) == 1 and re.search(rf"step-000002 is damaged and passed over: {name} {words}", said[0])
    with pytest.raises(CheckpointError, match=rf"step-000002 is damaged: {name} {words}"):
        first_sound(paths[1:], world, said.append)


@pytest.mark.parametrize("name", ["checkpoint.json", "COMMITTED"])
def test_a_list_that_was_not_committed_is_believed_in_nothing(tmp_path, world, name):
    paths = [save(tmp_path, world, step) for step in (1, 2)]
    flip(paths[1] / name)
    said: list[str] = []
    assert first_sound(paths[::-1], world, said.append) == paths[0]
    assert said == ["resume   step-000002 is damaged and passed over: its checkpoint.json is not the one that was committed"]


def test_where_none_is_sound_all_are_named(tmp_path, world):
    paths = [save(tmp_path, world, step) for step in (1, 2)]
    for path in paths:
        flip(path / "rank-00000-0000.safetensors")
    with pytest.raises(
        CheckpointError, match=r"(?s)2 faults.*step-000002 is damaged.*step-000001 is damaged.*another run\.dir"
    ):
        first_sound(paths[::-1], world, lambda text: None)


def test_a_checkpoint_put_aside_by_a_dead_process_counts_and_comes_back(tmp_path, world):
    path = save(tmp_path, world, 5)
    path.rename(tmp_path / ".replaced-step-000005")
    assert commit.saved_steps(tmp_path) == [tmp_path / ".replaced-step-000005"]
    commit.recover(tmp_path)
    assert commit.saved_steps(tmp_path) == [path] and list(commit.problems(path)) == []


def test_what_was_being_removed_is_no_checkpoint(tmp_path, world):
    path = save(tmp_path, world, 5)
    path.rename(tmp_path / ".removed-step-000005")
    assert commit.named_steps(tmp_path) == []
    commit.recover(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_same_step_may_be_saved_again(tmp_path, world):
    first = save(tmp_path, world, 3)
    flip(first / "rank-00000-0000.safetensors")
    assert save(tmp_path, world, 3) == first and list(commit.problems(first)) == []
    assert [path.name for path in tmp_path.iterdir()] == ["step-000003"]


def test_a_damaged_checkpoint_is_not_counted_among_those_that_are_kept(tmp_path, world):
    for step in (1, 2, 3):
        save(tmp_path, world, step)
    (tmp_path / "step-000003" / "COMMITTED").unlink()
    save(tmp_path, world, 4, keep=2)
    assert [path.name for path in commit.saved_steps(tmp_path)] == ["step-000002", "step-000004"]


def test_in_the_background_the_state_is_that_of_its_step(tmp_path, world):
    """The tensor changes as soon as `save` has returned, as the next step changes it."""
    told = []
    saver = Saver(world, told.append, background=True)
    state = content(1).clone()
    for step in (1, 2):
        moment = checkpoint.Moment(step, 0, 1, "digest", {})

        def write(pieces, beside, moment=moment):
            return checkpoint.save(tmp_path, moment, pieces, beside, scalars={}, keep=2, expected_bytes=256)

        saver.save(iter([Piece("w", "weight", (64,), 0, state)]), write)
        state += 1000
    saver.wait()
    assert [saved.path.name for saved in told] == ["step-000001", "step-000002"]
    assert all(0 <= saved.stall_seconds <= saved.seconds for saved in told)
    for step in (1, 2):
        assert torch.equal(Reader(tmp_path / f"step-{step:06d}").read("w", "weight", 0, 64), content(step))


def test_a_save_that_failed_in_the_background_is_told_at_the_next(tmp_path, world):
    def refuse(pieces, beside):
        raise CheckpointError("the disk is full")

    saver = Saver(world, lambda saved: None, background=True)
    saver.save(iter([]), refuse)
    with pytest.raises(CheckpointError, match="the disk is full"):
        saver.wait()
    saver.poll()
