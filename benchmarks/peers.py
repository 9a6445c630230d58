"""Against what people use: learned tokens a second, and from the command to the first step, ÷ those of TRL and transformers.

    python -m venv build/peers
    build/peers/bin/pip install -c benchmarks/peers/constraints.txt torch
    build/peers/bin/pip install -c benchmarks/peers/constraints.txt trl transformers accelerate datasets
    python benchmarks/peers.py padded|packed|start|data [--rounds 7] [--megabytes 200] [--python build/peers/bin/python]

All train a Llama of 27 M parameters from random weights, in fp32, on two ranks over gloo, on ../shared/data/alpaca_en_demo.json
as prompt and completion, learning the completion, with one global batch and one longest row. `padded`: SFTTrainer and Trainer
as near to each other and to us as they go (no gradient checkpointing), and SFTTrainer as it comes; `packed`: SFTTrainer and
ours with packing; `start`: each from its command to the end of its first step, in a process of its own, in turns; `data`: a
file of that size tokenised and packed into rows of 2,048 by two processes (peers/prepare.py), in turns: by SFTTrainer as it
comes, which cuts long texts off and leaves the rest out, and told to keep all of them, as ours does.

In the first two one of our strategies and the peers are alive together and take their steps one after the other
(peers/turns.py); a further strategy meets them in a run of its own, since with seven jobs at once our steps cost a third more
than alone (docs/log.md). Padded, a step has the same samples for all, and learned tokens a second are compared; packed, rows
hold the same samples in other company, so a step's share of learned tokens is chance: tokens without padding are.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import account  # noqa: E402

PEERS, SHARED = ROOT / "benchmarks" / "peers", ROOT.parent / "shared"
RANKS, LENGTH = 2, 512
SHAPE = {
    "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 8,
    "head_dim": 64, "vocab_size": 6400, "max_position_embeddings": 1024, "tie_word_embeddings": False,
}  # fmt: skip
BATCHES = {"padded": (4, 2), "packed": (2, 1), "start": (4, 2)}
"""(global batch, micro-batch) of each comparison."""

TEMPLATE = "### Instruction:\n{instruction}\n\n{input}### Response:\n"
PLAIN = {"gradient_checkpointing": False}
"""SFTTrainer runs every forward twice unless it is told not to; its bf16 is switched off in every case."""

THEIRS: dict[str, dict[str, dict[str, Any]]] = {
    "padded": {
        "trl": {"kind": "trl", "arguments": PLAIN},
        "transformers": {"kind": "hf"},
        "trl as it comes": {"kind": "trl"},
    },
    "packed": {"trl": {"kind": "trl", "packing": True, "arguments": PLAIN}},
    "start": {"trl": {"kind": "trl", "arguments": PLAIN}},
}
OURS = {"padded": (), "packed": ("data.packing=best_fit",), "start": ()}
COUNTED = {"padded": "labels", "packed": "tokens"}
"""What of a step is compared by the second."""

FIELDS = ("cpu", "labels", "tokens", "positions")


def write_rows(folder: Path) -> tuple[Path, Path]:
    """The shared sample as JSON Lines of prompt and completion, so that all learn the same tokens: for us in its order, and for
    the others, who take rows as they come, in the order in which our run draws them."""
    import numpy as np

    from orchestrator.data.order import epoch_order

    lines = []
    for row in json.loads((SHARED / "data" / "alpaca_en_demo.json").read_text(encoding="utf-8")):
        given = f"{row['input']}\n\n" if row.get("input") else ""
        prompt = TEMPLATE.format(instruction=row["instruction"], input=given)
        lines.append(json.dumps({"prompt": prompt, "completion": row["output"]}) + "\n")
    ours, theirs = folder / "rows.jsonl", folder / "drawn.jsonl"
    ours.write_text("".join(lines), encoding="utf-8")
    theirs.write_text("".join(lines[index] for index in epoch_order(np.arange(len(lines)), 0, 0)), encoding="utf-8")
    return ours, theirs


def torchrun(python: str, port: int, *words: str) -> list[str]:
    return [python, "-m", "torch.distributed.run", f"--nproc-per-node={RANKS}", f"--master-port={port}", *words]


def environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return {**kept, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}


def our_words(kind: str, rows: Path, folder: Path, steps: int, further: Sequence[str]) -> list[str]:
    size, micro = BATCHES[kind]
    shape = [f"model.{name}={value}".lower() for name, value in SHAPE.items()]
    return [
        *shape, f"data.path={rows}", f"data.tokenizer={SHARED / 'tokenizer'}", f"data.seq_len={LENGTH}", f"run.dir={folder}",
        f"data.cache_dir={folder.parent / 'cache'}", f"batch.global_size={size}", f"batch.micro={micro}", f"run.steps={steps}",
        "precision=fp32", "optimizer.lr=1e-3", "run.timeout=0", "checkpoint.every=0", "export.format=none",
        "plan.on_misfit=ignore", *OURS[kind], *further,
    ]  # fmt: skip


def their_options(kind: str, name: str, rows: Path, folder: Path, steps: int) -> dict[str, Any]:
    size, micro = BATCHES[kind]
    return {
        **THEIRS[kind][name], "rows": str(rows), "tokenizer": str(SHARED / "tokenizer"), "shape": SHAPE, "length": LENGTH,
        "steps": steps, "micro": micro, "accumulation": size // micro // RANKS, "out": str(folder),
    }  # fmt: skip


def in_turns(kind: str, rounds: int, python: str, strategy: str, scratch: Path) -> dict[str, list[dict[str, float]]]:
    """Of every job its steps, ours under `strategy` first: processor seconds of both ranks, clock seconds, and what they held:
    learned tokens, tokens, positions."""
    (rows, drawn), steps = write_rows(scratch), rounds + 1
    name = "ours" + (f" {strategy}" if strategy else "")
    words = our_words(kind, rows, scratch / "run", steps, strategy.split())
    told = json.dumps({"turns": str(scratch), "name": name, "steps": steps})
    commands = {name: torchrun(sys.executable, 29600, str(PEERS / "ours.py"), told, *words)}
    for name in THEIRS[kind]:
        options = their_options(kind, name, drawn, scratch / name, steps) | {"turns": str(scratch), "name": name}
        commands[name] = torchrun(python, 29600 + len(commands), str(PEERS / "theirs.py"), json.dumps(options))
    jobs = {}
    for name, command in commands.items():
        with (scratch / f"{name}.log").open("wb") as log:
            jobs[name] = subprocess.Popen(command, env=environment(), stdout=log, stderr=subprocess.STDOUT)
    try:
        found: dict[str, list[dict[str, float]]] = {name: [] for name in jobs}
        for step in range(steps):
            for name, job in jobs.items():
                (scratch / f"{name}.go").write_text(str(step))
                ranks = [
                    _awaited(scratch / f"{name}.{rank}.{step}.json", job, scratch / f"{name}.log") for rank in range(RANKS)
                ]
                together = {field: sum(rank[field] for rank in ranks) for field in FIELDS}
                found[name].append({**together, "wall": max(rank["wall"] for rank in ranks)})
        return found
    finally:
        for job in jobs.values():
            job.terminate()
        for job in jobs.values():
            job.wait()


def _awaited(path: Path, job: subprocess.Popen[bytes], log: Path) -> dict[str, float]:
    while not path.exists():
        if job.poll() not in (None, 0):
            sys.exit(log.read_text(errors="replace")[-3000:])
        time.sleep(0.02)
    measured: dict[str, float] = json.loads(path.read_text())
    return measured


def compared(kind: str, runs: Sequence[dict[str, list[dict[str, float]]]]) -> dict[str, Any]:
    """Of each run of ours with its peers, the ratios of COUNTED tokens a second, first steps left out: of the processor, and of
    the clock; and the sums over all steps."""
    ratios: dict[str, Any] = {}
    totals: dict[str, list[dict[str, float]]] = {}
    what = COUNTED[kind]
    for found in runs:
        own, *peers = found
        rates = {
            clock: {name: [step[what] / step[clock] for step in steps[1:]] for name, steps in found.items()}
            for clock in ("cpu", "wall")
        }
        for name in peers:
            ratios[f"{own} ÷ {name}"] = {
                f"{what}_a_{clock}_second": account.ratio(rates[clock][own], rates[clock][name]) for clock in rates
            }
        for name, steps in found.items():
            total = {field: round(sum(step[field] for step in steps[1:]), 3) for field in (*FIELDS, "wall")}
            totals.setdefault(name, []).append(total)
    return {"ratios": ratios, "totals": totals}


def until(command: Sequence[str], told: dict[str, str], mark: Path, log: Path) -> account.Cost:
    """What a job and all its processes have taken when it leaves `mark`; it is ended there."""
    import psutil

    began = time.perf_counter()
    with log.open("wb") as output:
        job = subprocess.Popen(command, env=told, stdout=output, stderr=subprocess.STDOUT)
    try:
        while not mark.exists() or not mark.stat().st_size:
            if job.poll() is not None:
                sys.exit(log.read_text(errors="replace")[-3000:])
            time.sleep(0.02)
        wall = time.perf_counter() - began
        every = [psutil.Process(job.pid), *psutil.Process(job.pid).children(recursive=True)]
        return account.Cost(sum(sum(process.cpu_times()[:4]) for process in every), wall)
    finally:
        for process in psutil.Process(job.pid).children(recursive=True) if job.poll() is None else ():
            process.kill()
        job.kill()
        job.wait()


def started(rounds: int, python: str, scratch: Path) -> dict[str, Any]:
    """Ratios of the cost from a job's command to the end of its first step; the data are prepared anew each time."""
    rows, drawn = write_rows(scratch)
    costs: dict[str, list[account.Cost]] = {"ours": [], **{name: [] for name in THEIRS["start"]}}
    for turn in range(rounds):
        for name, kept in costs.items():
            with tempfile.TemporaryDirectory(dir=scratch, ignore_cleanup_errors=True) as own:
                folder = Path(own) / "run"
                folder.mkdir()
                if name == "ours":
                    words = our_words("start", rows, folder, 2, ())
                    command = torchrun(sys.executable, 29650, str(ROOT / "launch" / "train.py"), *words)
                else:
                    told = json.dumps(their_options("start", name, drawn, folder, 2))
                    command = torchrun(python, 29650, str(PEERS / "theirs.py"), told)
                cache = {"HF_DATASETS_CACHE": str(Path(own) / "hf"), "XDG_CACHE_HOME": str(Path(own) / "cache")}
                mark = folder / ("metrics.jsonl" if name == "ours" else "first")
                kept.append(until(command, {**environment(), **cache}, mark, scratch / f"{name}.log"))
                print(
                    f"start {turn + 1}/{rounds} {name}: processor {kept[-1].cpu:.1f} s, clock {kept[-1].wall:.1f} s", flush=True
                )
    ratios = {}
    for name in THEIRS["start"]:
        ratios[f"ours ÷ {name}"] = {
            f"{clock}_seconds": account.ratio(
                [getattr(c, clock) for c in costs["ours"]], [getattr(c, clock) for c in costs[name]]
            )
            for clock in ("cpu", "wall")
        }
    return {"ratios": ratios}


def prepared(rounds: int, python: str, megabytes: int, scratch: Path) -> dict[str, Any]:
    """Ratios of tokens a second from a file of texts to packed rows."""
    from preparation import write

    path = scratch / "rows.jsonl"
    found: dict[str, list[dict[str, float]]] = {"ours": [], "trl keeping all": [], "trl as it comes": []}
    write(path, megabytes * 1_000_000, "text")
    for turn in range(rounds):
        for name, kept in found.items():
            with tempfile.TemporaryDirectory(dir=scratch) as cache:
                words = (name, str(path), str(SHARED / "tokenizer"), "2048", str(RANKS), cache)
                command = [sys.executable if name == "ours" else python, str(PEERS / "prepare.py"), *words]
                shown = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
            if shown.returncode:
                sys.exit(shown.stderr[-3000:])
            kept.append(json.loads(shown.stdout.splitlines()[-1]))
            print(f"data {turn + 1}/{rounds} {name}: {kept[-1]}", flush=True)
    rates = {
        clock: {name: [run["tokens"] / run[clock] for run in runs] for name, runs in found.items()} for clock in ("cpu", "wall")
    }
    own, *peers = found
    ratios = {
        f"{own} ÷ {name}": {f"tokens_a_{clock}_second": account.ratio(rates[clock][own], rates[clock][name]) for clock in rates}
        for name in peers
    }
    last = {name: runs[-1] for name, runs in found.items()}
    return {"ratios": ratios, "file_bytes": path.stat().st_size, "last": last}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=(*BATCHES, "data"))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--megabytes", type=int, default=200, help="of the file of `data`")
    parser.add_argument("--python", default=str(ROOT / "build" / "peers" / "bin" / "python"), help="of the peers' environment")
    parser.add_argument("--ours", nargs="*", default=[""], metavar="WORDS", help="our strategies, each a job; '' chooses")
    parser.add_argument("--json", action="store_true", help="write benchmarks/results/peers-KIND-cpu.json")
    asked = parser.parse_args()
    if not Path(asked.python).exists() or not SHARED.exists():
        missing = asked.python if SHARED.exists() else SHARED
        sys.exit(f"{missing} is not there; the first lines of this file say how to make the peers' environment")
    if asked.kind in COUNTED:
        runs = []
        for strategy in asked.ours:
            with tempfile.TemporaryDirectory() as folder:
                runs.append(in_turns(asked.kind, asked.rounds, asked.python, strategy, Path(folder)))
        results = compared(asked.kind, runs)
    else:
        with tempfile.TemporaryDirectory() as folder:
            if asked.kind == "start":
                results = started(asked.rounds, asked.python, Path(folder))
            else:
                results = prepared(asked.rounds, asked.python, asked.megabytes, Path(folder))
    for name, found in results["ratios"].items():
        said = ", ".join(f"{what} {value['ratio']:.3f} {value['middle_half']}" for what, value in found.items())
        print(f"{asked.kind} {name}: {said}")
    for name, totals in results.get("totals", {}).items():
        for total in totals:
            print(f"    {name}: {total}")
    if asked.json:
        peers = (PEERS / "constraints.txt").read_text(encoding="utf-8").split("\n")
        packages = account.versions("torch", "deepspeed", "transformers")
        packages |= {f"peers {line.partition('==')[0]}": line.partition("==")[2] for line in peers if "==" in line}
        size = f" --megabytes {asked.megabytes}" if asked.kind == "data" else ""
        command = f"python benchmarks/peers.py {asked.kind} --rounds {asked.rounds}{size} --json"
        account.write(f"peers-{asked.kind}-cpu", command, packages, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
