"""Plans kept between runs: one JSON file for each spec, basis, set of library versions and state of the planner's own code."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path

from orchestrator import __version__
from orchestrator.planner.plan import Plan
from orchestrator.spec import Checkpoint, Logging, Model, Run, RunSpec, digest

LIBRARIES = ("torch", "transformers", "deepspeed", "peft", "accelerate")
"""Libraries whose version can move a plan."""


def folder() -> Path:
    """Where plans are kept: beside the tokenised data, in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "orchestrator" / "plans"


@functools.cache
def code_digest() -> str:
    """SHA-256 over the source of every room that decides a plan, so that a changed planner never answers from the past."""
    package = Path(__file__).resolve().parents[1]
    files = sorted(path for room in ("planner", "layout", "engine", "model", "spec") for path in (package / room).glob("*.py"))
    total = hashlib.sha256()
    for path in files:
        total.update(path.name.encode() + path.read_bytes())
    return total.hexdigest()


@functools.cache
def versions() -> tuple[tuple[str, str], ...]:
    """Installed versions of what moves a plan, the project's own first."""

    def installed(name: str) -> str:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return "none"

    return (("orchestrator", __version__), *((name, installed(name)) for name in LIBRARIES))


def key(spec: RunSpec, basis: str) -> str:
    """The name of a plan: equal for runs that differ only in what no byte and no second of a step depends on."""
    path = None if spec.model.shape is not None and spec.model.shape.known else spec.model.path
    bare = replace(
        spec,
        run=Run(None, None, 1),
        seed=0,
        model=Model(spec.model.name, path, spec.model.trust_remote_code, spec.model.shape),
        checkpoint=Checkpoint(0, 1, spec.checkpoint.background),
        resume="none",
        logging=Logging(1, "none"),
    )
    text = json.dumps([digest(bare), basis, versions(), code_digest()])
    return hashlib.sha256(text.encode()).hexdigest()


def recall(names: Sequence[str]) -> dict[str, Plan]:
    """The plans that are kept under `names`; what is missing or unreadable is left out."""
    found = {}
    for name in names:
        path = folder() / f"{name}.json"
        try:
            found[name] = Plan.from_json(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return found


def keep(name: str, plan: Plan) -> None:
    """Write `plan` under `name`, whole or not at all. A cache that cannot be written is no reason to stop."""
    path = folder() / f"{name}.json"
    temporary = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(plan.to_json()), encoding="utf-8")
        temporary.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
