"""The images: linted, without secrets, as small as they can be asked for, and one built and run for real."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
FILES = [ROOT / "docker" / "Dockerfile", ROOT / "docker" / "cpu.Dockerfile"]
COMPOSE = ROOT / "docker" / "compose.yaml"
pytestmark = pytest.mark.images


def test_hadolint_has_nothing_to_say() -> None:
    hadolint = Path(sys.executable).parent / "hadolint"
    assert hadolint.exists(), "the extra named test installs it"
    done = subprocess.run([hadolint, "--no-color", *FILES], text=True, capture_output=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_an_image_is_pinned_not_root_and_asks_the_doctor(file: Path) -> None:
    text = file.read_text()
    bases = re.findall(r"^ARG (?:BUILD_)?BASE=(\S+)$", text, re.MULTILINE)
    assert bases and all(re.fullmatch(r"[a-z/]+:\d+\.\d+\.\d+-\S+", base) for base in bases)
    assert re.findall(r"^USER (\S+)$", text, re.MULTILINE) == ["10001:10001"]
    assert re.search(r"^HEALTHCHECK .*launch/doctor\.py", text, re.MULTILINE)
    installs = re.findall(r"pip install [^&\n]*", text)
    assert installs and all("-c constraints.txt" in line for line in installs)
    assert not re.search(r"(?i)token|password|secret|api.?key", text)
    # What changes often is copied last: a change of code installs nothing again.
    assert text.rindex("pip install") < text.index("COPY conf") < text.index("COPY orchestrator orchestrator")


def test_only_what_an_image_holds_goes_to_the_builder() -> None:
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {word.split("/")[0] for file in FILES for line in re.findall(r"^COPY (?!--from)(.*) \S+$", file.read_text(), re.M)
              for word in line.split()}  # fmt: skip
    assert copied == kept and all((ROOT / name).exists() for name in kept)


def test_the_compose_file_gives_a_run_what_the_doctor_asks_for() -> None:
    services = yaml.safe_load(COMPOSE.read_text())["services"]
    for service in services.values():
        assert service["shm_size"] == "16gb" and service["ulimits"]["memlock"] == -1 and service["ulimits"]["nofile"] >= 4096
        (device,) = service["deploy"]["resources"]["reservations"]["devices"]
        assert device == {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}
        assert (COMPOSE.parent / service["build"]["context"] / service["build"]["dockerfile"]).resolve() in FILES
    assert "torchrun" in services["train"]["entrypoint"] and "launch/doctor.py" in services["doctor"]["command"]


def test_compose_itself_takes_the_file() -> None:
    found = [words for words in (["docker-compose"], ["docker", "compose"]) if shutil.which(words[0])]
    found = [words for words in found if subprocess.run([*words, "version"], capture_output=True).returncode == 0]
    if not found:
        pytest.skip("neither docker-compose nor docker's compose plugin is installed")
    done = subprocess.run([*found[0], "-f", COMPOSE, "config"], text=True, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert set(yaml.safe_load(done.stdout)["services"]) == {"train", "doctor"}


class Builder:
    """buildah with a store of its own, without a daemon, and containers that are no more than a changed root."""

    def __init__(self, home: Path) -> None:
        self._words = ["buildah", "--root", home / "root", "--runroot", home / "run", "--storage-driver", "vfs"]
        self._environment = {**os.environ, "TMPDIR": str(home)}

    def run(self, *words: object) -> str:
        command = [str(word) for word in (*self._words, *words)]
        done = subprocess.run(command, cwd=ROOT, env=self._environment, text=True, capture_output=True, timeout=3000)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-4000:]}{done.stderr[-4000:]}"
        return done.stdout.strip()

    def base(self, archive: Path) -> str:
        """An image of `archive`, a file system."""
        container = self.run("from", "scratch")
        self.run("add", "-q", container, archive, "/")
        self.run("commit", "-q", container, "localhost/base:1")
        self.run("rm", container)
        return "localhost/base:1"


def pip_settings() -> list[str]:
    """The arguments of a build that let pip in it find what it finds here: variables, and the folders that they name."""
    pip = [sys.executable, "-m", "pip", "config", "list"]
    listed = subprocess.run(pip, text=True, capture_output=True, check=True).stdout
    said = dict(re.findall(r"^(?:global|:env:)\.([a-z-]+)='(.*)'$", listed, re.MULTILINE))
    words = []
    for name in ("index-url", "extra-index-url", "find-links"):
        if name in said:
            words += ["--build-arg", f"PIP_{name.upper().replace('-', '_')}={said[name]}"]
    named = [
        (name, Path(word.removeprefix("file://"))) for name, value in said.items() for word in value.split() if "/" in word
    ]
    # What an index links to may lie beside its folder, as ../files.
    folders = {path.parent if "index" in name or path.is_file() else path for name, path in named if path.is_absolute()}
    mounted = {folder for folder in folders if folder.exists() and folder != Path("/")}
    return [*words, *(word for folder in sorted(mounted) for word in ("-v", f"{folder}:{folder}:ro"))]


@pytest.fixture(scope="module")
def builder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Builder]:
    missing = [program for program in ("buildah", "mmdebstrap") if shutil.which(program) is None]
    if os.geteuid() != 0 or missing:
        pytest.skip(f"building needs root, buildah and mmdebstrap; missing here: {', '.join(missing) or 'root'}")
    home = tmp_path_factory.mktemp("images")
    yield Builder(home)
    shutil.rmtree(home, ignore_errors=True)


@pytest.fixture(scope="module")
def base(builder: Builder, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Debian with Python, from its packages: no registry is asked."""
    archive = tmp_path_factory.mktemp("base") / "base.tar"
    packages = "--include=ca-certificates,python3,python3-venv,python3-dev,g++,libaio-dev"
    subprocess.run(
        ["mmdebstrap", "--variant=minbase", packages, "bookworm", archive], check=True, capture_output=True, timeout=1800
    )
    return builder.base(archive)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_image_of_the_demo_is_built_and_its_container_sees_a_doctor_and_trains(builder: Builder, base: str) -> None:
    words = ("--isolation", "chroot", "--pull=never", "--format", "docker", "--build-arg", f"BASE={base}", *pip_settings())
    builder.run("bud", *words, "-f", "docker/cpu.Dockerfile", "-t", "orchestrator:cpu", ".")
    config = json.loads(builder.run("inspect", "--type", "image", "orchestrator:cpu"))["Docker"]["config"]
    assert config["User"] == "10001:10001" and "launch/doctor.py" in config["Healthcheck"]["Test"]
    container = builder.run("from", "--pull=never", "orchestrator:cpu")
    inside = ("run", "--isolation", "chroot", container, "--")
    assert builder.run(*inside, "id", "-u") == "10001"
    assert "a run can start" in builder.run(*inside, *config["Healthcheck"]["Test"][1:])
    demo = [word for word in config["Cmd"] if not word.startswith("run.epochs")]
    said = builder.run(*inside, "env", "LOCAL_SIZE=2", *demo, "run.steps=1")
    assert "zero3-cpu, 2 ranks on cpu" in said and "step 1/1" in said
    listed = builder.run(*inside, "ls", "-A")
    assert "runs" in listed and ".git" not in listed and "tests" not in listed
