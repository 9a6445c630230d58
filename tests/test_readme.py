"""The documents hold what they promise: commands run, named files, choices and keys exist, figures are the Layout's.

Every line of a fenced `sh` block of the README is a command. Here each runs in a shell as it is typed, from an empty folder
that holds `launch/`, but for those whose comment begins with `slow`: of these the configuration is composed. `runs/demo` is a
copy of `runs/first`, which an earlier command has made.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator import jobs, plan
from orchestrator.config import compose
from orchestrator.config.catalog import groups, keys
from orchestrator.config.entry import sweep
from orchestrator.layout import Layout, lay_out, parameter_table
from orchestrator.planner.predict import by_layout
from orchestrator.spec import Home

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "docs/architecture.md", "docs/data.md", "docs/launching.md", "docs/log.md")
SLOW = "slow"
GIB = 2**30
ENDINGS = (".py", ".json", ".jsonl", ".yaml", ".log", ".old")
"""A word with one of these is a file's name, not a key."""

MAKES_RUNS = "run.dir="
"""Commands that make the runs which others read; they go first."""


def commands() -> list[tuple[str, str]]:
    """(command, comment) of every line of the README's `sh` blocks, those that make runs first, else in their order."""
    found = []
    for block in re.findall(r"^```sh\n(.*?)^```", README, re.MULTILINE | re.DOTALL):
        for line in block.splitlines():
            command, _, comment = line.partition(" #")
            if command.strip():
                found.append((command.strip(), comment.strip()))
    return sorted(found, key=lambda pair: MAKES_RUNS not in pair[0])


QUICK = [command for command, comment in commands() if not comment.startswith(SLOW)]
LONG = [command for command, comment in commands() if comment.startswith(SLOW)]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty folder with `launch/` and a data file, where commands run one after the other."""
    folder = tmp_path_factory.mktemp("newcomer")
    (folder / "launch").symlink_to(ROOT / "launch")
    rows = [{"instruction": f"What is {n} + {n}?", "input": "", "output": f"{n} + {n} = {2 * n}"} for n in range(1, 5)]
    (folder / "FILE.json").write_text(json.dumps(rows), encoding="utf-8")
    return folder


def stand_in_for_the_demo(folder: Path) -> None:
    """Let `runs/demo` be what the first run left."""
    first, demo = folder / "runs" / "first", folder / "runs" / "demo"
    if first.is_dir() and not demo.exists():
        shutil.copytree(first, demo)


@pytest.mark.parametrize("command", QUICK)
def test_a_command_runs_as_it_is_typed(command: str, workplace: Path) -> None:
    stand_in_for_the_demo(workplace)
    launchers = ("PYTHONPATH", "RANK", "WORLD_SIZE", "LOCAL_RANK")
    environment = {name: value for name, value in os.environ.items() if name not in launchers}
    environment |= {
        "PATH": f"{Path(sys.executable).parent}:{environment['PATH']}",
        "PYTHONPATH": str(ROOT),
        "XDG_CACHE_HOME": str(workplace / ".cache"),
        "OMP_NUM_THREADS": "1",
    }
    ended = subprocess.run(
        ["bash", "-euc", command], cwd=workplace, env=environment, text=True, capture_output=True, timeout=120
    )
    assert ended.returncode == 0, f"{command}\n{ended.stdout[-2000:]}\n{ended.stderr[-2000:]}"
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("command", LONG)
def test_a_long_command_names_what_exists(command: str, workplace: Path) -> None:
    """Its make target, or its script and a configuration that composes."""
    words = shlex.split(command)
    if words[0] == "make":
        assert f"\n{words[1]}:" in (ROOT / "Makefile").read_text(encoding="utf-8")
        return
    script = next(word for word in words if word.endswith(".py"))
    assert (ROOT / script).is_file()
    overrides = [word.replace("FILE.json", str(workplace / "FILE.json")) for word in words[words.index(script) + 1 :]]
    stated = [word for word in overrides if word != "model.path=FOLDER"]
    if script.endswith("submit.py"):
        runs = sweep([word for word in stated if word != "-m"])
        assert jobs.plan_all(runs, lambda refused, error: None)
        return
    compose(stated, ranks=1 if words[0] == "python" else 4)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_named_files_exist(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    named = set(re.findall(r"(?:launch|orchestrator|tests|conf|benchmarks|docs)/[\w./]*\w\.(?:py|yaml|json|md)", text))
    missing = sorted(name for name in named if "NAME" not in name and not (ROOT / name).is_file())
    assert not missing, f"{document} names {missing}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_named_choices_and_keys_exist(document: str) -> None:
    text = re.sub(r"^\$ .*?^```", "", (ROOT / document).read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    choices = {group: {choice.name for choice in found} for group, found in groups().items()}
    wrong = [
        f"{group}={choice}"
        for group, choice in re.findall(r"(?<![\w.])(\w+)=([\w]+)", text)
        if group in choices and choice not in choices[group]
    ]
    sections = {key.partition(".")[0] for key in keys() if "." in key}
    for key in re.findall(r"(?<![\w./])([a-z]+\.[a-z_]+)(?=[=` ])", text):
        if key.partition(".")[0] in sections and key not in keys() and not key.endswith(ENDINGS):
            wrong.append(key)
    assert not wrong, f"{document} names {wrong}"


def layout_of(strategy: str, tuning: str) -> tuple[Layout, int]:
    """The Layout that a row of the README's table is about, and the parameters of its base model."""
    cluster = "1xa10" if strategy == "zero=none" else "4xa10"
    size = 1 if strategy == "zero=none" else 4
    fixed = ["model=llama3_8b", f"cluster={cluster}", "precision=bf16", f"batch.global_size={size}"]
    spec = compose([*fixed, *strategy.split(), *tuning.split()])
    table = parameter_table(spec)
    assert table is not None
    return lay_out(spec, table), sum(p.numel for p in table if not p.adapter)


TUNINGS = re.findall(r"^\| `(tuning=[^`]+)` \|(.*)\|$", README, re.MULTILINE)


@pytest.mark.parametrize(("tuning", "cells"), TUNINGS)
def test_the_table_of_what_is_trained_is_the_layouts(tuning: str, cells: str) -> None:
    strategies = ("zero=none", "zero=stage2", "zero=stage3", "fsdp=full_shard")
    expected = [f"{layout_of(name, tuning)[0].rest_bytes(Home.GPU) / GIB:.1f}" for name in strategies]
    fixed = "model=llama3_8b cluster=4xa10 zero=stage3 data.seq_len=2048 batch.micro=4"
    assert fixed in README
    expected.append(f"{plan([*fixed.split(), *tuning.split()], basis='layout').seconds:.2f}")
    assert [cell.strip() for cell in cells.split("|")][1:6] == expected


def test_what_compiling_saves_is_the_plans() -> None:
    stated = re.search(r"without it `(zero=stage2)` takes ([\d.]+) s", README)
    assert stated
    fixed = "model=llama3_8b cluster=4xa10 tuning=lora data.seq_len=2048 batch.micro=4"
    assert f"{plan([*fixed.split(), stated[1]], basis='layout').seconds:.2f}" == stated[2]


KEPT = re.findall(r"^\| `((?:loss|recompute|compile|attention)[.=][^`]+)` \|(.*)\|$", README, re.MULTILINE)


@pytest.mark.parametrize(("words", "cells"), KEPT)
def test_the_table_of_what_a_step_keeps_is_the_plans(words: str, cells: str) -> None:
    fixed = "model=llama3_8b cluster=4xa10 tuning=lora zero=stage3 data.seq_len=2048 batch.micro=4"
    assert fixed in README
    typed = {word.partition("=")[0]: word for word in (*fixed.split(), *words.split())}
    made = plan(list(typed.values()), basis="layout")
    expected = [f"{made.memory.used / GIB:.1f}", f"{made.seconds:.2f}"]
    assert [cell.strip() for cell in cells.split("|")][1:3] == expected


LISTED = re.findall(r"^\| `recipe=([^`]+)` \|.*\| ([\d.]+) \|$", README, re.MULTILINE)


def test_the_table_of_recipes_is_the_plans() -> None:
    assert {name for name, _ in LISTED} == {choice.name for choice in groups()["recipe"]} - {"none"}
    for name, used in LISTED:
        assert f"{plan([f'recipe={name}'], basis='layout').memory.used / GIB:.1f}" == used, name


ROWS = re.findall(r"^\| `((?:zero|fsdp|tensor)=[^`]+)` \|(.*)\|$", README, re.MULTILINE)


def test_the_table_has_every_strategy() -> None:
    shown = {word for strategy, _ in ROWS for word in strategy.split()}
    for group in ("zero", "fsdp", "tensor"):
        assert {f"{group}={choice.name}" for choice in groups()[group]} - shown <= {"fsdp=none", "tensor=none"}


@pytest.mark.parametrize(("strategy", "cells"), ROWS)
def test_the_table_of_strategies_is_the_layouts(strategy: str, cells: str) -> None:
    full, parameters = layout_of(strategy, "tuning=full")
    lora, _ = layout_of(strategy, "tuning=lora")
    expected = [
        f"{full.rest_bytes(Home.GPU) / parameters:.2f}",
        f"{full.rest_bytes(Home.GPU) / GIB:.1f}",
        f"{full.peak_bytes(Home.GPU) / GIB:.1f}",
        f"{full.rest_bytes(Home.CPU) / GIB:.1f}",
        f"{lora.rest_bytes(Home.GPU) / GIB:.1f}",
        f"{lora.rest_bytes(Home.CPU) / GIB:.1f}",
    ]
    assert [cell.strip() for cell in cells.split("|")][1:7] == expected


OPTIMIZERS = re.findall(r"^\| `optimizer=(\w+)` \|(.*)\|$", README, re.MULTILINE)


def test_the_table_has_every_optimizer() -> None:
    assert {name for name, _ in OPTIMIZERS} == {choice.name for choice in groups()["optimizer"]}


@pytest.mark.parametrize(("name", "cells"), OPTIMIZERS)
def test_the_table_of_optimizers_is_the_layouts(name: str, cells: str) -> None:
    spec = compose(["model=llama3_8b", "cluster=4xa10", "precision=bf16", "fsdp=full_shard", f"optimizer={name}"])
    table = parameter_table(spec)
    assert table is not None
    states = sum(row.bytes for row in lay_out(spec, table).rows if row.line == "moments")
    time = by_layout(spec, table).time
    assert time is not None
    update = f"{time.update:.1f}" if time.update >= 1 else f"{time.update:.2f}"
    expected = [f"{states * 4 / sum(p.numel for p in table):.2f}", f"{states / GIB:.1f}", update]
    assert [cell.strip() for cell in cells.split("|")][:3] == expected
