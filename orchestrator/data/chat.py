"""Conversations as token ids, with a mask of what is learned: the answers and the token that ends each of them."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from orchestrator.data.conversation import Conversation, Malformed, Turn
from orchestrator.data.disguise import hide, holds_name, spell_hidden
from orchestrator.data.tokens import Ids, Mask, Span, Speller
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

LLAMA3 = (
    "{{- bos_token }}{%- for message in messages %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{%- if message['role'] == 'assistant' %}"
    "{% generation %}{{- message['content'] + '<|eot_id|>' }}{% endgeneration %}"
    "{%- else %}{{- message['content'] + '<|eot_id|>' }}{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)
"""The turns of Llama 3 (llama.com/docs/model-cards-and-prompt-formats/meta-llama-3), without tools."""

BUILT_IN: dict[str, str] = {"chatml": CHATML, "llama3": LLAMA3, "alpaca": ALPACA}
"""Templates that `data.chat_template` can name."""

ENDS = {"llama3": "<|eot_id|>"}
"""The token that ends a turn, where a built-in template brings its own: spelt in pieces it would end nothing."""

NEEDED: dict[str, tuple[str, ...]] = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "alpaca": (),
}
"""The tokens of each built-in template: where one is missing, that word is spelt in pieces."""

REWRITES = "the chat template rewrites earlier turns, so that the answers cannot be located"

REMEDY = "set data.chat_template to chatml, llama3, alpaca or a template file"

PROBE_QUESTION, PROBE_ANSWER = "ping", "pong"


@lru_cache(maxsize=2)
def speller_of(tokenizer: PreTrainedTokenizerBase) -> Speller:
    """The speller of `tokenizer`; making one reads the whole vocabulary."""
    return Speller(tokenizer)


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """Token ids, whether each is learned, and whether the names of special tokens in the words were kept as plain text."""

    ids: Ids
    learned: Mask
    disguised: bool = False


@dataclass(frozen=True, slots=True)
class _Script:
    """A conversation as the template writes it, with the characters that are learned."""

    text: str
    spans: list[Span]
    disguised: bool


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

    def encode(self, conversation: Conversation) -> Encoded:
        """The conversation as tokens.

        Raises:
            Malformed: the template refuses the conversation, or its answers cannot be located in the text.
        """
        (encoded,) = self.encode_all([conversation])
        if isinstance(encoded, Malformed):
            raise encoded
        return encoded

    def encode_all(self, conversations: Sequence[Conversation]) -> list[Encoded | Malformed]:
        """Each conversation as tokens, or why it cannot be; together, since a tokenizer is faster on many texts."""
        speller = speller_of(self.tokenizer)
        scripts = [self._script(conversation, speller) for conversation in conversations]
        usual = [script for script in scripts if isinstance(script, _Script) and not script.disguised]
        spelt = iter(speller.spell([script.text for script in usual]))
        found: list[Encoded | Malformed] = []
        for script in scripts:
            if isinstance(script, Malformed):
                found.append(script)
                continue
            if script.disguised:
                ids, mask = spell_hidden(speller, script.text, script.spans)
            else:
                ids = next(spelt)
                mask = speller.mark(script.text, ids, script.spans)
            found.append(self._closed(ids, mask, script.disguised))
        return found

    def _script(self, conversation: Conversation, speller: Speller) -> _Script | Malformed:
        try:
            turns, tools = self._fit(conversation)
            disguised = speller.pattern is not None and holds_name([turns, tools], speller.pattern)
            if disguised:
                turns, tools = hide(turns, speller), hide(tools, speller)
            text, spans = self._marked_spans(turns, tools) if self.marked else self._located_spans(turns, tools)
        except Malformed as error:
            return error
        return _Script(text, spans, disguised)

    def _closed(self, ids: Ids, mask: Mask, disguised: bool) -> Encoded:
        if not self.closes:
            ids, mask = np.append(ids, np.int32(self.end)), np.append(mask, True)
        return Encoded(ids, self._end_runs(ids, mask), disguised)

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
        except (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RecursionError) as error:
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
        until = text if index + 1 == len(turns) else self._render(turns[: index + 1], tools)[0]
        if not text.startswith(until):
            raise Malformed(REWRITES)
        prompt, _ = self._render(turns[:index], tools, add_generation_prompt=True)
        if until.startswith(prompt):  # nearly always
            return len(prompt), len(until)
        before, _ = self._render(turns[:index], tools)
        if not until.startswith(before):
            raise Malformed(REWRITES)
        shared = next((at for at, (one, other) in enumerate(zip(prompt, until, strict=False)) if one != other), len(until))
        return max(shared, len(before)), len(until)

    def _end_runs(self, ids: Ids, mask: Mask) -> Mask:
        """`mask` in which every run of learned tokens stops exactly at the end token: it is taken in where the run stops
        just before it, and line breaks that the template writes after it are left out."""
        exact = mask.copy()
        edges = np.flatnonzero(np.diff(mask, prepend=False, append=False))
        for start, stop in edges.reshape(-1, 2):
            ends = np.flatnonzero(ids[start:stop] == self.end)
            if stop < len(ids) and ids[stop] == self.end:
                exact[stop] = True
            elif len(ends):
                exact[start + ends[-1] + 1 : stop] = False
        return exact


def resolve_template(choice: str | None, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of the template: `choice` (a name of `BUILT_IN` or a file), else the tokenizer's own.

    Raises:
        DataError: there is none, or the file cannot be read.
    """
    if choice in BUILT_IN:
        if (end := ENDS.get(choice)) is not None and end not in tokenizer.get_vocab():
            problem = f"{choice} ends a turn with {end}, which {tokenizer.name_or_path or 'the tokenizer'} does not know"
            raise DataError(Fault("data.chat_template", problem, _offer(tokenizer)))
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
        raise DataError(Fault("data.chat_template", problem, _offer(tokenizer))) from error


def _offer(tokenizer: PreTrainedTokenizerBase) -> str:
    """Which templates fit this tokenizer."""
    known = tokenizer.get_vocab()
    fitting = [name for name, tokens in NEEDED.items() if all(token in known for token in tokens)]
    return f"set data.chat_template to {' or '.join(fitting)}, whose tokens this tokenizer has, or to a template file"


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
        encoded = chat.encode(Conversation(turns))
    except Malformed as error:
        raise DataError(Fault("data.chat_template", str(error), REMEDY)) from error
    taught = encoded.ids[encoded.learned]
    learned = tokenizer.decode(taught)
    if PROBE_ANSWER not in learned or PROBE_QUESTION in learned:
        problem = f"of a one-word question and answer the template marks {learned[:60]!r} as the answer"
        raise DataError(Fault("data.chat_template", problem, REMEDY))
    if chat.end not in taught:
        problem = f"of the answer {learned[:60]!r} no end token is learned, so the model would never stop"
        raise DataError(Fault("data.chat_template", problem, REMEDY))
    begin = tokenizer.bos_token_id
    if begin is not None and encoded.ids[:2].tolist() == [begin, begin]:
        problem = f"the template writes the beginning token {tokenizer.bos_token!r} twice"
        raise DataError(Fault("data.chat_template", problem, f"take one out of the template, or {REMEDY}"))
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
