import json
import os
from pathlib import Path

import pytest

from orchestrator.config import compose
from orchestrator.errors import CheckpointError, ConfigError
from orchestrator.train import folder
from orchestrator.train.folder import RunFolder, choose


def spec(*overrides: str):
    return compose(["model=tiny", *overrides], ranks=1)


def finish(path: Path, *steps: int) -> RunFolder:
    """A folder that looks as a run leaves it."""
    made = RunFolder(path)
    made.checkpoints.mkdir(parents=True)
    made.spec.write_text("{}")
    made.metrics.write_text('{"step": 1}\n')
    for step in steps:
        made.checkpoint(step).mkdir()
        (made.checkpoint(step) / "checkpoint.json").write_text("{}")
    return made


def test_a_run_without_a_name_gets_one_and_the_next_a_number(tmp_path):
    assert choose(spec(), tmp_path).folder.path.name == "tiny-full-plain"
    (tmp_path / "tiny-full-plain").mkdir()
    assert choose(spec(), tmp_path).folder.path.name == "tiny-full-plain-2"
    (tmp_path / "tiny-full-plain-2").mkdir()
    assert choose(spec("tuning=lora"), tmp_path).folder.path.name == "tiny-lora-plain"
    assert choose(spec(), tmp_path).folder.path.name == "tiny-full-plain-3"


def test_a_folder_with_a_run_is_refused(tmp_path):
    finish(tmp_path / "run")
    with pytest.raises(ConfigError, match=r"already holds a run, and nothing is written over\n.*resume=auto"):
        choose(spec(f"run.dir={tmp_path / 'run'}"))


def test_a_start_that_failed_before_its_first_step_may_be_repeated(tmp_path):
    failed = RunFolder(tmp_path / "run")
    failed.checkpoints.mkdir(parents=True)
    failed.spec.write_text("{}")
    failed.metrics.touch()
    assert choose(spec(f"run.dir={failed.path}")).checkpoint is None


def test_a_run_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "run").touch()
    with pytest.raises(ConfigError, match="is a file"):
        choose(spec(f"run.dir={tmp_path / 'run'}"))


def test_auto_takes_the_newest_checkpoint_first_and_no_unfinished_one(tmp_path):
    run = finish(tmp_path / "run", 50, 100)
    (run.checkpoints / ".tmp-step-000200").mkdir()
    choice = choose(spec(f"run.dir={run.path}", "resume=auto"))
    assert choice.candidates == (run.checkpoint(100), run.checkpoint(50))


def test_auto_without_a_folder_takes_the_newest_run_of_that_name(tmp_path):
    finish(tmp_path / "tiny-full-plain", 50)
    newest = finish(tmp_path / "tiny-full-plain-2", 10)
    for path, age in ((tmp_path / "tiny-full-plain", 1000), (newest.path, 2000)):
        for file in (path, *path.glob("*")):
            os.utime(file, (age, age))
    assert choose(spec("resume=auto"), tmp_path).checkpoint == newest.checkpoint(10)


def test_auto_without_any_checkpoint_begins(tmp_path):
    choice = choose(spec("resume=auto"), tmp_path)
    assert (choice.folder.path.name, choice.checkpoint) == ("tiny-full-plain", None)


def test_a_path_is_resumed_into_a_fresh_folder_unless_it_is_this_run(tmp_path):
    old = finish(tmp_path / "old", 50)
    choice = choose(spec(f"resume={old.path}"), tmp_path)
    assert (choice.folder.path.name, choice.checkpoint) == ("tiny-full-plain", old.checkpoint(50))
    choice = choose(spec(f"resume={old.checkpoint(50)}", f"run.dir={old.path}"))
    assert (choice.folder.path, choice.checkpoint) == (old.path, old.checkpoint(50))


def test_resuming_from_what_is_not_a_run_is_refused(tmp_path):
    for path, message in ((tmp_path, "neither a run folder nor a checkpoint"), (tmp_path / "none", "there is no folder")):
        with pytest.raises(CheckpointError, match=message):
            folder.checkpoints_at(path)
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(CheckpointError, match="is a file, not a run folder"):
        folder.checkpoints_at(file)
    with pytest.raises(CheckpointError, match=r"has not saved a checkpoint\n.*resume=none"):
        folder.checkpoints_at(finish(tmp_path / "young").path)


def test_the_spec_of_the_run_that_is_continued_is_kept(tmp_path):
    run = RunFolder(tmp_path / "run")
    folder.open_folder(run, spec(), {"a": 1}, None)
    folder.open_folder(run, spec("run.steps=9"), {"a": 1}, 50)
    assert json.loads(run.spec.read_text())["run"]["steps"] == 9
    assert json.loads((run.path / "spec.before-000050.json").read_text())["run"]["steps"] is None
    assert not (run.path / "strategy.before-000050.json").exists()  # it is the same


def test_a_folder_that_cannot_be_made_is_a_fault_of_run_dir(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"run\.dir: .*cannot be written: Not a directory"):
        folder.open_folder(RunFolder(tmp_path / "file" / "run"), spec(), {}, None)
