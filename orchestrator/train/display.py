"""What a person sees while it runs: a progress bar with the time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from orchestrator import data
from orchestrator.train.memory import Memory
from orchestrator.units import format_bytes, format_count, format_seconds

LOG = logging.getLogger("orchestrator.train")
_PLAIN_WIDTH = 140
ROOMY = 110
"""Characters in a line from which on a bar and the time so far stand beside the numbers of a step."""

QUIET_SECONDS = 2.0
"""Tokenising that is done before this is not worth a word."""


def count(number: int, noun: str) -> str:
    """ "1 rank", "2 ranks"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def home_word(home: str, card: str) -> str:
    """`home` for a person: where the ranks compute on the CPU (`card` "cpu") there is no GPU to speak of."""
    return "device" if home == "gpu" and card == "cpu" else home


def step_text(line: Mapping[str, Any]) -> str:
    """The numbers of one step in a line for a person."""
    text = (
        f"loss {line['loss']:.4f}  lr {line['lr']:.2e}  grad {line['grad_norm']:.3f}  "
        f"{format_count(round(line['tokens_per_second']))} tokens/s"
    )
    return f"{text}  eval {line['eval_loss']:.4f}" if "eval_loss" in line else text


def memory_table(ranks: Sequence[Memory]) -> Table:
    """The memory of all ranks side by side, a column for each."""
    table = Table(box=None, padding=(0, 2, 0, 0), show_edge=False)
    table.add_column("memory", style="dim")
    for memory in ranks:
        table.add_column(f"rank {memory.rank}", justify="right")
    rows: Iterable[tuple[str, str]] = (
        ("card used", "device_used"), ("torch reserved, peak", "reserved"), ("torch allocated, peak", "allocated"),
        ("process resident", "resident"), ("process resident, peak", "resident_peak"),
    )  # fmt: skip
    for label, field in rows:
        values = [getattr(memory, field) for memory in ranks]
        if any(value is not None for value in values):
            table.add_row(label, *("-" if value is None else format_bytes(value) for value in values))
    return table


class Display:
    """The screen of rank 0; on the other ranks it says nothing. All that it says stands in the log as well."""

    def __init__(self, speaks: bool, console: Console | None = None) -> None:
        self._speaks = speaks
        self._console = console or Console()
        if not self._console.is_terminal:
            self._console = console or Console(width=_PLAIN_WIDTH, soft_wrap=True)
        self._progress: Progress | None = None
        self._next_word = 0.0
        self._began, self._begun_at, self._total = 0.0, 0, 0

    def note(self, text: str) -> None:
        """One line about the run."""
        if self._speaks:
            self._console.print(text, highlight=False, markup=False)
            LOG.info("%s", text)

    def preparing(self, progress: data.Progress) -> None:
        """How far the tokenising has come: in place on a terminal, elsewhere a line now and then."""
        if not self._speaks or progress.seconds < QUIET_SECONDS:
            return
        rate = f"{format_count(progress.tokens)} tokens, {format_count(round(progress.tokens / progress.seconds))}/s"
        text = f"data     tokenising, {progress.share:.0%}: {rate}" if progress.share else f"data     tokenising: {rate}"
        if progress.share:
            text += f", left {format_seconds(progress.seconds / progress.share * (1 - progress.share))}"
        if self._console.is_terminal:
            last = progress.share >= 1
            self._console.print(f"{text:<{self._console.width - 1}}", end="\n" if last else "\r", highlight=False, markup=False)
        elif progress.seconds >= self._next_word:
            self._next_word = 2 * progress.seconds
            self._console.print(text, highlight=False, markup=False)

    def begin(self, done: int, total: int) -> None:
        """Show progress from step `done` to `total`."""
        self._begun_at, self._total, self._began = done, total, time.monotonic()
        if not self._speaks or not self._console.is_terminal:
            return
        done_so_far = (BarColumn(bar_width=24), TimeElapsedColumn()) if self._console.width >= ROOMY else ()
        self._progress = Progress(
            TextColumn("step"), MofNCompleteColumn(), *done_so_far, TextColumn("left"), TimeRemainingColumn(),
            TextColumn("{task.fields[numbers]}"), console=self._console,
        )  # fmt: skip
        self._progress.add_task("train", total=total, completed=done, numbers="")
        self._progress.start()

    def step(self, line: Mapping[str, Any], shown: bool) -> None:
        """One finished step; `shown` asks for a lasting line of it."""
        if not self._speaks:
            return
        done, text = int(line["step"]), step_text(line)
        if self._progress is not None:
            self._progress.update(self._progress.task_ids[0], completed=done, numbers=text)
        if shown:
            LOG.info("step %d/%d  %s", done, self._total, text)
            if self._progress is None:
                rate = (time.monotonic() - self._began) / max(1, done - self._begun_at)
                left = format_seconds(rate * (self._total - done))
                self._console.print(f"step {done}/{self._total}  {text}  left {left}", highlight=False, markup=False)

    def memory(self, ranks: Sequence[Memory]) -> None:
        """The memory of all ranks side by side: a table on a terminal, one line elsewhere and in the log."""
        if not self._speaks:
            return
        line = "memory  " + "  ".join(
            f"rank {m.rank}: " + (f"{format_bytes(m.device_used)} card, " if m.device_used is not None else "")
            + f"{format_bytes(m.resident)} RAM" for m in ranks
        )  # fmt: skip
        LOG.info("%s", line)
        if self._progress is not None:
            self._console.print(memory_table(ranks))
        else:
            self._console.print(line, highlight=False, markup=False)

    def end(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
