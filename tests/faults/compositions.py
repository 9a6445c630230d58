"""Compose what nobody planned: random groups, choices, keys and values, through the entry of the launch scripts.

    python tests/faults/compositions.py [--cases 5000] [--seed 0] [--processes 1] [--minutes 600] [--json FILE]

Words are drawn from the schema and from conf/ themselves, so that a new key or choice joins by itself: valid choices beside
misspelt ones, boundaries beside wrong types and absurd numbers. Each composition must end as a plan or as one error of the
project that fits on a screen and names field and remedy.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import io
import sys
import textwrap
import time
import traceback
import typing
from collections import Counter
from dataclasses import dataclass, replace
from enum import Enum
from multiprocessing import TimeoutError, get_context
from pathlib import Path
from types import NoneType
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from merging import choose as choose_choice
from merging import put, typed
from omegaconf.errors import OmegaConfBaseException
from record import record
from rich.console import Console

from orchestrator.cluster.local import local_cluster
from orchestrator.config import compose as composed
from orchestrator.config import run_app
from orchestrator.config.catalog import CONF_DIR, Key, groups, keys
from orchestrator.config.compose import compose_conf, resolve
from orchestrator.config.overrides import check_overrides, composition_fault
from orchestrator.config.schema import RootConf
from orchestrator.errors import ConfigError, OrchestratorError
from orchestrator.planner.choose import choose
from orchestrator.planner.plan import LAYOUT
from orchestrator.planner.planning import names_strategy, plan_of
from orchestrator.report import plans
from orchestrator.report.lengths import brief
from orchestrator.spec import RunSpec, from_json, to_json

COLUMNS, ROWS = 120, 40
"""A screen."""

WILD = (
    "abc", "null", "-1", "0", "1", "2.5", "true", "[]", "{}", "[1,2,3]",
    "{a: 1}", "1e400", "nan", "-inf", "''", "???", "9" * 30, "x" * 4000,
    "${seed}", "${oc.env:HOME}", "${nothing.here}", "a b", "a,b", "é☃", "../../etc/passwd", "!!python/none", "1,2",
    "range(3)", "$(id)", "'", '"', "[", "{", "=", "~", "@x", "0x10", "1_000", "\t", "\\n", "{{ 1 }}", "_target_",
)  # fmt: skip
"""What a person, a script or somebody hostile may write behind any "="."""

NUMBERS = {
    int: ("-1", "0", "1", "2", "3", "4", "8", "16", "64", "100", "1000", "4096", "2147483648", "9223372036854775808", "9" * 40),
    float: ("-1", "0", "1e-300", "0.03", "0.5", "0.999", "1", "1.5", "10", "1e6", "1e300", "inf", "nan"),
    bool: ("true", "false"),
    str: ("''", "a", "name-1", "/nowhere/file.json", "~/x", "a.jsonl", "org/name", "random", "auto", "none"),
}
"""Boundaries and plausible values by type."""

LISTS = (
    "[]", "[a]", "[q_proj,v_proj]", "[all-linear]", "[lm_head]", "[norms]", "[0.9,0.95]", "[0.9]", "[1,1]", "[{path: a.json}]",
    "[[a]]", "[null]", "[{path: a.json, weight: -1}]", "[{a: 1}]", "[{path: null}]",
)  # fmt: skip

ODD = (
    "foo.bar=1", "+model._target_=os.system", "~model", "+a=1", "model", "=", "zero@x=stage3", "hydra.run.dir=/tmp/x", "~seed",
    "hydra/launcher=basic", "-x", "++seed=1", "+model.x={_target_: os.system}", "zero=stage1,stage2",
)  # fmt: skip
"""What is no key=value of this project."""

RANKS = (None, 1, 1, 2, 2, 4, 3, 8)
NESTED = {
    path.parent.relative_to(CONF_DIR).as_posix()
    for path in CONF_DIR.rglob("*/*.yaml")
    if any(sign in path.read_text() for sign in ("defaults:", "# @package"))
}
"""Groups whose files choose in other groups."""

PARSER = OverridesParser.create()
CHUNK = 100
"""Cases of one seed."""

FEW = 4
"""At most so many keys beside the groups."""


@dataclass(frozen=True)
class Composition:
    """Words as on the command line; `ranks` that really run, None: those of the cluster; `choosing`: the planner picks.
    `whole`: Hydra itself merges them; else they are merged here once the project has read them, in a tenth of the time."""

    words: tuple[str, ...]
    ranks: int | None
    choosing: bool = False
    whole: bool = True


@dataclass(frozen=True)
class Outcome:
    """`kind` "valid", "refused: ERROR" or "broken: …"; `text` is what a person sees, or the traceback."""

    kind: str
    text: str = ""

    @property
    def broken(self) -> bool:
        return self.kind.startswith("broken")


def values_of(key: Key) -> st.SearchStrategy[str]:
    """What is written behind the "=" of `key`: mostly of its type, sometimes anything."""
    hint = typing.get_type_hints(key.owner)[key.path.rpartition(".")[2]]
    kinds = [kind for kind in (typing.get_args(hint) or (hint,)) if kind is not NoneType]
    kind: Any = kinds[0]
    if isinstance(kind, type) and issubclass(kind, Enum):
        options = [member.name for member in kind]
        plausible: tuple[str, ...] = (*options, options[0][:-1])
    elif kind in NUMBERS:
        plausible = NUMBERS[kind]
    else:
        plausible = LISTS
    if NoneType in typing.get_args(hint):
        plausible = (*plausible, "null")
    typed = st.sampled_from(plausible)
    return st.one_of(*[typed] * 7, st.sampled_from(WILD))


@st.composite
def compositions(draw: st.DrawFn) -> Composition:
    """Some choices of some groups and some keys, mostly such as could be meant."""
    known = keys()
    named = {name: [choice.name for choice in found] for name, found in groups().items() if "/" not in name}
    most = draw(st.sampled_from((1, 2, 5)))
    chosen = draw(st.lists(st.sampled_from(sorted(named)), max_size=most, unique=True))
    words = [f"{name}={draw(st.sampled_from(named[name]))}" for name in chosen]
    if draw(st.integers(0, 19)) == 0:
        words.append(f"{draw(st.sampled_from(sorted(named)))}={draw(st.sampled_from(WILD))}")
    few = draw(st.sampled_from((0, 1, FEW)))
    for path in draw(st.lists(st.sampled_from(sorted(known)), max_size=few, unique=True)):
        words.append(f"{path}={draw(values_of(known[path]))}")
    if draw(st.integers(0, 19)) == 0:
        words.append(draw(st.sampled_from(ODD)))
    return Composition(
        tuple(draw(st.permutations(words))),
        draw(st.sampled_from(RANKS)),
        draw(st.integers(0, 99)) == 0,
        draw(st.integers(0, 9)) == 0,
    )


@functools.cache
def _defaults() -> RootConf:
    return compose_conf([])


def merged(words: list[str], **options: Any) -> RunSpec:
    """As `compose`, with the words merged here."""
    good, stated, misspelt = check_overrides(words, CONF_DIR)
    conf, known = copy.deepcopy(_defaults()), keys()
    overrides = sorted(PARSER.parse_overrides(good), key=lambda each: each.key_or_group in known)  # groups come first
    for override in overrides:
        path, value = override.key_or_group, override.value()
        if path in known:
            try:
                put(conf, path, typed(known[path], value))
            except OmegaConfBaseException as error:  # as compose_conf tells it
                raise ConfigError(composition_fault(error, CONF_DIR)) from error
        else:
            choose_choice(conf, f"{path}={value}")
    return resolve(conf, stated, misspelt, **options)


def carry_out(case: Composition) -> None:
    """What `launch/plan.py` does with the words, from the layout: compose, plan, and the screens of both."""

    def task(words: list[str]) -> int:
        compose = composed if case.whole or NESTED & {word.partition("=")[0] for word in words} else merged
        spec = compose(words, ranks=case.ranks, local=local_cluster, strict=not case.choosing)
        if case.choosing and not names_strategy(spec) and spec.strategy.ranks > 1:
            spec = choose(spec).candidate.spec
        assert from_json(RunSpec, to_json(spec)) == spec
        made = plan_of(spec, LAYOUT, remedies=False)
        made.to_json()
        Console(file=io.StringIO(), width=COLUMNS).print(plans.one(made))
        brief(spec)
        return 0

    def pass_on(error: OrchestratorError) -> int:
        raise error

    run_app(task, list(case.words), report=pass_on)


def rows(text: str) -> int:
    """Lines that `text` takes on a screen."""
    return sum(len(textwrap.wrap(line, COLUMNS)) or 1 for line in text.splitlines())


def unclear(error: OrchestratorError) -> str | None:
    """What keeps the message of `error` from being clear, or None."""
    report = error.report()
    if rows(report) > ROWS:
        return f"{rows(report)} rows"
    if any(not fault.field.strip() or not fault.problem.strip() for fault in error.faults):
        return "a fault without field or problem"
    if any(not fault.remedy.strip() for fault in error.faults):
        return "a fault without a remedy"
    return None


def judge(case: Composition) -> Outcome:
    """What became of `case`."""
    screen = io.StringIO()
    try:
        with contextlib.redirect_stdout(screen), contextlib.redirect_stderr(screen):
            carry_out(case)
    except OrchestratorError as error:
        problem = unclear(error)
        return Outcome(f"broken: {problem}" if problem else f"refused: {type(error).__name__}", error.report())
    except (Exception, SystemExit) as error:
        frame = next((f for f in reversed(traceback.extract_tb(error.__traceback__)) if "/orchestrator/" in f.filename), None)
        place = f" at {Path(frame.filename).name}:{frame.lineno}" if frame else ""
        return Outcome(f"broken: {type(error).__name__}{place}", traceback.format_exc())
    return Outcome("valid")


def smallest(case: Composition, kind: str) -> Composition:
    """`case` without the words that its outcome does not need."""
    for word in case.words:
        fewer = replace(case, words=tuple(each for each in case.words if each != word))
        if judge(fewer).kind == kind:
            case = fewer
    return case


def sweep(cases: int, begin: int) -> dict[str, Any]:
    """How `cases` compositions ended, with the smallest case of every kind of break."""
    ends: Counter[str] = Counter()
    through: Counter[str] = Counter()
    broken: dict[str, Any] = {}
    slowest = (0.0, "")

    @seed(begin)
    @settings(
        max_examples=cases, database=None, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
    )
    @given(compositions())
    def each(case: Composition) -> None:
        nonlocal slowest
        began = time.perf_counter()
        outcome = judge(case)
        slowest = max(slowest, (round(time.perf_counter() - began, 2), " ".join(case.words)[:300]))
        ends[outcome.kind] += 1
        through["Hydra" if case.whole else "merged"] += 1
        if outcome.broken and outcome.kind not in broken:
            least = smallest(case, outcome.kind)
            words = [word[:200] for word in least.words]
            broken[outcome.kind] = {"words": words, "ranks": least.ranks, "whole": least.whole, "text": outcome.text[-1500:]}
            print(outcome.kind, words, least.ranks, file=sys.stderr, flush=True)

    each()
    return {"ends": dict(ends), "through": dict(through), "broken": broken, "slowest": slowest}


def sweeps(cases: int, begin: int, processes: int, minutes: float) -> dict[str, Any]:
    """What sweeps of CHUNK cases, each of a seed of its own, found together; after `minutes` what was found until then."""
    found: list[dict[str, Any]] = []
    deadline = time.monotonic() + 60 * minutes
    with get_context("fork").Pool(processes) as pool:
        parts = [pool.apply_async(sweep, (min(CHUNK, cases - first), begin + first)) for first in range(0, cases, CHUNK)]
        for part in parts:
            with contextlib.suppress(TimeoutError):
                found.append(part.get(max(0.0, deadline - time.monotonic())))
    ends: Counter[str] = sum((Counter(each["ends"]) for each in found), Counter())
    seconds, words = max(each["slowest"] for each in found)
    return {
        "cases": ends.total(),
        "valid": ends["valid"],
        "refused": sum(count for kind, count in ends.items() if kind.startswith("refused")),
        "ends": dict(ends.most_common()),
        "through_hydra": sum(each["through"].get("Hydra", 0) for each in found),
        "broken": {kind: case for each in found for kind, case in each["broken"].items()},
        "seed": begin,
        "keys": len(keys()),
        "choices": sum(map(len, groups().values())),
        "slowest": {"seconds": seconds, "words": words},
    }


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=600.0)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    result = sweeps(asked.cases, asked.seed, asked.processes, asked.minutes)
    record(result, asked.json)
    return 1 if result["broken"] else 0


if __name__ == "__main__":
    sys.exit(main())
