"""Lengths of samples and what is learned of them, for a terminal and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from orchestrator import data
from orchestrator.data.lengths import Lengths, histogram, measure
from orchestrator.data.preparation import is_quick, prepared_folder
from orchestrator.data.prepared import Prepared
from orchestrator.data.store import UNLEARNED
from orchestrator.errors import DataError
from orchestrator.report.plan_picture import write
from orchestrator.spec import RunSpec

BARS, BAR_WIDTH = 16, 44
LEARNED, READ, CONTROL = "bold green", "dim", "magenta"
LONGEST_RUN = 240
"""Characters of one run of learned or read text that are shown; of a longer one both ends."""

STRIP_COLOURS = {"learned": "#1e8449", "read": "#d5d8dc"}


def bars(folder: Path, seq_len: int) -> RenderableType:
    """Rows by length, one bar for each round range; what lies beyond `seq_len` is red."""
    found = histogram(folder, BARS)
    most = max(count for *_, count in found)
    table = Table(box=None, padding=(0, 1, 0, 0), show_header=False)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(no_wrap=True)
    for first, last, count in found:
        width = max(1, round(BAR_WIDTH * count / most)) if count else 0
        beyond = "red" if first >= seq_len else "cyan"
        table.add_row(f"{first}–{last}", Text("█" * width, style=beyond) + Text(f" {count}", style="default"))
    return table


def limits(found: Lengths, seq_len: int) -> RenderableType:
    """What each seq_len would cut, pad and pack; the run's own is marked."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for header in ("seq_len", "longer rows", "tokens cut", "unpacked: padding", "packed: rows", "full"):
        table.add_column(header, justify="right", no_wrap=True)
    for limit in found.limits:
        own = limit.seq_len == seq_len
        table.add_row(
            f"{'> ' if own else ''}{limit.seq_len}", f"{limit.longer} ({limit.longer / found.rows:.1%})",
            f"{limit.lost} ({limit.lost / found.tokens:.1%})", f"{limit.padding:.1%}", str(limit.rows), f"{limit.fill:.2%}",
            style="bold" if own else "",
        )  # fmt: skip
    return table


def overview(folder: Path, found: Lengths, prepared: Prepared) -> RenderableType:
    """All of it but the samples."""
    return Group(
        Text(f"data     {prepared.report.sentence()}"),
        Text(f"lengths  {found.sentence()}\n"),
        bars(folder, prepared.seq_len),
        Text(""),
        limits(found, prepared.seq_len),
    )


def brief(spec: RunSpec) -> list[str]:
    """A few lines about the data for a plan: none for the built-in sample, and no long tokenising."""
    wanted = spec.data
    if wanted.path is None and not wanted.sources:
        return []
    try:
        tokenizer = data.load_tokenizer(wanted, spec.model.path, trust_remote_code=spec.model.trust_remote_code)
        if not is_quick(wanted, tokenizer):
            return [
                "data     not tokenised yet: launch/lengths.py with the same arguments does, and tells how long the samples are"
            ]
        prepared = data.prepare(wanted, tokenizer, spec.seed, data.cache_folder())
    except DataError as error:
        return [f"data     not looked at: {error.faults[0].problem}"]
    found = measure(prepared_folder(wanted, prepared), prepared, spec.batch, spec.seed)
    return [
        f"data     {prepared.report.sentence()}",
        f"lengths  {found.sentence()}",
        f"         {found.own(wanted.seq_len).sentence()}",
    ]


def chosen(prepared: Prepared, count: int) -> list[int]:
    """At most `count` samples, evenly from the first to the last."""
    return sorted({int(place) for place in np.linspace(0, len(prepared) - 1, min(count, len(prepared)))})


def masks(prepared: Prepared, tokenizer: Any, samples: Sequence[int], *, coloured: bool) -> RenderableType:
    """The samples as text: learned in green, special tokens in purple, the rest dim. Without colours what is learned
    stands between ⟦ and ⟧."""
    special = set(tokenizer.all_special_ids)
    legend = Text.assemble(("learned", LEARNED), "  ", ("read only", READ), "  ", ("special token", CONTROL))
    parts: list[RenderableType] = [legend if coloured else Text("learned: between ⟦ and ⟧")]
    for sample in samples:
        ids, labels = prepared.input_ids[sample], prepared.labels[sample]
        parts.append(Text(f"\nsample {sample}: {len(ids)} tokens, {int(prepared.labelled[sample])} learned", style="bold"))
        line = Text()
        kinds = [(int(label) != UNLEARNED, int(token) in special) for token, label in zip(ids, labels, strict=True)]
        place = 0
        for taught, of_kind in groupby(kinds, key=lambda kind: kind[0]):
            line.append("⟦" if taught and not coloured else "")
            length = len(list(of_kind))
            for control, run in groupby(range(place, place + length), key=lambda at: kinds[at][1]):
                text = _shortened(tokenizer.decode(ids[list(run)]))
                style = LEARNED if taught else READ
                line.append(text, style=f"{CONTROL} {'bold' if taught else 'dim'}" if control else style)
            line.append("⟧" if taught and not coloured else "")
            place += length
        line.rstrip()
        parts.append(line)
    return Group(*parts)


def _shortened(text: str) -> str:
    if len(text) <= LONGEST_RUN:
        return text
    half = LONGEST_RUN // 2
    return f"{text[:half]} … {len(text) - 2 * half} characters … {text[-half:]}"


def draw(folder: Path, found: Lengths, prepared: Prepared, samples: Sequence[int], path: Path) -> Path:
    """Write a picture: how many rows have which length, the limit as a line, and under it the masks of some samples.

    Raises:
        ConfigError: the folder cannot be written.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    figure = Figure(figsize=(9, 7), layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=[3, 2])
    shown = histogram(folder, 60)
    above.bar(
        [first for first, *_ in shown], [count for *_, count in shown], width=shown[0][1] + 1, align="edge", color="#2f6db3"
    )
    edge = shown[-1][0] + shown[0][1] + 1
    if prepared.seq_len < 2 * edge:  # else it is far to the right of every row
        edge = max(edge, round(prepared.seq_len * 1.15))
        above.axvline(prepared.seq_len, color="#c0392b", linestyle="--", label=f"seq_len {prepared.seq_len}")
        above.legend(loc="upper right", fontsize=9)
    above.set_xlim(0, edge)
    own = found.own(prepared.seq_len)
    above.set_title(
        f"{found.sentence()}\n{own.longer} longer than {own.seq_len}; unpacked {own.padding:.1%} padding, packed "
        f"{own.rows} rows {own.fill:.2%} full", fontsize=10,
    )  # fmt: skip
    above.set_xlabel("tokens")
    above.set_ylabel("rows")
    for height, sample in enumerate(reversed(samples)):
        taught = prepared.labels[sample] != UNLEARNED
        edges = np.flatnonzero(np.diff(taught.astype(np.int8), prepend=2, append=2))
        for start, stop in pairwise(edges):
            colour = STRIP_COLOURS["learned" if taught[start] else "read"]
            below.barh(height, stop - start, left=start, color=colour, height=0.8)
    below.set_yticks(range(len(samples)), [f"sample {sample}" for sample in reversed(samples)], fontsize=8)
    below.set_xlabel("tokens")
    below.legend(
        handles=[Patch(color=colour, label=name) for name, colour in STRIP_COLOURS.items()],
        loc="lower right",
        ncols=2,
        bbox_to_anchor=(1, 1),
        fontsize=8,
    )
    return write(figure, path)
