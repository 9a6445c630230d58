"""Our own sources run nothing that they read, and libraries with known holes are not among those that we take."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from orchestrator.cluster.doctor import FLOORS, Need, examine
from orchestrator.cluster.machine import Machine

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", FLOORS)
def test_a_library_with_a_known_hole_is_named_by_the_doctor(name):
    pinned = (ROOT / "pyproject.toml").read_text()
    least = ".".join(map(str, FLOORS[name][0]))
    floor = next(line for line in pinned.splitlines() if line.strip().startswith(f'"{name}>=')).partition(">=")[2]
    assert tuple(int(part) for part in floor.strip('", ').split(".")) >= FLOORS[name][0]
    old, new = (examine(Machine(installed={name: v}), Need()) for v in ("0.9.1", least))
    assert any(found.about.startswith(name) and least in found.found for found in old)
    assert not any(found.about.startswith(name) for found in new)


FORBIDDEN = {
    "pickle": "import", "cPickle": "import", "dill": "import", "shelve": "import", "marshal": "import", "joblib": "import",
    "eval": "call", "exec": "call", "compile": "call", "os.system": "call", "os.popen": "call", "yaml.load": "call",
    "yaml.unsafe_load": "call", "yaml.full_load": "call", "hydra.utils.instantiate": "call", "instantiate": "call",
}  # fmt: skip


def unsafe(file: Path) -> list[str]:
    """What a file of the package does that could run what it reads."""
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        found += [name for name in names if FORBIDDEN.get(name) == "import"]
        if isinstance(node, ast.Call):
            called, stated = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
            found += [called] if FORBIDDEN.get(called) == "call" else []
            found += [called] if called == "torch.load" and stated.get("weights_only") != "True" else []
            found += [f"{called}({word}=True)" for word in ("shell", "allow_pickle") if stated.get(word) == "True"]
            found += [called] if "trust_remote_code" in stated and stated["trust_remote_code"] == "True" else []
    return [f"{file.name}: {what}" for what in found]


def test_no_file_of_the_package_can_run_what_it_reads(tmp_path):
    files = [*(ROOT / "orchestrator").rglob("*.py"), *(ROOT / "launch").rglob("*.py")]
    assert len(files) > 100 and [each for file in files for each in unsafe(file)] == []
    bad = tmp_path / "bad.py"
    bad.write_text("import pickle\ntorch.load(f)\nyaml.load(f)\nsubprocess.run(c, shell=True)\neval('1')\n")
    assert len(unsafe(bad)) == 5
