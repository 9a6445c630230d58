"""Rows to tokens, a chunk at a time: what a tokenising process does. Nothing here needs torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from orchestrator.data.chat import Chat, Encoded, speller_of
from orchestrator.data.conversation import Conversation, Malformed, Passage, read_row
from orchestrator.data.records import Record, decoded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some rows of one file, all of the format `kind`. `share`: how much of the file is read when they are."""

    file: int
    kind: str
    records: Sequence[Record]
    share: float


@dataclass(slots=True)
class Shard:
    """What became of a chunk: samples one after the other, and what befell its rows.

    `ids` and `learned` hold all samples end to end, `lengths` tells them apart, `labelled` counts what each learns from
    position 1 on, and `continued` marks the later pieces of a row that was split. `whole` is the length of every row that
    was understood, before anything was cut. Rows that were not kept are in `refused` (cause and place) and `unlabelled`.
    """

    file: int
    share: float
    rows: int = 0
    kept: int = 0
    truncated: int = 0
    split: int = 0
    dropped: int = 0
    disguised: int = 0
    refused: list[tuple[str, int]] = field(default_factory=list)
    unlabelled: list[int] = field(default_factory=list)
    ids: npt.NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, np.int32))
    learned: npt.NDArray[np.uint8] = field(default_factory=lambda: np.zeros(0, np.uint8))
    lengths: npt.NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, np.int32))
    labelled: npt.NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, np.int32))
    continued: npt.NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, np.bool_))
    whole: npt.NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, np.int32))


class Encoder:
    """Encodes chunks for rows of at most `seq_len` tokens. `chat` is needed for conversations alone."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chat: Chat | None, seq_len: int, on_long: str) -> None:
        self.tokenizer, self.chat, self.seq_len, self.on_long = tokenizer, chat, seq_len, on_long
        self.end = tokenizer.eos_token_id
        self.begin = beginning(tokenizer)

    def encode(self, chunk: Chunk) -> Shard:
        """The samples of `chunk`, and what became of its rows."""
        shard = Shard(chunk.file, chunk.share, rows=len(chunk.records))
        read: list[tuple[int, Conversation | Passage]] = []
        for record in chunk.records:
            try:
                read.append((record.place, _read(record, chunk.kind)))
            except Malformed as error:
                shard.refused.append((str(error), record.place))
        passages = iter(self._passages([each for _, each in read if isinstance(each, Passage)]))
        talks = iter(self._conversations([each for _, each in read if isinstance(each, Conversation)]))
        encoded = [(place, next(passages if isinstance(each, Passage) else talks)) for place, each in read]
        self._cut(shard, chunk.kind, encoded)
        return shard

    def _conversations(self, conversations: list[Conversation]) -> list[Encoded | Malformed]:
        if self.chat is None:
            return [Malformed("a list of turns needs a chat template, and the tokenizer has none") for _ in conversations]
        return self.chat.encode_all(conversations) if conversations else []

    def _passages(self, passages: list[Passage]) -> list[Encoded | Malformed]:
        """Beginning token, prompt, text, end token; all but the prompt and the beginning is learned."""
        speller = speller_of(self.tokenizer)
        texts = [passage.prompt + passage.text for passage in passages]
        found: list[Encoded | Malformed] = []
        for passage, text, ids in zip(passages, texts, speller.spell(texts, plain=True), strict=True):
            whole = np.ones(len(ids), np.bool_)
            mask = speller.mark(text, ids, [(len(passage.prompt), len(text))], plain=True) if passage.prompt else whole
            disguised = speller.pattern is not None and speller.pattern.search(text) is not None
            before = np.array(self.begin, np.int32)
            marked = np.concatenate([np.zeros(len(before), np.bool_), mask, [True]])
            found.append(Encoded(np.concatenate([before, ids, np.array([self.end], np.int32)]), marked, disguised))
        return found

    def _cut(self, shard: Shard, kind: str, rows: list[tuple[int, Encoded | Malformed]]) -> None:
        """Fit the rows into seq_len, count, and put what is kept end to end."""
        on_long = self.on_long
        if on_long == "auto":
            on_long = "split" if kind == "text" else "truncate"
        kept: list[tuple[Encoded, int, int, int]] = []
        whole: list[int] = []
        for place, row in rows:
            if isinstance(row, Malformed):
                shard.refused.append((str(row), place))
                continue
            length = len(row.ids)
            whole.append(length)
            long = length > self.seq_len
            if long and on_long == "drop":
                shard.dropped += 1
                continue
            pieces = list(self._pieces(row, split=on_long == "split"))
            if not pieces:
                shard.unlabelled.append(place)
                continue
            shard.kept += 1
            shard.truncated += long and on_long == "truncate"
            shard.split += long and on_long == "split"
            shard.disguised += row.disguised
            kept += [(row, start, stop, count) for start, stop, count in pieces]
        shard.whole = np.array(whole, np.int32)
        if kept:
            shard.ids = np.concatenate([row.ids[start:stop] for row, start, stop, _ in kept])
            shard.learned = np.concatenate([row.learned[start:stop] for row, start, stop, _ in kept]).astype(np.uint8)
            shard.lengths = np.array([stop - start for _, start, stop, _ in kept], np.int32)
            shard.labelled = np.array([count for *_, count in kept], np.int32)
            same = [place > 0 and kept[place][0] is kept[place - 1][0] for place in range(len(kept))]
            shard.continued = np.array(same, np.bool_)

    def _pieces(self, row: Encoded, *, split: bool) -> Iterator[tuple[int, int, int]]:
        """(start, stop, learned tokens) of each piece of `row` that learns something; without `split` only the first.

        A piece begins with the last token of the one before it: that token predicts the first new one, so none is lost.
        """
        for start in range(0, max(1, len(row.ids) - 1) if split else 1, self.seq_len - 1):
            stop = min(start + self.seq_len, len(row.ids))
            if count := int(np.count_nonzero(row.learned[start + 1 : stop])):
                yield start, stop, count


def _read(record: Record, kind: str) -> Conversation | Passage:
    record = decoded(record)
    if record.problem:
        raise Malformed(record.problem)
    return read_row(record.value, kind)


def beginning(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that this tokenizer puts before a text (Llama's beginning token), without any after it."""
    bare: list[int] = tokenizer("x", add_special_tokens=False)["input_ids"]
    full: list[int] = tokenizer("x", add_special_tokens=True)["input_ids"]
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start]
    return []
