"""How the cost of planning and of preparing data grows: seconds of the processor, and a small picture of each.

    python benchmarks/scaling.py [--repeats 3] [--only layers|candidates|rows]

`layers`: a plan of Llama 3 8B with that many layers, from the layout and by rehearsal (without a cache); `candidates`: plans
of one model under the first so many of its strategies; `rows`: a file of so many texts tokenised and packed by one process.
The exponent is the slope of a straight line through the logarithms: 1 is linear, below it there is a part that does not grow.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import log
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import account  # noqa: E402

PICTURES = ROOT / "docs" / "pictures"
RUN = ("model=llama3_8b", "cluster=4xa10", "fsdp=full_shard", "tuning=lora", "data.seq_len=512")
Series = dict[str, dict[int, float]]
"""Of each line of a picture, the median of the seconds for each size."""


def spent() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def median_cost(work: Callable[[], Any], repeats: int) -> float:
    """Processor seconds of `work` and of the processes that it waits for."""
    costs = []
    for _ in range(repeats):
        began = spent()
        work()
        costs.append(spent() - began)
    return statistics.median(costs)


def layers(repeats: int) -> Series:
    from orchestrator.config import compose
    from orchestrator.planner.predict import by_layout, by_rehearsal

    found: Series = {"from the layout": {}, "rehearsed": {}}
    base = compose(list(RUN))
    for count in (4, 8, 16, 32, 64):
        shape = replace(base.model.shape, num_hidden_layers=count)
        spec = replace(base, model=replace(base.model, shape=shape))
        found["from the layout"][count] = median_cost(lambda spec=spec: by_layout(spec), 10 * repeats)
        found["rehearsed"][count] = median_cost(lambda spec=spec: by_rehearsal(spec), repeats)
    return found


def candidates(repeats: int) -> Series:
    from orchestrator.config import compose
    from orchestrator.planner import candidates as every
    from orchestrator.planner.predict import by_layout

    chosen = every.candidates(compose(["model=llama3_8b", "cluster=8xh100", "tuning=lora"], strict=False))
    found: Series = {"from the layout": {}}
    for count in sorted({max(1, len(chosen) * part // 8) for part in (1, 2, 4, 6, 8)}):
        works = [candidate.spec for candidate in chosen[:count]]
        found["from the layout"][count] = median_cost(lambda works=works: [by_layout(spec) for spec in works], 3 * repeats)
    return found


def rows(repeats: int) -> Series:
    from preparation import SHARED, write

    from orchestrator.data import load_tokenizer, prepare, rows_of
    from orchestrator.spec import Data

    found: Series = {"tokenised and packed": {}}
    tokenizer = str(SHARED / "tokenizer") if SHARED.exists() else None
    with tempfile.TemporaryDirectory() as scratch:
        for size in (500_000, 1_000_000, 2_000_000, 4_000_000, 8_000_000):
            path = Path(scratch) / f"{size}.jsonl"
            write(path, size, "text")
            data = Data(str(path), 2048, tokenizer=tokenizer, packing="best_fit", workers=1, format="text")
            words = load_tokenizer(data, None)

            def work(data: Data = data, words: Any = words) -> None:
                with tempfile.TemporaryDirectory(dir=scratch) as cache:
                    rows_of(prepare(data, words, 0, Path(cache)))

            with path.open(encoding="utf-8") as lines:
                count = sum(1 for _ in lines)
            found["tokenised and packed"][count] = median_cost(work, repeats)
    return found


MEASURES: dict[str, tuple[Callable[[int], Series], str]] = {
    "layers": (layers, "layers"),
    "candidates": (candidates, "strategies planned"),
    "rows": (rows, "rows of text"),
}


def exponent(points: dict[int, float]) -> float:
    """The slope through the logarithms."""
    return statistics.linear_regression(
        [log(size) for size in points], [log(max(cost, 1e-6)) for cost in points.values()]
    ).slope


def draw(series: Series, axis: str, path: Path) -> None:
    """The lines of `series` over its sizes, each with its exponent."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(4.6, 3.0), dpi=90, layout="constrained")
    for name, points in series.items():
        axes.plot(list(points), list(points.values()), marker="o", label=f"{name}: exponent {exponent(points):.2f}")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.set_xlabel(axis)
    axes.set_ylabel("processor seconds")
    axes.legend(frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", choices=tuple(MEASURES))
    asked = parser.parse_args(arguments)
    for name, (measure, axis) in MEASURES.items():
        if asked.only in (None, name):
            series = measure(asked.repeats)
            results = {
                line: {"exponent": round(exponent(points), 3), "seconds": {str(k): round(v, 5) for k, v in points.items()}}
                for line, points in series.items()
            }
            command = f"python benchmarks/scaling.py --repeats {asked.repeats} --only {name}"
            account.write(f"scaling-{name}-cpu", command, account.versions("torch", "tokenizers", "pyarrow"), results)
            draw(series, axis, PICTURES / f"scaling-{name}.png")
            for line, found in results.items():
                print(f"{name}, {line}: {found}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
