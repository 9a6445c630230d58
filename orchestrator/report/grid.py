"""A table of named columns that goes into a terminal: where it would not, the columns that tell least are left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.table import Table
from rich.text import Text

Columns = Mapping[str, Sequence[str] | Sequence[str | Text]]
"""The cells below each header, all of one length."""

GAP = 2
"""Blanks between columns."""


def wide(columns: Columns) -> int:
    """Characters of the longest line."""
    return sum(max(map(len, map(str, (name, *cells)))) + GAP for name, cells in columns.items()) - GAP


def within(columns: Columns, dropped: Sequence[str], width: int) -> Columns:
    """The columns without those of `dropped`, from its first on, until they go into `width` characters or all are gone."""
    kept = dict(columns)
    for name in dropped:
        if wide(kept) <= width:
            break
        kept.pop(name, None)
    return kept


def grid(columns: Columns, left: Sequence[str] = (), styles: Sequence[str] = ()) -> Table:
    """The table: columns named in `left` begin at the left, and take two lines where it is too wide all the same; others end at
    the right. `styles` are those of its rows."""
    table = Table(box=None, padding=(0, GAP, 0, 0), pad_edge=False)
    for name in columns:
        table.add_column(name, justify="left" if name in left else "right", no_wrap=name not in left, overflow="fold")
    for number, cells in enumerate(zip(*columns.values(), strict=True)):
        table.add_row(*cells, style=styles[number] if styles else "")
    return table
