"""Conversations as token ids, with a mask of what is learned: the answers and the token that ends each of them."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.data.conversation import Conversation, Malformed, Turn
from orchestrator.errors import DataError, Fault

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GENERATION_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")

CHATML = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' }}"
    "{%- if message['role'] == 'assistant' %}"
    "{% generation %}{{- message['content'] + eos_token }}{% endgeneration %}{{- '\\n' }}"
    "{%- else %}{{- message['content'] + eos_token + '\\n' }}{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
"""ChatML in which the tokenizer's own end token ends a turn, so that the end is one real token in any vocabulary."""

ALPACA = (
    "{%- for message in messages %}"
    "{%- if message['role'] == 'assistant' %}{{- '### Response:\\n' }}"
    "{% generation %}{{- message['content'] + eos_token }}{% endgeneration %}{{- '\\n\\n' }}"
    "{%- elif message['role'] == 'system' %}{{- message['content'] + '\\n\\n' }}"
    "{%- else %}{{- '### Instruction:\\n' + message['content'] + '\\n\\n' }}{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '### Response:\\n' }}{%- endif %}"
)
"""The headings of Stanford Alpaca's prompts (github.com/tatsu-lab/stanford_alpaca), without its preamble."""

BUILT_IN: dict[str, str] = {"chatml": CHATML, "alpaca": ALPACA}
"""Templates that `data.chat_template` can name."""

REMEDY = "set data.chat_template to chatml, alpaca or a template file"

Span = tuple[int, int]
"""Characters [start, stop) of a rendered conversation."""

PROBE_QUESTION, PROBE_ANSWER = "ping", "pong"


@dataclass(frozen=True, slots=True)
class Chat:
    """A tokenizer with its template. `end` is the id of the token that ends an answer; `closes`: the template writes it."""

    tokenizer: PreTrainedTokenizerBase
    template: str
    end: int
    closes: bool

    @property
    def marked(self) -> bool:
        """Whether the template says itself which text is generated."""
        return bool(GENERATION_MARKER.search(self.template))

    def encode(self, conversation: Conversation) -> tuple[list[int], list[bool]]:
        """Token ids, and for each whether it is learned.

        Raises:
            Malformed: the template refuses the conversation, or its answers cannot be located in the text.
        """
        turns, tools = self._fit(conversation)
        text, spans = self._marked_spans(turns, tools) if self.marked else self._located_spans(turns, tools)
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids: list[int] = list(encoded["input_ids"])
        covered = _covered(encoded["offset_mapping"], list(self.tokenizer.convert_ids_to_tokens(ids)))
        mask = [any(start < last and first < stop for start, stop in spans) for first, last in covered]
        if not self.closes:
            ids.append(self.end)
            mask.append(True)
        return ids, self._end_runs(ids, mask)

    def _fit(self, conversation: Conversation) -> tuple[list[Turn], list[dict[str, Any]]]:
        """Turns and tools as this template can show them: what it has no word for is carried as plain text, never lost."""
        turns = [dict(turn) for turn in conversation.turns]
        tools = list(conversation.tools)
        if "tool" not in self.template:
            for turn in turns:
                turn["role"] = "user" if turn["role"] == "tool" else turn["role"]
        if "tool_calls" not in self.template:
            for turn in turns:
                calls = [json.dumps(call["function"], ensure_ascii=False) for call in turn.pop("tool_calls", ())]
                turn["content"] = "\n".join(filter(None, [turn["content"], *calls]))
        if tools and not re.search(r"\btools\b", self.template):
            text = "Tools that can be called:\n" + "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
            if turns[0]["role"] == "system":
                turns[0]["content"] = f"{turns[0]['content']}\n\n{text}"
            else:
                turns.insert(0, {"role": "system", "content": text})
            tools = []
        return turns, tools

    def _render(self, turns: list[Turn], tools: list[dict[str, Any]], **options: Any) -> tuple[str, list[Span]]:
        """The text, and the characters that the template marks as generated if `return_assistant_tokens_mask` is given.

        This is the half of `apply_chat_template` before tokens. Its other half reads the marks through `char_to_token`,
        which knows no token for white space that a tokenizer trims from its offsets, and then marks all that follows
        (transformers 5.23, tokenization_utils_base.py).
        """
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        words = {name: str(token) for name, token in self.tokenizer.special_tokens_map.items() if token}
        render: Any = render_jinja_template
        try:
            texts, marks = render([turns], tools=tools or None, chat_template=self.template, **words, **options)
        except (TemplateError, TypeError, KeyError, ValueError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise Malformed(f"the chat template refuses the conversation: {reason[:160]}") from error
        return texts[0], [(start, stop) for start, stop in (marks[0] if marks else ()) if start < stop]

    def _marked_spans(self, turns: list[Turn], tools: list[dict[str, Any]]) -> tuple[str, list[Span]]:
        return self._render(turns, tools, return_assistant_tokens_mask=True)

    def _located_spans(self, turns: list[Turn], tools: list[dict[str, Any]]) -> tuple[str, list[Span]]:
        """For a template without markers: what each answer adds to the rendered text."""
        text, _ = self._render(turns, tools)
        return text, [self._span(text, turns, tools, index) for index, turn in enumerate(turns) if turn["role"] == "assistant"]

    def _span(self, text: str, turns: list[Turn], tools: list[dict[str, Any]], index: int) -> Span:
        """Characters [start, stop) of `text` that the answer `turns[index]` adds after the prompt for it.

        The prompt may end in more than the whole conversation shows there (an empty thought, say): what both have in
        common is prompt, the rest is answer.
        """
        before, _ = self._render(turns[:index], tools)
        until, _ = self._render(turns[: index + 1], tools)
        if not (text.startswith(until) and until.startswith(before)):
            raise Malformed("the chat template rewrites earlier turns, so that the answers cannot be located")
        prompt, _ = self._render(turns[:index], tools, add_generation_prompt=True)
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(prompt, until, strict=False)))
        return max(shared, len(before)), len(until)

    def _end_runs(self, ids: list[int], mask: list[bool]) -> list[bool]:
        """`mask` in which every run of learned tokens stops exactly at the end token: it is taken in where the run stops
        just before it, and line breaks that the template writes after it are left out."""
        exact = list(mask)
        stop = 0
        while True in mask[stop:]:
            start = mask.index(True, stop)
            stop = mask.index(False, start) if False in mask[start:] else len(mask)
            ends = [place for place in range(start, stop) if ids[place] == self.end]
            if stop < len(ids) and ids[stop] == self.end:
                exact[stop] = True
            elif ends:
                exact[ends[-1] + 1 : stop] = [False] * (stop - ends[-1] - 1)
        return exact


def _covered(offsets: list[Span], tokens: list[str]) -> list[Span]:
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


def resolve_template(choice: str | None, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of the template: `choice` (a name of `BUILT_IN` or a file), else the tokenizer's own.

    Raises:
        DataError: there is none, or the file cannot be read.
    """
    if choice in BUILT_IN:
        return BUILT_IN[choice]
    if choice:
        try:
            return Path(choice).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise DataError(Fault("data.chat_template", f"{choice} cannot be read: {reason}", REMEDY)) from error
    try:
        return str(tokenizer.get_chat_template())
    except ValueError as error:
        problem = f"the tokenizer {tokenizer.name_or_path or type(tokenizer).__name__} has no chat template"
        raise DataError(Fault("data.chat_template", problem, REMEDY)) from error


def open_chat(tokenizer: PreTrainedTokenizerBase, template: str) -> Chat:
    """A `Chat` that has shown on a question and an answer of one word that it learns the answer and its end alone.

    Raises:
        DataError: the template or the tokenizer cannot be used for learning answers.
    """
    if not tokenizer.is_fast:
        problem = f"{type(tokenizer).__name__} does not tell where in the text its tokens lie"
        raise DataError(Fault("data.tokenizer", problem, "use a tokenizer with a tokenizer.json"))
    eos = tokenizer.eos_token_id
    if eos is None:
        raise DataError(Fault("data.tokenizer", "the tokenizer has no end token (eos)", "name one in tokenizer_config.json"))
    turns = ({"role": "user", "content": PROBE_QUESTION}, {"role": "assistant", "content": PROBE_ANSWER})
    probe = Chat(tokenizer, template, eos, True)
    try:
        end = _written_end(probe, list(turns))
        chat = Chat(tokenizer, template, eos if end is None else end, end is not None)
        ids, mask = chat.encode(Conversation(turns))
    except Malformed as error:
        raise DataError(Fault("data.chat_template", str(error), REMEDY)) from error
    learned = tokenizer.decode([token for token, flag in zip(ids, mask, strict=True) if flag])
    if PROBE_ANSWER not in learned or PROBE_QUESTION in learned:
        problem = f"of a one-word question and answer the template marks {learned[:60]!r} as the answer"
        raise DataError(Fault("data.chat_template", problem, REMEDY))
    return chat


def _written_end(probe: Chat, turns: list[Turn]) -> int | None:
    """Id of the first special token that the template writes after an answer; None: it writes none."""
    text, _ = probe._render(turns, [])
    _, found, tail = text.rpartition(PROBE_ANSWER)
    if not found:
        raise Malformed("the chat template does not show the answer")
    special = {*probe.tokenizer.added_tokens_decoder, *probe.tokenizer.all_special_ids}
    ids = probe.tokenizer(tail, add_special_tokens=False)["input_ids"]
    return next((token for token in ids if token in special), None)
