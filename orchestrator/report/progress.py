"""A progress bar on stderr while plans are made; silent where no one looks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


@contextmanager
def progress(name: str, console: Console | None = None) -> Iterator[Callable[[int, int, str], None]]:
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

        def advance(done: int, total: int, words: str) -> None:
            bar.update(task, completed=done, total=total, description=words)

        yield advance
