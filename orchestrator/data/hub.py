"""Datasets of the Hugging Face hub, read through the `datasets` library."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from orchestrator.data.records import Record
from orchestrator.errors import DataError, Fault


@dataclass(frozen=True, slots=True)
class HubRows:
    """One split of a hub dataset. `revision` names its contents."""

    path: str
    subset: str | None
    split: str
    revision: str
    count: int
    data: Any

    def rows(self) -> Iterator[Record]:
        """The rows in the dataset's own order, places counted from 1.

        Raises:
            DataError: the stream broke off.
        """
        place = 0
        try:
            for row in self.data:
                place += 1
                yield Record(place, row, share=min(1.0, place / self.count) if self.count else 0.0)
        except (OSError, ValueError) as error:
            problem = f"{self.path} broke off after row {place}: {_reason(error)}"
            raise DataError(Fault("data.path", problem, "start again; rows are kept only when all have come")) from error


def open_hub(path: str, subset: str | None, split: str, *, streaming: bool) -> HubRows:
    """The rows of `split`; `streaming` reads them as they are used, and keeps no copy of the raw files.

    Raises:
        DataError: there is no such dataset, subset or split, or no way to it.
    """
    from datasets import load_dataset, load_dataset_builder

    try:
        builder = load_dataset_builder(path, subset)
        data = load_dataset(path, subset, split=split, streaming=streaming)
    except (OSError, ValueError, RuntimeError) as error:
        problem = f"{path} (subset {subset or 'default'}, split {split}) cannot be read from the hub: {_reason(error)}"
        remedy = (
            "check the spelling and the network, or download it where there is one and name the folder: "
            "hf download --repo-type dataset " + path + " --local-dir FOLDER"
        )
        raise DataError(Fault("data.path", problem, remedy)) from error
    known = (builder.info.splits or {}).get(split)
    return HubRows(path, subset, split, str(builder.hash), known.num_examples if known else 0, data)


def _reason(error: Exception) -> str:
    text = str(error).strip().partition("\n")[0].rstrip(".")
    return text[:200] or type(error).__name__
