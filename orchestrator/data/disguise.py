"""Special tokens that a person wrote as text: they stay text, and never end a turn or begin another.

Each name of a special token in a conversation's own words is replaced by one stand-in letter before the template is filled
in; what the template itself writes keeps its meaning. Then the text is cut at the template's special tokens, and between
them the names are put back and spelt letter by letter.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from orchestrator.data.conversation import Malformed
from orchestrator.data.tokens import Ids, Mask, Span, Speller

FIRST_STAND_IN = 0xF0000
"""The first letter of Unicode's private plane 15, where no script lies."""

STAND_INS = re.compile(f"[{chr(FIRST_STAND_IN)}-{chr(FIRST_STAND_IN + 0xFFFD)}]")
"""Text that already holds one of these letters cannot be told from a stand-in: `hide` refuses it."""


def holds_name(value: Any, pattern: re.Pattern[str]) -> bool:
    """Whether a string anywhere in `value` holds the name of a special token."""
    if isinstance(value, str):
        return pattern.search(value) is not None
    if isinstance(value, Mapping):
        return any(holds_name(item, pattern) for item in value.values())
    return isinstance(value, Sequence) and any(holds_name(item, pattern) for item in value)


def hide(value: Any, speller: Speller) -> Any:
    """`value` with a stand-in for every name of a special token in its strings.

    Raises:
        Malformed: it holds one of the stand-ins already.
    """
    assert speller.pattern is not None, "there are names to hide"
    if isinstance(value, str):
        if STAND_INS.search(value):
            raise Malformed(
                "the text holds special tokens and letters of Unicode's private plane 15, which stand for them here"
            )
        numbers = {name: index for index, name in enumerate(speller.special)}
        return speller.pattern.sub(lambda found: chr(FIRST_STAND_IN + numbers[found[0]]), value)
    if isinstance(value, Mapping):
        return {key: hide(item, speller) for key, item in value.items()}
    return [hide(item, speller) for item in value] if isinstance(value, Sequence) else value


def spell_hidden(speller: Speller, text: str, spans: Sequence[Span]) -> tuple[Ids, Mask]:
    """Ids and mask of a `text` with stand-ins; `spans` are characters of it."""
    assert speller.pattern is not None, "there are names to put back"
    ids: list[Ids] = []
    masks: list[Mask] = []

    def add(start: int, stop: int) -> None:
        if start < stop:
            local = [(max(a, start) - start, min(b, stop) - start) for a, b in spans if a < stop and start < b]
            restored, moved = _restore(text[start:stop], local, list(speller.special))
            (spelt,) = speller.spell([restored], plain=True)
            ids.append(spelt)
            masks.append(speller.mark(restored, spelt, moved, plain=True))

    reached = 0
    for found in speller.pattern.finditer(text):
        add(reached, found.start())
        ids.append(np.array([speller.special[found[0]]], dtype=np.int32))
        masks.append(np.array([any(a < found.end() and found.start() < b for a, b in spans)]))
        reached = found.end()
    add(reached, len(text))
    return np.concatenate(ids), np.concatenate(masks)


def _restore(text: str, spans: Sequence[Span], names: Sequence[str]) -> tuple[str, list[Span]]:
    """`text` with the names put back, and `spans` moved along."""
    places = [found.start() for found in STAND_INS.finditer(text)]
    grown = np.cumsum([0, *(len(names[ord(text[place]) - FIRST_STAND_IN]) - 1 for place in places)])

    def moved(place: int) -> int:
        return place + int(grown[bisect_left(places, place)])

    restored = STAND_INS.sub(lambda found: names[ord(found[0]) - FIRST_STAND_IN], text)
    return restored, [(moved(start), moved(stop)) for start, stop in spans]
