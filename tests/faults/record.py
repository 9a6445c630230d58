"""What a sweep found, with the command, machine and versions that it was found with."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from warm import warm

LIBRARIES = ("torch", "deepspeed", "transformers", "peft", "safetensors")


def record(result: dict[str, Any], path: Path | None) -> None:
    """Print `result`, and keep it at `path`."""
    script = Path(sys.argv[0]).name
    place = sys.argv.index("--json") if "--json" in sys.argv else len(sys.argv)
    words = sys.argv[1:place] + sys.argv[place + 2 :]
    about = {
        "command": " ".join(["python", f"tests/faults/{script}", *words]),
        "machine": f"{os.cpu_count()} CPU cores, {platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "versions": {library: version(library) for library in LIBRARIES},
    }
    text = json.dumps(about | result, indent=1)
    print(text)
    if path is not None:
        path.write_text(text + "\n", encoding="utf-8")


def by_state(sweep: Callable[[list[int], list[str]], dict[str, Any]]) -> int:
    """The exit code of a sweep over strategies and numbers of ranks, as the command line asks for it; what it found is kept."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--only", nargs="+", default=[], help="strategies (zero3) or states (zero3@2)")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    warm()
    result = sweep(asked.ranks, asked.only)
    record(result, asked.json)
    return 1 if result["wrong"] else 0
