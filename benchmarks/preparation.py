"""Preparation: tokens a second, and the memory of every process while a large file is tokenised.

`python benchmarks/preparation.py [megabytes=1100] [kind=alpaca|text] [workers=N] [tokenizer=FOLDER] [seq_len=2048]`

Writes a file of that size from the built-in sample (or, where it is there, from ../shared/data), prepares it in a fresh
process, and prints one JSON object. `growth_mib` is the largest resident memory of the preparing process less what it held
before it began; `crew_mib` the largest sum of its tokenising processes, each of which holds an interpreter, a tokenizer and
two chunks. File pages that are only mapped do not count.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

MIB = 1 << 20
SHARED = ROOT.parent / "shared"
OPTIONS = {"megabytes": "1100", "kind": "alpaca", "workers": "", "tokenizer": "", "seq_len": "2048", "work": ""}


def anonymous(process: int) -> int:
    """Bytes of memory that belong to `process` alone, mapped files apart."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    fields = dict(line.split(":", 1) for line in lines)
    return sum(int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssShmem") if name in fields)


def children(process: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{process}/task").iterdir():
        listed = task / "children"
        if listed.exists():
            found += [int(number) for number in listed.read_text().split()]
    return found


class Watch(threading.Thread):
    """The largest memory of this process and of its children, looked at ten times a second."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.before = self.own = anonymous(os.getpid())
        self.crew = 0
        self.ended = threading.Event()

    def run(self) -> None:
        while not self.ended.wait(0.1):
            self.own = max(self.own, anonymous(os.getpid()))
            self.crew = max(self.crew, sum(map(anonymous, children(os.getpid()))))


def source_rows(kind: str) -> list[dict[str, str]]:
    """Rows to repeat."""
    name = SHARED / "data" / ("alpaca_en_demo.json" if kind == "alpaca" else "c4_demo.jsonl")
    if not name.exists():
        lines = (ROOT / "orchestrator/data/sample/train.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        return rows if kind == "alpaca" else [{"text": row["output"]} for row in rows]
    text = name.read_text(encoding="utf-8")
    return json.loads(text) if kind == "alpaca" else [json.loads(line) for line in text.splitlines()]


def write(path: Path, size: int, kind: str) -> None:
    """A file of JSON Lines of at least `size` bytes, in which no row is like another."""
    rows, written = source_rows(kind), 0
    field = "instruction" if kind == "alpaca" else "text"
    with path.open("w", encoding="utf-8") as file:
        turn = 0
        while written < size:
            for row in rows:
                written += file.write(json.dumps({**row, field: f"{turn}: {row[field]}"}) + "\n")
            turn += 1


def measure(path: Path, cache: Path, values: dict[str, str]) -> dict[str, object]:
    """Prepare `path` in this process."""
    from orchestrator.data import load_tokenizer, prepare
    from orchestrator.spec import Data

    folder = values["tokenizer"] or (str(SHARED / "tokenizer") if (SHARED / "tokenizer").exists() else None)
    workers = int(values["workers"]) if values["workers"] else None
    data = Data(str(path), int(values["seq_len"]), tokenizer=folder, workers=workers)
    tokenizer = load_tokenizer(data, None)
    import pyarrow.ipc  # noqa: F401

    watch = Watch()
    watch.start()
    began = time.perf_counter()
    prepared = prepare(data, tokenizer, 0, cache)
    seconds = time.perf_counter() - began
    watch.ended.set()
    watch.join()
    return {
        "file_mib": round(path.stat().st_size / MIB), "rows": prepared.report.rows, "samples": len(prepared),
        "tokens": prepared.report.tokens, "seconds": round(seconds, 1),
        "tokens_per_second": round(prepared.report.tokens / seconds),
        "mib_per_second": round(path.stat().st_size / MIB / seconds, 2),
        "growth_mib": round((watch.own - watch.before) / MIB), "crew_mib": round(watch.crew / MIB),
        "cores": len(os.sched_getaffinity(0)),
    }  # fmt: skip


def main(argv: list[str]) -> int:
    """Write the file, measure in a process of its own, print."""
    values = {**OPTIONS, **dict(argument.split("=", 1) for argument in argv)}
    if values["work"]:
        print(json.dumps(measure(Path(values["work"]), Path(values["work"]).parent / "cache", values)))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        write(path, int(values["megabytes"]) * 1_000_000, values["kind"])
        return subprocess.run([sys.executable, __file__, *argv, f"work={path}"]).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
