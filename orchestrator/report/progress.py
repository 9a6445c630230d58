"""A progress bar on stderr while plans are made; without a terminal a line now and then of what takes long."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from orchestrator import data
from orchestrator.units import format_count, format_seconds

BETWEEN = 20.0
"""Seconds between two lines, and before the first, where no terminal shows a bar."""


@contextmanager
def progress(name: str, console: Console | None = None, between: float = BETWEEN) -> Iterator[Callable[[int, int, str], None]]:
    """A function to call with (done, total, what was done last), while the context lasts."""
    console = console or Console(stderr=True)
    columns = (
        TextColumn(name),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)
        began = said = time.monotonic()

        def advance(done: int, total: int, words: str) -> None:
            nonlocal said
            bar.update(task, completed=done, total=total, description=words)
            now = time.monotonic()
            if not console.is_terminal and now - said >= between:
                said = now
                console.print(f"{name}     {done} of {total} after {format_seconds(now - began)}", highlight=False)

        yield advance


@contextmanager
def tokenising(console: Console | None = None) -> Iterator[Callable[[data.Progress], None]]:
    """A function to call with how far the tokenising has come, while the context lasts."""
    console = console or Console(stderr=True)
    columns = (
        TextColumn("tokenising"), BarColumn(bar_width=30), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=1.0)

        def advance(progress: data.Progress) -> None:
            rate = format_count(round(progress.tokens / max(progress.seconds, 1e-9)))
            bar.update(task, completed=progress.share, description=f"{format_count(progress.tokens)} tokens, {rate}/s")

        yield advance
