"""File formats and row formats: the same rows give the same samples, whatever carries them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from orchestrator.data import Prepared, load_tokenizer, prepare
from orchestrator.data.conversation import Conversation, Malformed, read_conversation
from orchestrator.data.records import CHUNK, read_records
from orchestrator.errors import DataError
from orchestrator.spec import Data

ROWS = [{"instruction": f"Say {i}", "input": "now" if i % 2 else "", "output": f"It is {i}."} for i in range(1500)]


def write_json(path: Path) -> None:
    path.write_text(json.dumps(ROWS, indent=1), encoding="utf-8")


def write_compact(path: Path) -> None:
    path.write_text("\ufeff" + json.dumps(ROWS), encoding="utf-8")


def write_lines(path: Path) -> None:
    path.write_text("\n\n".join(json.dumps(row) for row in ROWS), encoding="utf-8")


def write_parquet(path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=700)


def write_arrow_file(path: Path) -> None:
    table = pa.Table.from_pylist(ROWS)
    with pa.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=600)


def write_arrow_stream(path: Path) -> None:
    table = pa.Table.from_pylist(ROWS)
    with pa.ipc.new_stream(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=600)


CARRIERS: list[tuple[str, Callable[[Path], None]]] = [
    ("a.json", write_json),
    ("b.json", write_compact),
    ("c.json", write_lines),
    ("d.jsonl", write_lines),
    ("e.parquet", write_parquet),
    ("f.arrow", write_arrow_file),
    ("g.arrow", write_arrow_stream),
]


@pytest.mark.parametrize(("name", "write"), CARRIERS, ids=[name for name, _ in CARRIERS])
def test_every_carrier_gives_the_same_rows(name: str, write: Callable[[Path], None], tmp_path: Path) -> None:
    write(tmp_path / name)
    assert [record.value for record in read_records(tmp_path / name)] == ROWS


def test_the_same_rows_in_every_carrier_give_the_same_samples(tmp_path: Path, prepared_file: Callable[..., Prepared]) -> None:
    results = []
    for name, write in CARRIERS[2:6]:
        write(tmp_path / name)
        prepared = prepared_file(tmp_path / name)
        assert prepared.report.format == "alpaca"
        results.append([ids.tolist() for ids in prepared.input_ids])
    assert len(results[0]) == 1500
    assert all(result == results[0] for result in results)


def test_lines_of_list_elements_and_elements_larger_than_a_chunk(tmp_path: Path) -> None:
    rows = [{"a": "x" * (CHUNK + 10)}, [1, {"b": None}], 12.5, "é\n", {"c": "y" * 3 * CHUNK}]
    path = tmp_path / "large.json"
    path.write_text(json.dumps(rows, indent=2, ensure_ascii=False), encoding="utf-8")
    records = list(read_records(path))
    assert [record.value for record in records] == rows
    text = path.read_text(encoding="utf-8").split("\n")
    assert [text[record.place - 1].strip()[:1] for record in records] == ["{", "[", "1", '"', "{"]


def test_an_empty_list_has_no_rows(tmp_path: Path) -> None:
    (tmp_path / "empty.json").write_text(" [ ] \n", encoding="utf-8")
    assert list(read_records(tmp_path / "empty.json")) == []


@pytest.mark.parametrize("indent", [None, 1])
def test_a_list_cut_anywhere_is_refused_as_truncated(tmp_path: Path, indent: int | None) -> None:
    whole = json.dumps([{"q": 'a "b"', "n": [1, -2.5e3, True, None]}, {"x": "\u00e9\ud83d\ude00"}], indent=indent)
    path = tmp_path / "cut.json"
    for length in range(1, len(whole)):
        path.write_text(whole[:length], encoding="utf-8")
        with pytest.raises(DataError) as caught:
            list(read_records(path))
        text = str(caught.value)
        assert "truncated" in text or "is not valid JSON: line" in text
        assert str(path) in text


def turns(row: dict[str, Any]) -> list[tuple[str, str]]:
    return [(turn["role"], turn["content"]) for turn in read_conversation(row, "messages").turns]


def test_sharegpt_and_openai_roles_mean_the_same() -> None:
    sharegpt = {
        "system": "Be brief.",
        "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}, {"from": "human", "value": "?"}],
    }
    openai = {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]},
            {"role": "assistant", "content": "Hello"},
        ]
    }
    assert turns(sharegpt) == turns(openai) == [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello")]


def test_tool_turns_of_both_conventions_mean_the_same() -> None:
    function = {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}
    sharegpt = {
        "conversations": [
            {"from": "human", "value": "1+1"},
            {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1, "b": 1}}'},
            {"from": "observation", "value": "2"},
            {"from": "gpt", "value": "Two."},
        ],
        "tools": json.dumps([function]),
    }
    call = {"type": "function", "id": "x", "function": {"name": "add", "arguments": '{"a": 1, "b": 1}'}}
    openai = {
        "messages": [
            {"role": "user", "content": "1+1"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "2"},
            {"role": "assistant", "content": "Two."},
        ],
        "tools": [{"type": "function", "function": function}],
    }
    assert read_conversation(sharegpt, "messages") == read_conversation(openai, "messages")


def test_alpaca_history_and_system_become_turns() -> None:
    row = {"instruction": "c", "output": "d", "history": [["a", "b"]], "system": "s"}
    roles = [(turn["role"], turn["content"]) for turn in read_conversation(row, "alpaca").turns]
    assert roles == [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]


HI, YO = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}

REFUSED: list[tuple[str, Any, str]] = [
    ("alpaca", ["a"], "the row is a JSON list, not an object"),
    ("alpaca", {"instruction": "a"}, 'field "output" missing; columns found: instruction'),
    ("alpaca", {"prompt": "a"}, 'fields "instruction" and "output" missing; columns found: prompt'),
    ("alpaca", {"instruction": 3, "output": "b"}, 'field "instruction" is a JSON number, not text'),
    ("alpaca", {"instruction": "a", "output": None}, 'field "output" is a JSON null, not text'),
    ("alpaca", {"instruction": "a", "input": True, "output": "b"}, 'field "input" is a JSON boolean, not text'),
    ("alpaca", {"instruction": "a", "output": " "}, 'field "output" is empty: there is nothing to learn'),
    ("alpaca", {"instruction": "", "output": "b"}, 'field "instruction" is empty'),
    ("alpaca", {"instruction": "a", "output": "b", "history": ["x"]}, 'field "history" is not a list of [question, answer]'),
    ("alpaca", {"instruction": "a", "output": "\ud83d"}, "half a surrogate pair"),
    ("messages", {"text": "a"}, 'field "messages" (or "conversations") missing; columns found: text'),
    ("messages", {"messages": "a"}, 'field "messages" is a JSON string, not a list of turns'),
    ("messages", {"messages": []}, "the conversation has no answer"),
    ("messages", {"messages": [HI]}, "the conversation has no answer"),
    ("messages", {"messages": [YO]}, "the conversation begins with an answer"),
    ("messages", {"messages": ["hi"]}, 'field "messages" has a turn that is a JSON string, not an object'),
    ("messages", {"messages": [{"content": "hi"}]}, 'field "messages" has a turn without "role" (or "from")'),
    ("messages", {"messages": [{"role": "cat", "content": "hi"}]}, "a turn of the unknown role 'cat'; known are system,"),
    ("messages", {"messages": [{"role": "user", "content": 3}]}, "a turn whose content is a JSON number, not text"),
    ("messages", {"messages": [HI, {"role": "assistant", "content": ""}]}, 'field "messages" has an empty answer'),
    ("messages", {"messages": [HI, {"role": "function_call", "content": "add(1)"}]}, "a tool call is not JSON"),
    ("messages", {"messages": [HI, {"role": "function_call", "content": "[3]"}]}, "a tool call is not JSON"),
    ("messages", {"messages": [HI, YO], "tools": "["}, 'field "tools" is not JSON'),
    ("messages", {"messages": [HI, YO], "tools": "3"}, 'field "tools" is not a list of function schemas'),
]


@pytest.mark.parametrize(("kind", "row", "expected"), REFUSED, ids=[expected[:40] for *_, expected in REFUSED])
def test_rows_that_cannot_be_used_say_why(kind: str, row: Any, expected: str) -> None:
    with pytest.raises(Malformed) as caught:
        read_conversation(row, kind)
    assert expected in str(caught.value)


def test_real_alpaca_and_tool_call_files_prepare(shared_data: Path, shared_tokenizer_path: Path, tmp_path: Path) -> None:
    for name, kind, rows in (("alpaca_en_demo", "alpaca", 999), ("glaive_toolcall_en_demo", "messages", 300)):
        data = Data(str(shared_data / f"{name}.json"), seq_len=8192, tokenizer=str(shared_tokenizer_path))
        tokenizer = load_tokenizer(data, None)
        prepared = prepare(data, tokenizer, 0, tmp_path)
        assert (prepared.report.format, prepared.report.rows, prepared.report.kept) == (kind, rows, rows)
        source = json.loads((shared_data / f"{name}.json").read_text(encoding="utf-8"))
        for row in range(0, rows, 10):
            check_answers(tokenizer, prepared, row, read_conversation(source[row], kind))


def check_answers(tokenizer: Any, prepared: Prepared, row: int, conversation: Conversation) -> None:
    """Every answer is learned whole, each ended by the end token, and nothing else is."""
    pieces = "".join(
        tokenizer.decode([token]) if label != -100 else "\0"
        for token, label in zip(prepared.input_ids[row], prepared.labels[row], strict=True)
    )
    ids = [token for token, label in zip(prepared.input_ids[row], prepared.labels[row], strict=True) if label != -100]
    answers = [turn for turn in conversation.turns if turn["role"] == "assistant"]
    assert pieces.count("<|im_end|>") == len([run for run in pieces.split("\0") if run]) == len(answers)
    learned = tokenizer.decode(ids).split("<|im_end|>")
    for answer, text in zip(answers, learned, strict=False):
        for call in answer.get("tool_calls", ()):
            assert f'<tool_call>\n{{"name": "{call["function"]["name"]}"' in text
        assert text == answer["content"].lstrip("\n") or answer.get("tool_calls")


def test_real_preference_pairs_are_refused(shared_data: Path, prepared_file: Callable[..., Prepared]) -> None:
    for kind in ("auto", "messages"):
        with pytest.raises(DataError, match=r"preference pairs .*: two answers of which one is liked better"):
            prepared_file(shared_data / "dpo_en_demo.json", format=kind)
