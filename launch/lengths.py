"""Look at the data before training: `python launch/lengths.py data.path=FILE [data.seq_len=1024] [show=10] [format=json]`.

Prints how long the samples are, what seq_len cuts and what packing saves, with a picture (out=lengths.png); `show` prints
samples coloured by what is learned. What it tokenises is kept for the run."""

from __future__ import annotations

import json
import sys
from pathlib import Path

# This clone, also where another one is installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from orchestrator.config import compose, run_app

LOOKED_AT = 10
"""Samples whose masks are drawn."""


def lengths(overrides: list[str]) -> int:
    """Prepare, measure, print, draw; the exit code."""
    from dataclasses import asdict

    from rich.console import Console

    from orchestrator import data
    from orchestrator.cluster.local import local_cluster
    from orchestrator.data.lengths import measure
    from orchestrator.data.preparation import prepared_folder
    from orchestrator.report import lengths as report
    from orchestrator.report.arguments import choices, whole
    from orchestrator.report.plans import show
    from orchestrator.report.progress import tokenising

    options = {"format": ("text", "json"), "out": (), "show": ()}
    values, rest = choices(overrides, options, {"format": "text", "out": "lengths.png", "show": "0"})
    count = whole(values, "show")
    spec = compose(rest, local=local_cluster, strict=False)
    tokenizer = data.load_tokenizer(spec.data, spec.model.path, trust_remote_code=spec.model.trust_remote_code)
    with tokenising() as advance:
        prepared = data.prepare(spec.data, tokenizer, spec.seed, data.cache_folder(), advance)
    folder = prepared_folder(spec.data, prepared)
    found = measure(folder, prepared, spec.batch, spec.seed)
    if values["format"] == "json":
        print(json.dumps({"report": asdict(prepared.report), "lengths": asdict(found)}, indent=2))
        return 0
    show(report.overview(folder, found, prepared))
    if count:
        print()
        coloured = Console().is_terminal
        show(report.masks(prepared, tokenizer, report.chosen(prepared, count), coloured=coloured))
    samples = report.chosen(prepared, count or LOOKED_AT)
    if spec.model.shape is not None and prepared.report.highest_id >= spec.model.shape.vocab_size:
        ids, size = prepared.report.highest_id, spec.model.shape.vocab_size
        advice = f"{spec.model.name} has {size} of them: name the tokenizer of the model"
        print(f"\nwarning  the tokens go up to id {ids}, and {advice}")
    print(f"\npicture {report.draw(folder, found, prepared, samples, Path(values['out']).expanduser())}")
    return 0


if __name__ == "__main__":
    sys.exit(run_app(lengths, program="launch/lengths.py"))
