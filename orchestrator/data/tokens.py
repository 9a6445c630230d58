"""Texts as token ids: in batches, with a mask by characters, and with the names of special tokens kept plain on demand."""

from __future__ import annotations

import copy
import json
import re
import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ids = npt.NDArray[np.int32]
Mask = npt.NDArray[np.bool_]
Span = tuple[int, int]
"""Characters [start, stop) of a text."""

UNKNOWN_WIDTH = -(1 << 40)
"""Width of an id that stands for no certain bytes: the sum over a text with it can equal no length."""


class Speller:
    """A tokenizer without its own additions: nothing is put before or after a text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._backend: Any = tokenizer.backend_tokenizer
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        names = {str(token): number for number, token in added.items() if token.special}
        self.special: dict[str, int] = names
        listed = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
        self.pattern: re.Pattern[str] | None = re.compile(listed) if names else None
        self._widths, self._composes = _widths(tokenizer)
        self._plain: Any = None

    def spell(self, texts: Sequence[str], *, plain: bool = False) -> list[Ids]:
        """The ids of each text; `plain`: what reads like a special token is spelt as any other text."""
        backend = self._plain_backend() if plain else self._backend
        encoded = backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(each.ids, dtype=np.int32) for each in encoded]

    def mark(self, text: str, ids: Ids, spans: Sequence[Span], *, plain: bool = False) -> Mask:
        """Whether each token of `text` covers a character of one of `spans`.

        Where each id stands for certain bytes (byte-level vocabularies) the tokens tile the text, and their places are sums;
        elsewhere the tokenizer is asked again, with offsets, which is slower.
        """
        if not spans:
            return np.zeros(len(ids), dtype=np.bool_)
        altered = self._composes and not unicodedata.is_normalized("NFC", text)
        stops = np.cumsum(self._widths[ids]) if self._widths is not None and not altered else np.zeros(0)
        if not len(stops) or stops[-1] != len(text.encode()):
            return self._mark_by_offsets(text, spans, plain)
        edges = spans if text.isascii() else [(len(text[:a].encode()), len(text[:b].encode())) for a, b in spans]
        mask = np.zeros(len(ids), dtype=np.bool_)
        for start, stop in edges:
            mask[np.searchsorted(stops, start, side="right") : np.searchsorted(stops, stop, side="left") + 1] = True
        return mask

    def _mark_by_offsets(self, text: str, spans: Sequence[Span], plain: bool) -> Mask:
        backend = self._plain_backend() if plain else self._backend
        encoded = backend.encode(text, add_special_tokens=False)
        covered = _covered(encoded.offsets, encoded.tokens)
        return np.array(
            [any(start < last and first < stop for start, stop in spans) for first, last in covered], dtype=np.bool_
        )

    def _plain_backend(self) -> Any:
        """The tokenizer that knows no special tokens, and puts no blank before a text, which may be the middle of one."""
        if self._plain is None:
            from tokenizers import Tokenizer

            state = json.loads(self._backend.to_str())
            state["normalizer"] = _without_prepend(state.get("normalizer"))
            state["pre_tokenizer"] = _never_prepending(state.get("pre_tokenizer"))
            self._plain = Tokenizer.from_str(json.dumps(state))
            self._plain.no_padding()
            self._plain.no_truncation()
            self._plain.encode_special_tokens = True
        return self._plain


def _widths(tokenizer: PreTrainedTokenizerBase) -> tuple[npt.NDArray[np.int64] | None, bool]:
    """(the bytes that each id stands for, None where the vocabulary is not one of bytes; whether text is composed to NFC)."""
    backend: Any = tokenizer.backend_tokenizer
    state = json.loads(backend.to_str())
    composes = (state.get("normalizer") or {}).get("type") == "NFC"
    bytewise = '"ByteLevel"' in json.dumps(state.get("decoder")) and '"ByteLevel"' in json.dumps(state.get("pre_tokenizer"))
    if not bytewise or (state.get("normalizer") and not composes):
        return None, composes
    vocabulary = backend.get_vocab(with_added_tokens=True)
    widths = np.full(max(vocabulary.values(), default=0) + 1, UNKNOWN_WIDTH, dtype=np.int64)
    for token, number in vocabulary.items():
        widths[number] = len(token)  # byte-level vocabularies write each byte as one letter
    for number, added in tokenizer.added_tokens_decoder.items():
        widths[number] = UNKNOWN_WIDTH if added.lstrip or added.rstrip else len(str(added).encode())
    return widths, composes


def _without_prepend(normalizer: Any) -> Any:
    if isinstance(normalizer, dict) and normalizer.get("type") == "Sequence":
        kept = [each for each in normalizer["normalizers"] if each.get("type") != "Prepend"]
        return {**normalizer, "normalizers": kept} if kept else None
    return None if isinstance(normalizer, dict) and normalizer.get("type") == "Prepend" else normalizer


def _never_prepending(splitter: Any) -> Any:
    state = copy.deepcopy(splitter)
    parts = state.get("pretokenizers", [state]) if isinstance(state, dict) else []
    for part in parts:
        if part.get("type") == "Metaspace":
            part["prepend_scheme"] = "never"
        if part.get("type") == "ByteLevel":
            part["add_prefix_space"] = False
    return state


def _covered(offsets: Sequence[Span], tokens: Sequence[str]) -> list[Span]:
    """The characters of each token, with the white space that some tokenizers (Llama 3's) trim from their offsets.

    A token of white space alone has an empty range there: its own length tells how far it reaches.
    """
    covered: list[Span] = []
    reached = 0
    for (first, last), token in zip(offsets, tokens, strict=True):
        start = min(first, reached)
        stop = last if first < last else start + len(token)
        covered.append((start, stop))
        reached = max(reached, stop)
    return covered
