"""Dry runs on one real card, and what was predicted for each.

    python benchmarks/gpu/memory.py measure --out FOLDER [--minutes 9] [--only TEXT]     # on the machine with the card
    python benchmarks/gpu/memory.py compare FOLDER [--json FILE]                         # anywhere: rehearses and compares
    python benchmarks/gpu/memory.py measure --smoke --out FOLDER                         # on a CPU, in miniature

`measure` needs torch, transformers, peft, accelerate and deepspeed alone (see bare.sh for an image without the last), no
network and no Hydra. Each run is a process of its own, forked from one that has the libraries loaded. It writes one JSON a
run and about.json with the card, driver and versions; it stops by itself when the minutes are over. `compare` rehearses the
same specs without a card and prints the errors of allocated and reserved bytes: median and worst, and the operations behind
the worst.
"""

from __future__ import annotations

import argparse
import gzip
import importlib.metadata
import json
import os
import statistics
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # looking for a card must not start CUDA before the fork

from cases import all_cases, smoke_cases  # noqa: E402

from orchestrator.spec import RunSpec, from_json, to_json  # noqa: E402

PACKAGES = ("torch", "deepspeed", "transformers", "peft", "accelerate")
LAST_START_SECONDS = 40
"""No run starts with less than this left of the minutes."""


def about(device: str) -> dict[str, Any]:
    """The card, its driver and the versions. Starts CUDA: call it in a child."""
    import torch

    found: dict[str, Any] = {name: importlib.metadata.version(name) for name in PACKAGES}
    found["python"] = sys.version.split()[0]
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        free, total = torch.cuda.mem_get_info()
        found |= {"card": properties.name, "memory_bytes": total, "context_bytes": total - free, "cuda": torch.version.cuda}
        version = Path("/proc/driver/nvidia/version")
        found["driver"] = version.read_text().splitlines()[0] if version.exists() else "unknown"
    return found


def in_child(work: Any, path: Path) -> str | None:
    """Run `work()` in a fork and write its JSON to `path`; what went wrong, or None."""
    child = os.fork()
    if child == 0:
        code = 0
        try:
            text = json.dumps(work())
            path.write_bytes(gzip.compress(text.encode(), 3) if path.suffix == ".gz" else text.encode())
        except BaseException:
            path.with_suffix(".error").write_text(traceback.format_exc())
            code = 1
        os._exit(code)
    _, status = os.waitpid(child, 0)
    if status == 0:
        return None
    log = path.with_suffix(".error")
    return log.read_text().strip().splitlines()[-1] if log.exists() else f"ended with status {status}"


def measure(out: Path, minutes: float, only: str, smoke: bool) -> int:
    import deepspeed  # noqa: F401  (loaded once, before the forks)
    import peft  # noqa: F401
    import torch
    import transformers  # noqa: F401

    from orchestrator.planner.dryrun import dry_run_here

    warnings.filterwarnings("ignore", category=FutureWarning)  # torch about its own collectives, at every call
    device = torch.device("cpu") if smoke else torch.device("cuda", 0)
    out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + minutes * 60
    in_child(lambda: about(device.type), out / "about.json")
    chosen = {n: spec for n, spec in (smoke_cases() if smoke else all_cases()).items() if only in n}
    done = failed = 0
    for name, spec in chosen.items():
        if time.monotonic() > deadline - LAST_START_SECONDS:
            print(f"time is over: {len(chosen) - done - failed} runs not started")
            break

        def work(spec: RunSpec = spec) -> dict[str, Any]:
            return {"spec": to_json(spec), "measured": dry_run_here(spec, 0, device).to_json()}

        began = time.monotonic()
        problem = in_child(work, out / f"{name}.json.gz")
        done, failed = done + (problem is None), failed + (problem is not None)
        print(
            f"{'ok    ' if problem is None else 'FAILED'} {time.monotonic() - began:5.1f} s  {name}  {problem or ''}",
            flush=True,
        )
    print(f"{done} measured, {failed} failed, results in {out}")
    return 1 if failed else 0


def compare(folder: Path, output: Path | None) -> int:
    from orchestrator.planner.dryrun import DryRun
    from orchestrator.planner.rehearsal import rehearse
    from orchestrator.report.dryruns import beside

    results: dict[str, Any] = {}
    errors: dict[str, list[tuple[float, str]]] = {"requested": [], "allocated": [], "reserved": []}
    for path in sorted(folder.glob("*.json.gz")):
        stored = json.loads(gzip.decompress(path.read_bytes()))
        name = path.name.removesuffix(".json.gz")
        predicted = rehearse(from_json(RunSpec, stored["spec"]), 0)
        result = results[name] = beside(DryRun.from_json(stored["measured"]), predicted)
        for kind, found in errors.items():
            pairs = [row[kind] for row in result["phases"] if kind in row]
            if pairs and not result["error"]:
                measured = max(pair["measured"] for pair in pairs)
                found.append(((max(pair["predicted"] for pair in pairs) - measured) / measured, name))
        said = [f"{kind} {found[-1][0]:+.3%}" for kind, found in errors.items() if found and found[-1][1] == name]
        print(f"{name}: {result['error'] or ', '.join(said)}")
    summary = {}
    for kind, found in errors.items():
        if found:
            worst = max(found, key=lambda item: abs(item[0]))
            middle = statistics.median(abs(value) for value, _ in found)
            summary[kind] = {"runs": len(found), "median": middle, "worst": worst[0], "worst_run": worst[1]}
            print(f"{kind}: median {middle:.3%}, worst {worst[0]:+.3%} ({worst[1]})")
            operations = results[worst[1]]["differing_operations"]
            if worst[0] and operations:
                print(f"    {'; '.join(operations[:3])}")
    if output is not None:
        information = json.loads((folder / "about.json").read_text())
        output.write_text(json.dumps({"about": information, "summary": summary, "results": results}, indent=1) + "\n")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    measuring = commands.add_parser("measure")
    measuring.add_argument("--out", type=Path, required=True)
    measuring.add_argument("--minutes", type=float, default=9.0)
    measuring.add_argument("--only", default="")
    measuring.add_argument("--smoke", action="store_true")
    comparing = commands.add_parser("compare")
    comparing.add_argument("folder", type=Path)
    comparing.add_argument("--json", type=Path)
    asked = parser.parse_args()
    if asked.command == "measure":
        return measure(asked.out, asked.minutes, asked.only, asked.smoke)
    return compare(asked.folder, asked.json)


if __name__ == "__main__":
    sys.exit(main())
