"""What a checkpoint costs: the stop of training with and without `checkpoint.background`, its bytes, and the way back.

    python benchmarks/checkpoint.py [--mib 64 128 256 512] [--times 7] [--folder /tmp] [--json FILE] [--plot FILE]

One rank saves a training state of matrices of 8 MiB (the fp32 master and both moments), in the foreground and in the background
by turns, and reads it back: its digests verified, and every element. Figures are medians of `--times`; the file cache is warm,
as it is in a run that resumes on the machine that saved.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

import torch  # noqa: E402 - this clone goes on the path first

from orchestrator.engine.protocol import Piece  # noqa: E402
from orchestrator.train import checkpoint  # noqa: E402
from orchestrator.train.resume import Reader, first_sound  # noqa: E402
from orchestrator.train.saving import Saved, Saver  # noqa: E402
from orchestrator.train.world import World, join, leave  # noqa: E402
from orchestrator.units import MIB  # noqa: E402

KINDS = ("weight", "exp_avg", "exp_avg_sq")
ELEMENTS = 8 * MIB // 4


def state(mib: int) -> dict[tuple[str, str], torch.Tensor]:
    """A training state of about `mib` MiB, by name and kind, all of it touched."""
    count = max(1, mib // (8 * len(KINDS)))
    return {(f"w{number}", kind): torch.rand(ELEMENTS) for number in range(count) for kind in KINDS}


def pieces(tensors: dict[tuple[str, str], torch.Tensor]) -> Iterator[Piece]:
    return (Piece(name, kind, (ELEMENTS,), 0, tensor) for (name, kind), tensor in tensors.items())


class Course:
    """Saves of one state, one after the other in one folder, as a run makes them."""

    def __init__(self, folder: Path, world: World, tensors: dict[tuple[str, str], torch.Tensor]) -> None:
        self.folder, self.tensors, self.step = folder, tensors, 0
        self.saved: list[Saved] = []
        self.bytes = sum(tensor.nbytes for tensor in tensors.values())
        self.savers = {kind: Saver(world, self.saved.append, background=kind == "background") for kind in KINDS_OF_SAVE}

    def save(self, kind: str) -> dict[str, float]:
        """The seconds of one save: how long training stands still, and until it is on the disk."""
        self.step += 1
        moment = checkpoint.Moment(self.step, 0, 1, "digest", {})
        began = time.perf_counter()
        self.savers[kind].save(
            pieces(self.tensors),
            lambda taken, beside: checkpoint.save(
                self.folder, moment, taken, beside, scalars={}, keep=1, expected_bytes=self.bytes
            ),
        )
        stall = time.perf_counter() - began
        self.savers[kind].wait()
        return {"stall": stall, "whole": time.perf_counter() - began}

    def load(self, world: World) -> dict[str, float]:
        """The seconds to verify the newest checkpoint, and to read all of it."""
        began = time.perf_counter()
        path = self.saved[-1].path
        assert first_sound([path], world, print) == path
        verified = time.perf_counter() - began
        reader = Reader(path)
        for (name, kind), tensor in self.tensors.items():
            read = reader.read(name, kind, 0, ELEMENTS).clone()
            assert read[-1] == tensor[-1]
        reader.close()
        return {"verify": verified, "whole": time.perf_counter() - began}

    def written(self) -> int:
        """Bytes of all files of the newest checkpoint."""
        return sum(file.stat().st_size for file in self.saved[-1].path.iterdir())


KINDS_OF_SAVE = ("foreground", "background")


def middle(samples: list[dict[str, float]], name: str) -> float:
    return round(statistics.median(sample[name] for sample in samples), 4)


def measure(mib: int, times: int, place: Path, world: World) -> dict[str, Any]:
    """The figures of a state of `mib` MiB."""
    tensors = state(mib)
    with tempfile.TemporaryDirectory(dir=place) as name:
        course = Course(Path(name), world, tensors)
        samples: dict[str, list[dict[str, float]]] = {kind: [] for kind in (*KINDS_OF_SAVE, "load")}
        for _ in range(times + 1):
            for kind in KINDS_OF_SAVE:
                samples[kind].append(course.save(kind))
            samples["load"].append(course.load(world))
        samples = {kind: taken[1:] for kind, taken in samples.items()}  # the first is warm-up
        written = course.written()
    foreground, stall = middle(samples["foreground"], "whole"), middle(samples["background"], "stall")
    return {
        "bytes": course.bytes,
        "written_ratio": round(written / course.bytes, 5),
        "foreground_seconds": foreground,
        "background_stall_seconds": stall,
        "background_seconds": middle(samples["background"], "whole"),
        "stall_ratio": round(stall / foreground, 4),
        "verify_seconds": middle(samples["load"], "verify"),
        "load_seconds": middle(samples["load"], "whole"),
        "samples": {
            "foreground": [round(sample["whole"], 4) for sample in samples["foreground"]],
            "stall": [round(sample["stall"], 4) for sample in samples["background"]],
            "load": [round(sample["whole"], 4) for sample in samples["load"]],
        },
    }


def line(sizes: list[dict[str, Any]], name: str) -> dict[str, float]:
    """The straight line of least squares through seconds by bytes, and how much of their variance it explains."""
    x, y = [each["bytes"] / 2**30 for each in sizes], [each[name] for each in sizes]
    slope, start = statistics.linear_regression(x, y)
    correlation = statistics.correlation(x, y)
    return {"seconds_per_gib": round(slope, 3), "seconds_at_0": round(start, 3), "r2": round(correlation**2, 4)}


LINES = {"save": "foreground_seconds", "stop of a save in the background": "background_stall_seconds", "load": "load_seconds"}


def plot(sizes: list[dict[str, Any]], path: Path) -> None:
    """Seconds by bytes, measured and the line through them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5.2, 3.4), dpi=90)
    for name, key in LINES.items():
        x = [each["bytes"] / 2**30 for each in sizes]
        fitted = line(sizes, key)
        (drawn,) = axes.plot(x, [each[key] for each in sizes], "o", label=name)
        ends = [0.0, max(x)]
        axes.plot(
            ends, [fitted["seconds_at_0"] + fitted["seconds_per_gib"] * end for end in ends], color=drawn.get_color(), lw=0.8
        )
    axes.set(xlabel="GiB of training state", ylabel="seconds", xlim=(0, None), ylim=(0, None))
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--mib", type=int, nargs="+", default=[72, 144, 288, 576])
    parser.add_argument("--times", type=int, default=7)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    asked = parser.parse_args()
    world = join("cpu")
    sizes = [measure(mib, asked.times, asked.folder, world) for mib in asked.mib]
    leave()
    result = {
        "command": "python benchmarks/checkpoint.py",
        "machine": f"{os.cpu_count()} CPU cores, {platform.system()} {platform.machine()}, load {os.getloadavg()[1]:.1f}",
        "versions": {name: version(name) for name in ("torch", "safetensors")},
        "times": asked.times,
        "stall_ratio": statistics.median(each["stall_ratio"] for each in sizes),
        "written_ratio": max(each["written_ratio"] for each in sizes),
        "lines": {name: line(sizes, key) for name, key in LINES.items()} if len(sizes) > 1 else {},
        "sizes": sizes,
    }
    text = json.dumps(result, indent=1)
    print(text)
    if asked.json is not None:
        asked.json.write_text(text + "\n", encoding="utf-8")
    if asked.plot is not None:
        plot(sizes, asked.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
