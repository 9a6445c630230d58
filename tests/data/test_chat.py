"""Chat templates: what is learned under each kind, and which are refused."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator.data import choose_pad_id, load_tokenizer, prepare
from orchestrator.data.chat import BUILT_IN, open_chat, resolve_template
from orchestrator.data.conversation import Conversation, Malformed
from orchestrator.data.tokenizer import SAMPLE
from orchestrator.errors import DataError
from orchestrator.spec import Data

UNMARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED_WITHOUT_END = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}{% endgeneration %}"
    "{% else %}{{ m['content'] }}{% endif %}"
    "<|im_end|>\n{% endfor %}"
)
MARKED_WITH_BREAK = MARKED_WITHOUT_END.replace("{% endgeneration %}", "<|im_end|>\n{% endgeneration %}").replace(
    "<|im_end|>\n{% endfor %}", "{% if m['role'] != 'assistant' %}<|im_end|>\n{% endif %}{% endfor %}"
)
WITHOUT_END = (
    "{% for m in messages %}{{ m['role'] }}:\n{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:\n{% endif %}"
)
THINKING_PROMPT = UNMARKED.replace("assistant\n{% endif %}", "assistant\n<think>\n\n</think>\n\n{% endif %}")
REWRITING = UNMARKED.replace("{{ m['content'] }}", "{{ m['content'] if loop.last else m['content'] | upper }}")
ALTERNATING = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + UNMARKED

TWO_ANSWERS = Conversation(
    (
        {"role": "user", "content": "What is a noun?"},
        {"role": "assistant", "content": "A word."},
        {"role": "user", "content": "A word."},
        {"role": "assistant", "content": "Yes, 日本!"},
    )
)


def learned(tokenizer: Any, template: str, conversation: Conversation = TWO_ANSWERS) -> list[str]:
    """The learned runs of the conversation, as text."""
    encoded = open_chat(tokenizer, template).encode(conversation)
    ids, mask = encoded.ids.tolist(), encoded.learned.tolist()
    runs: list[list[int]] = []
    for place, (token, flag) in enumerate(zip(ids, mask, strict=True)):
        if flag and (place == 0 or not mask[place - 1]):
            runs.append([])
        if flag:
            runs[-1].append(token)
    return [tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize(
    "template",
    [UNMARKED, MARKED_WITHOUT_END, MARKED_WITH_BREAK, THINKING_PROMPT, BUILT_IN["chatml"], BUILT_IN["alpaca"], None],
    ids=["unmarked", "marked without end", "marked with line break", "thinking prompt", "chatml", "alpaca", "own"],
)
def test_each_answer_and_its_end_token_is_learned_and_no_more(tokenizer: Any, template: str | None) -> None:
    assert learned(tokenizer, template or tokenizer.chat_template) == ["A word.<|im_end|>", "Yes, 日本!<|im_end|>"]


def test_the_end_token_is_added_where_the_template_writes_none(tokenizer: Any) -> None:
    assert learned(tokenizer, WITHOUT_END) == ["A word.\n", "Yes, 日本!\n<|im_end|>"]


@pytest.mark.parametrize("template", [UNMARKED, MARKED_WITHOUT_END, MARKED_WITH_BREAK])
def test_white_space_at_the_edges_of_an_answer_is_learned_under_trimmed_offsets(tokenizer: Any, template: str) -> None:
    """Llama 3's tokenizer leaves white space out of its offsets, which misleads transformers' own mask."""
    from tokenizers import processors

    trimming = copy.deepcopy(tokenizer)
    trimming.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    assert trimming("a b", return_offsets_mapping=True)["offset_mapping"][1] == (2, 3)
    answers = (" one two ", "\n\nthree four\n\n")
    conversation = Conversation(
        tuple(
            turn for text in answers for turn in ({"role": "user", "content": "x y "}, {"role": "assistant", "content": text})
        )
    )
    assert learned(trimming, template, conversation) == [f"{text}<|im_end|>" for text in answers]


def test_marked_and_located_masks_agree(tokenizer: Any) -> None:
    answer = "{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}{{ '\\n' }}"
    branch = "{% if m['role'] == 'assistant' %}" + answer + "{% else %}{{ m['content'] + '<|im_end|>\\n' }}{% endif %}"
    marked = UNMARKED.replace("{{ m['content'] }}<|im_end|>\n", branch)
    one, other = open_chat(tokenizer, marked), open_chat(tokenizer, UNMARKED)
    assert one.marked
    assert not other.marked
    marked, located = one.encode(TWO_ANSWERS), other.encode(TWO_ANSWERS)
    assert marked.ids.tolist() == located.ids.tolist()
    assert marked.learned.tolist() == located.learned.tolist()


def test_tools_are_told_in_words_where_the_template_knows_none(tokenizer: Any) -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    conversation = Conversation(
        (
            {"role": "user", "content": "1+1"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "2"},
            {"role": "assistant", "content": "Two."},
        ),
        ({"type": "function", "function": {"name": "add"}},),
    )
    ids = open_chat(tokenizer, UNMARKED).encode(conversation).ids
    text = tokenizer.decode(ids)
    assert text.startswith('<|im_start|>system\nTools that can be called:\n{"name": "add"}<|im_end|>')
    assert "<|im_start|>user\n2<|im_end|>" in text
    assert learned(tokenizer, UNMARKED, conversation) == ['{"name": "add", "arguments": {"a": 1}}<|im_end|>', "Two.<|im_end|>"]


def test_a_template_that_rewrites_earlier_turns_refuses_the_row(tokenizer: Any) -> None:
    chat = open_chat(tokenizer, UNMARKED)
    assert chat.encode(TWO_ANSWERS)
    rewriting = type(chat)(tokenizer, REWRITING, chat.end, chat.closes)
    with pytest.raises(Malformed, match="rewrites earlier turns"):
        rewriting.encode(TWO_ANSWERS)


def test_a_refusal_of_the_template_itself_is_passed_on(tokenizer: Any) -> None:
    conversation = Conversation(({"role": "system", "content": "Be brief."}, *TWO_ANSWERS.turns))
    with pytest.raises(Malformed, match="the chat template refuses the conversation: System role not supported"):
        open_chat(tokenizer, ALTERNATING).encode(conversation)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{% for m in messages %}{{ m['role'] }}{% endfor %}", "does not show the answer"),
        ("{% for m in messages %}", "refuses the conversation"),
        ("{% generation %}{% for m in messages %}{{ m['content'] }}{% endfor %}{% endgeneration %}", "marks 'pingpong"),
        ("{% generation %}{% endgeneration %}{% for m in messages %}{{ m['content'] }}{% endfor %}", "as the answer"),
    ],
)
def test_a_template_that_cannot_teach_answers_is_refused(tokenizer: Any, template: str, expected: str) -> None:
    with pytest.raises(DataError) as caught:
        open_chat(tokenizer, template)
    assert expected in str(caught.value)
    assert "set data.chat_template to chatml, llama3, alpaca or a template file" in str(caught.value)


def test_a_tokenizer_without_template_needs_a_choice(tmp_path: Path, tokenizer: Any) -> None:
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    bare.save_pretrained(tmp_path)
    data = Data(None, 128, tokenizer=str(tmp_path))
    with pytest.raises(DataError, match="has no chat template") as caught:
        prepare(data, load_tokenizer(data, None), 0, tmp_path / "cache")
    assert "set data.chat_template to chatml or alpaca, whose tokens this tokenizer has, or to a template file" in str(
        caught.value
    )
    with pytest.raises(DataError, match=r"llama3 ends a turn with <\|eot_id\|>, which .* does not know"):
        load_tokenizer(replace(data, chat_template="llama3"), None)
    for choice in ("chatml", "alpaca"):
        assert load_tokenizer(replace(data, chat_template=choice), None).chat_template == BUILT_IN[choice]


def test_the_turns_of_llama_3_end_with_its_own_token(tokenizer: Any) -> None:
    other = copy.deepcopy(tokenizer)
    names = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    other.add_special_tokens({"additional_special_tokens": names})
    assert learned(other, BUILT_IN["llama3"]) == ["A word.<|eot_id|>", "Yes, 日本!<|eot_id|>"]


def test_template_files_are_read(tmp_path: Path, tokenizer: Any) -> None:
    bare = copy.deepcopy(tokenizer)
    (tmp_path / "mine.jinja").write_text(UNMARKED)
    assert resolve_template(str(tmp_path / "mine.jinja"), bare) == UNMARKED
    with pytest.raises(DataError, match=r"nowhere\.jinja cannot be read: No such file"):
        resolve_template(str(tmp_path / "nowhere.jinja"), bare)


def test_a_tokenizer_without_an_end_token_is_refused(tokenizer: Any) -> None:
    endless = copy.deepcopy(tokenizer)
    endless.eos_token = None
    with pytest.raises(DataError, match="no end token"):
        open_chat(endless, UNMARKED)


def test_a_tokenizer_that_tells_no_places_is_refused() -> None:
    from transformers import ByT5Tokenizer

    with pytest.raises(DataError, match="does not tell where in the text its tokens lie"):
        open_chat(ByT5Tokenizer(), UNMARKED)


def test_the_pad_id_never_changes_the_vocabulary(tokenizer: Any) -> None:
    other = copy.deepcopy(tokenizer)
    assert choose_pad_id(other) == other.pad_token_id
    other.pad_token = None
    assert choose_pad_id(other) == other.eos_token_id
    other.eos_token = None
    assert choose_pad_id(other) == 0
    assert len(other) == 2048


def test_the_tokenizer_comes_from_the_data_then_the_model_then_the_package(tmp_path: Path, tokenizer: Any) -> None:
    tokenizer.save_pretrained(tmp_path / "model")
    assert load_tokenizer(Data(None, 128), None).name_or_path == str(SAMPLE)
    assert load_tokenizer(Data(None, 128), str(tmp_path / "model")).name_or_path == str(tmp_path / "model")
    assert load_tokenizer(Data(None, 128, tokenizer=str(SAMPLE)), str(tmp_path / "model")).name_or_path == str(SAMPLE)


def test_a_missing_tokenizer_names_its_key(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"model\.path: the folder .*nowhere does not exist") as caught:
        load_tokenizer(Data(None, 128), str(tmp_path / "nowhere"))
    assert "set data.tokenizer" in str(caught.value)
    with pytest.raises(DataError, match=r"data\.tokenizer: no tokenizer can be loaded from .*: it has no tokenizer\.json \(it"):
        load_tokenizer(Data(None, 128, tokenizer=str(tmp_path)), None)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match=r"data\.tokenizer: no tokenizer can be loaded from .*: (?!it has no)"):
        load_tokenizer(Data(None, 128, tokenizer=str(tmp_path)), None)
