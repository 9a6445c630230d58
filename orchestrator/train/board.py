"""The board on which ranks leave signs of life for each other: the store in which they have met.

The store lives in one process, rank 0 or its launcher. Where that is stopped, or its machine is gone, a question to it is never
answered and never refused, so a thread of its own asks, and who waits for the answer waits only so long.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from orchestrator.train.verdict import State

LOG = logging.getLogger("orchestrator.train")


Sign = tuple[int, State]
"""How often a rank has given a sign of life, and what it said then."""


class Board:
    """This rank's view of the board, on which `size` ranks write."""

    def __init__(self, store: Any, rank: int, size: int) -> None:
        # A connection of its own: what the rank itself waits for in the store would stand before every sign.
        self._store, self._rank, self._size = store.clone(), rank, size
        self._said: State | None = None
        self._everyone, self._closed, self._lost = False, False, False
        self._found: dict[int, Sign] = {}
        self._turn = threading.Condition()
        self._asked = self._answered = 0
        self._heard = time.monotonic()
        threading.Thread(target=self._run, name="board", daemon=True).start()

    @property
    def first(self) -> State | None:
        """What rank 0 has last said, as far as this rank has heard."""
        return self._found[0][1] if 0 in self._found else None

    @property
    def lost(self) -> bool:
        """Whether the store has ended with its process, which is more than that it does not answer."""
        return self._lost

    def say(self, state: State) -> None:
        """Give a sign of life, without waiting."""
        self._ask(state, everyone=False)

    def look(self, state: State, seconds: float, quiet: float = 0.0) -> Mapping[int, Sign] | None:
        """Give a sign of life and wait for the newest of each rank that has given one; None where that takes longer than so
        many `seconds` and the store has answered nothing for `quiet` ones: to read those of many ranks may take its time."""
        number, begun = self._ask(state, everyone=True), time.monotonic()
        with self._turn:
            while self._answered < number and not self._lost:
                over, silent = time.monotonic() - begun - seconds, time.monotonic() - self._heard
                if over >= 0 and silent >= quiet:
                    break
                self._turn.wait(max(-over, quiet - silent, 0.01))
            return dict(self._found) if self._answered >= number else None

    def close(self) -> None:
        """Leave the board. A question that is not answered is not waited for."""
        with self._turn:
            self._closed = True
            self._turn.notify_all()

    def _ask(self, said: State, *, everyone: bool) -> int:
        with self._turn:
            self._said, self._everyone = said, self._everyone or everyone
            self._asked += 1
            self._turn.notify_all()
            return self._asked

    def _run(self) -> None:
        signs = 0
        while True:
            with self._turn:
                self._turn.wait_for(lambda: self._closed or self._asked > self._answered)
                if self._closed or self._said is None:
                    return
                number, said, ranks = self._asked, self._said, range(self._size) if self._everyone else range(1)
                self._everyone = False
            signs += 1
            try:
                self._store.set(f"beat/{self._rank}", json.dumps([signs, asdict(said)]))  # which waits for no answer
                found = self._read(ranks)
            except RuntimeError as error:
                # It has gone with its process; collectives break too, unless this rank is the one that hangs.
                LOG.warning("the store has gone: %s", str(error).splitlines()[0])
                with self._turn:
                    self._lost = True
                    self._turn.notify_all()
                return
            with self._turn:
                self._found, self._answered = self._found | found, number
                self._turn.notify_all()

    def _read(self, ranks: Iterable[int]) -> dict[int, Sign]:
        """The newest sign of each of `ranks` that has given one; that of rank 0 also shows that the store answers."""
        found = {}
        for rank in ranks:
            there = self._store.check([f"beat/{rank}"])
            self._heard = time.monotonic()
            if there:
                signs, state = json.loads(self._store.get(f"beat/{rank}"))
                found[rank] = (signs, State(**state | {"stack": tuple(state["stack"])}))
        return found
