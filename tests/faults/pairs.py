"""Train what the checks call valid: compositions that cover every pair of choices of every two levers, two steps of each.

    python tests/faults/pairs.py [--least 100] [--only N] [--processes 2] [--json FILE]

Groups and the options of keys are read from conf/ and the schema. A greedy search (Cohen et al., The AETG system, 1997) adds
the composition that covers most pairs that are still open; a pair that is refused in every attempt is impossible. Each one is a
whole run as `launch/train.py` makes it, on one or two ranks that are forks of one process: census against layout, two steps,
a checkpoint.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import os
import random
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from functools import partial
from multiprocessing import TimeoutError, get_context
from pathlib import Path
from typing import Any

import kills
import torch
from merging import at, choose, put, typed
from record import record

from orchestrator.cluster.local import local_cluster
from orchestrator.config.catalog import groups, keys
from orchestrator.config.compose import compose_conf, resolve
from orchestrator.config.schema import RootConf
from orchestrator.errors import ConfigError
from orchestrator.spec import RunSpec

SMALL = {
    "model.hidden_size": 32, "model.head_dim": 8, "model.intermediate_size": 64, "model.num_hidden_layers": 2,
    "batch.global_size": 4, "data.seq_len": 64, "run.steps": 2, "export.format": "none", "plan.on_misfit": "ignore",
}  # fmt: skip

STRATEGIES: tuple[tuple[str, ...], ...] = (
    (), ("zero=stage0",), ("zero=stage1",), ("zero=stage1", "offload=optimizer"), ("zero=stage2",),
    ("zero=stage2", "offload=optimizer"), ("zero=stage3",), ("zero=stage3", "offload=optimizer"),
    ("zero=stage3", "offload=cpu"),
    ("fsdp=full_shard",), ("fsdp=full_shard", "offload=cpu"), ("fsdp=shard_grad_op",), ("fsdp=hybrid_shard",), ("tensor=2",),
    ("zero=stage1", "tensor=2"), ("zero=stage2", "tensor=2", "offload=optimizer"),
)  # fmt: skip
"""Engines with what they offload: two levers that hardly meet otherwise. Without words it is one plain process."""

GROUPS = ("tuning", "optimizer", "recompute", "attention", "precision", "schedule")
KEYS = {
    "loss.kind": None, "data.packing": None, "zero.gradients": None, "health.on_nonfinite": None,
    "tuning.quant": (None, "nf4", "int8"),
    "checkpoint.background": (False, True), "batch.micro": (None, 1),
    "tuning.untie": (False, True), "tuning.rslora": (False, True),
    "tuning.modules": ([], ["lm_head", "norms"]), "zero.overlap_comm": (True, False), "tuning.dropout": (0.0, 0.1),
}  # fmt: skip
"""Keys that change what is computed or held; None: the options of the schema."""

PATIENCE = 900.0
"""Seconds that a run may take on a busy machine."""

Composition = dict[str, int]
"""Lever to the place of its choice."""


def levers() -> dict[str, tuple[Any, ...]]:
    """Every lever with its choices, the default first."""
    known, named = keys(), groups()
    found: dict[str, tuple[Any, ...]] = {"strategy": STRATEGIES}
    base = compose_conf([])
    for name in GROUPS:
        found[name] = tuple(choice.name for choice in named[name])
    for path, options in KEYS.items():
        found[path] = options or known[path].options
    default = {"tuning": "full", "optimizer": "adamw", "recompute": "none", "attention": "sdpa", "precision": "auto"}
    for name, choices in found.items():
        if name in default:
            found[name] = (default[name], *(each for each in choices if each != default[name]))
        elif name in known and known[name].options:
            standing = at(base, name).name
            found[name] = (standing, *(each for each in choices if each != standing))
    return found


def words_of(case: Composition, known: Mapping[str, tuple[Any, ...]]) -> tuple[str, ...]:
    """`case` as it is typed; what stands at its default is left out."""
    words = list(known["strategy"][case["strategy"]])
    for name, place in case.items():
        if place and name != "strategy":
            value = known[name][place]
            words.append(f"{name}={str(value).lower() if isinstance(value, bool) else value}".replace("'", "").replace(" ", ""))
    return tuple(words)


def spec_of(case: Composition, known: Mapping[str, tuple[Any, ...]], base: RootConf, folder: Path) -> RunSpec:
    """The run of `case`.

    Raises:
        ConfigError: the checks refuse it.
    """
    conf = copy.deepcopy(base)
    for path, value in {**SMALL, "run.dir": str(folder / "run"), "data.cache_dir": str(folder.parent / "cache")}.items():
        put(conf, path, value)
    for word in known["strategy"][case["strategy"]]:
        choose(conf, word)
    for name, place in case.items():
        if place and name != "strategy":
            value = known[name][place]
            if name in GROUPS:
                choose(conf, f"{name}={value}")
            else:
                put(conf, name, typed(keys()[name], value))
    stated = frozenset(word.partition("=")[0] for word in words_of(case, known))
    ranks = 2 if known["strategy"][case["strategy"]] else 1
    return resolve(conf, stated, ranks=ranks, local=local_cluster)


Pair = tuple[tuple[str, int], tuple[str, int]]


def pairs_of(case: Composition) -> set[Pair]:
    chosen = sorted(case.items())
    return {(one, other) for place, one in enumerate(chosen) for other in chosen[place + 1 :]}


class Search:
    """The compositions that cover all pairs."""

    def __init__(self, seed: int) -> None:
        self.known, self.random = levers(), random.Random(seed)
        self.base = compose_conf([])
        names = sorted(self.known)
        self.open: set[Pair] = {
            ((a, i), (b, j))
            for a, b in itertools.combinations(names, 2)
            for i in range(len(self.known[a]))
            for j in range(len(self.known[b]))
        }
        self.impossible: dict[Pair, str] = {}
        self.found: list[Composition] = []
        self.tried = 0

    def valid(self, case: Composition) -> str | None:
        """Why the checks refuse `case`, or None."""
        self.tried += 1
        try:
            spec_of(case, self.known, self.base, Path("/nonexistent/run"))
        except ConfigError as error:
            return error.faults[0].field
        return None

    def grown(self, pair: Pair) -> Composition | None:
        """A valid composition with `pair`: lever after lever the choice that covers most open pairs and is valid."""
        case = dict.fromkeys(self.known, 0) | dict(pair)
        if self.valid(case) is not None:
            strategies = list(range(len(self.known["strategy"])))
            self.random.shuffle(strategies)
            helpers = [{"strategy": each} for each in strategies] + [
                {"tuning": each} for each in range(len(self.known["tuning"]))
            ]
            helpers += [one | other for one in helpers[: len(strategies)] for other in helpers[len(strategies) :]]
            fixed = dict(pair)
            usable = ({**case, **each, **fixed} for each in helpers)
            found = next((each for each in itertools.islice(usable, 60) if self.valid(each) is None), None)
            if found is None:
                return None
            case = found
        free = [name for name in self.known if name not in dict(pair)]
        self.random.shuffle(free)
        for name in free:
            choices = [{**case, name: place} for place in range(len(self.known[name])) if place != case[name]]
            self.random.shuffle(choices)
            now = len(self.open & pairs_of(case))
            choices.sort(key=lambda each: -len(self.open & pairs_of(each)))
            for each in choices[:3]:
                if len(self.open & pairs_of(each)) >= now and self.valid(each) is None:
                    case = each
                    break
        return case

    def cover(self) -> None:
        """Fill `found` until no pair is open."""
        while self.open:
            pair = self.random.choice(sorted(self.open))
            case = self.grown(pair)
            if case is None:
                self.open.discard(pair)
                self.impossible[pair] = "refused with every strategy and tuning"
                continue
            self.found.append(case)
            self.open -= pairs_of(case)
            if len(self.found) % 20 == 0:
                print(f"{len(self.found)} found, {len(self.open)} pairs open", file=sys.stderr, flush=True)


def train(spec: RunSpec, words: Sequence[str], folder: Path, world: Any) -> None:
    """One rank of the run; what went wrong is left in a file."""
    from orchestrator.train.run import Run

    try:
        outcome = Run(spec, world).execute()
        assert outcome.step == 2
    except BaseException:
        (folder / f"failed-{world.rank}").write_text(traceback.format_exc())
        os._exit(1)
    os._exit(0)


def one(place: Path, base: RootConf, known: Mapping[str, tuple[Any, ...]], numbered: tuple[int, Composition]) -> dict[str, Any]:
    """What became of a composition."""
    number, case = numbered
    folder = place / str(number)
    folder.mkdir()
    words, spec = words_of(case, known), spec_of(case, known, base, folder)
    began = time.perf_counter()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    try:
        codes = kills.run(spec.strategy.ranks, partial(train, spec, words, folder), patience=PATIENCE)
    except TimeoutError:
        codes = [-9]
    said = "\n".join(file.read_text() for file in sorted(folder.glob("failed-*")))
    losses = (folder / "run" / "metrics.jsonl").read_text().count('"loss"') if not any(codes) else 0
    return {"words": words, "ranks": spec.strategy.ranks, "codes": codes, "said": said[-1500:], "trained": losses == 2,
            "seconds": round(time.perf_counter() - began, 1)}  # fmt: skip


def sweep(least: int, only: int | None, processes: int, seed: int, minutes: float) -> dict[str, Any]:
    """What became of all compositions of a covering, and of further ones up to `least`."""
    import deepspeed  # noqa: F401 - the forks have it then

    import orchestrator.train.run  # noqa: F401

    kills.GRACE = 60.0
    search = Search(seed)
    search.cover()
    covering = len(search.found)
    while len(search.found) < least:
        case = {name: search.random.randrange(len(choices)) for name, choices in search.known.items()}
        if search.valid(case) is None:
            search.found.append(case)
    print(f"{covering} compositions cover the pairs; {len(search.impossible)} pairs are refused", file=sys.stderr, flush=True)
    numbered = list(enumerate(search.found))
    search.random.shuffle(numbered)  # those at the end of a covering are the plainest
    chosen = numbered[:only]
    with tempfile.TemporaryDirectory() as name, get_context("fork").Pool(processes) as pool:
        place = Path(name).resolve()
        results: list[dict[str, Any]] = []
        deadline = time.monotonic() + 60 * minutes
        waiting = pool.imap_unordered(partial(one, place, search.base, search.known), chosen)
        while len(results) < len(chosen) and time.monotonic() < deadline:
            try:
                result = waiting.next(max(0.0, deadline - time.monotonic()))
            except TimeoutError:
                break
            results.append(result)
            if not result["trained"]:
                print(" ".join(result["words"]), result["codes"], result["said"][-400:], file=sys.stderr, flush=True)
        pool.terminate()
    return {
        "levers": {name: len(choices) for name, choices in search.known.items()},
        "pairs": sum(len(a) * len(b) for a, b in itertools.combinations(search.known.values(), 2)),
        "refused_pairs": len(search.impossible),
        "covering": covering,
        "trained": sum(result["trained"] for result in results),
        "of": len(results),
        "wrong": [result for result in results if not result["trained"]],
        "compositions": [" ".join(result["words"]) for result in results],
        "seed": seed,
    }


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--least", type=int, default=100)
    parser.add_argument("--only", type=int)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=600.0)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    result = sweep(asked.least, asked.only, asked.processes, asked.seed, asked.minutes)
    record(result, asked.json)
    return 1 if result["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
