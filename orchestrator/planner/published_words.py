"""Single words and numbers of published rows, and the reason why a row says no run of this project."""

from __future__ import annotations

import re


class Untold(Exception):
    """A row that no run of this project says, with the reason."""


def first(table: tuple[tuple[str, object], ...], text: str) -> object | None:
    return next((value for pattern, value in table if re.search(pattern, text, re.IGNORECASE)), None)


def number_of(text: str, what: str) -> float:
    """The one number of `text`, thousands apart by commas.

    Raises:
        Untold: there is none, or more than one.
    """
    found = re.fullmatch(r"[~≈<>=]*\s*(\d[\d,_]*(?:\.\d+)?)\s*(?:[kKMG]?i?B)?", text)
    if found is None:
        raise Untold(f"{what} not stated as a number")
    return float(re.sub("[,_]", "", found[1]))


def count(text: str, what: str) -> int:
    usual = re.search(r"default (\d+)", text)
    number = number_of(usual[1] if usual else text, what)
    if number < 1 or number != int(number):
        raise Untold(f"{what} is {text}")
    return int(number)
