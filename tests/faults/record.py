"""What a sweep found, with the command, machine and versions that it was found with."""

from __future__ import annotations

import json
import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

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
