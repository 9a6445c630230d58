"""Rows of the known formats in one of two forms: a conversation (turns of system, user, assistant and tool) or a passage."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

FORMATS = ("alpaca", "messages", "completion", "text")
"""Values of `data.format` beside "auto"."""

PASSAGES = ("completion", "text")
"""Formats without turns, which need no chat template."""

EXPECTED = (
    'alpaca: "instruction", "input" (may be missing), "output"; messages: "messages" or "conversations"; '
    'completion: "prompt", "completion"; text: "text"'
)

PREFERENCES = (
    'these are preference pairs ("chosen", "rejected"): two answers of which one is liked better, for DPO and its kin; '
    "fine-tuning would learn from neither"
)

ROLES: dict[str, str] = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "model": "assistant", "bot": "assistant", "chatgpt": "assistant",
    "function_call": "call",
    "tool": "tool", "observation": "tool", "function": "tool", "function_response": "tool", "ipython": "tool",
}  # fmt: skip
"""Roles as the ShareGPT, OpenAI and ChatML conventions write them, to ours; "call" is an assistant turn that calls a tool."""

NOT_A_CALL = 'a tool call is not JSON with "name" and "arguments"'

Turn = dict[str, Any]
"""One message as chat templates take it: `role`, `content`, and perhaps `tool_calls`."""


class Malformed(ValueError):
    """One row cannot be used; the text says why, without the row's own values, so that equal causes can be counted."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns that end with an answer, and the tools (JSON schemas of functions) that were on offer."""

    turns: tuple[Turn, ...]
    tools: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class Passage:
    """Plain text without turns: `text` is learned, and the `prompt` before it is not."""

    text: str
    prompt: str = ""


def detect_format(columns: Sequence[str]) -> str:
    """One of `FORMATS`, by the names of the columns.

    Raises:
        Malformed: preference pairs, or columns of no known format.
    """
    names = set(columns)
    if {"chosen", "rejected"} <= names:
        raise Malformed(PREFERENCES)
    if {"prompt", "completion", "label"} <= names:
        raise Malformed('these are rated answers ("prompt", "completion", "label"), for KTO; fine-tuning ignores the rating')
    if names & {"messages", "conversations"}:
        return "messages"
    if {"instruction", "output"} & names:
        return "alpaca"
    if "completion" in names:
        return "completion"
    if "text" in names:
        return "text"
    raise Malformed(f"the columns are of no known format; found: {', '.join(sorted(names)[:12]) or 'none'}")


def read_row(row: Any, kind: str) -> Conversation | Passage:
    """What is learned from one `row`; `kind` is one of `FORMATS`.

    Raises:
        Malformed: fields are missing or of the wrong type, a role is unknown, or there is nothing to learn.
    """
    if kind not in PASSAGES:
        return read_conversation(row, kind)
    if not isinstance(row, Mapping):
        raise Malformed(f"the row is a JSON {_json_type(row)}, not an object")
    missing = [name for name in (("text",) if kind == "text" else ("prompt", "completion")) if name not in row]
    if missing:
        raise Malformed(f"{_fields(missing)} missing; columns found: {', '.join(sorted(map(str, row))[:12]) or 'none'}")
    if kind == "completion" and isinstance(row["prompt"], list):
        turns = [*row["prompt"], *(row["completion"] if isinstance(row["completion"], list) else [])]
        return read_conversation({**row, "messages": turns}, "messages")
    learned = "text" if kind == "text" else "completion"
    text = _text(row, learned)
    if not text.strip():
        raise Malformed(f'field "{learned}" is empty: there is nothing to learn')
    return Passage(text, _text(row, "prompt") if kind == "completion" else "")


def read_conversation(row: Any, kind: str) -> Conversation:
    """The conversation of one `row`; `kind` is "alpaca" or "messages".

    Raises:
        Malformed: fields are missing or of the wrong type, a role is unknown, or there is no answer.
    """
    if not isinstance(row, Mapping):
        raise Malformed(f"the row is a JSON {_json_type(row)}, not an object")
    if row.get("chosen") is not None and row.get("rejected") is not None:
        raise Malformed(PREFERENCES)
    turns = _alpaca_turns(row) if kind == "alpaca" else _message_turns(row)
    system = _text(row, "system", optional=True)
    if system and turns and turns[0]["role"] != "system":
        turns.insert(0, {"role": "system", "content": system})
    while turns and turns[-1]["role"] != "assistant":
        turns.pop()
    if not turns:
        raise Malformed("the conversation has no answer (no assistant turn)")
    if next(turn["role"] for turn in turns if turn["role"] != "system") == "assistant":
        raise Malformed("the conversation begins with an answer; a user turn must come first")
    return Conversation(tuple(turns), _tools(row.get("tools")))


def _alpaca_turns(row: Mapping[str, Any]) -> list[Turn]:
    missing = [name for name in ("instruction", "output") if name not in row]
    if missing:
        raise Malformed(f"{_fields(missing)} missing; columns found: {', '.join(sorted(map(str, row))[:12]) or 'none'}")
    turns: list[Turn] = []
    for pair in row.get("history") or ():
        if not (isinstance(pair, (list, tuple)) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise Malformed('field "history" is not a list of [question, answer] pairs')
        turns += [{"role": "user", "content": _clean(pair[0])}, {"role": "assistant", "content": _clean(pair[1])}]
    question = "\n".join(filter(None, (_text(row, "instruction"), _text(row, "input", optional=True))))
    answer = _text(row, "output")
    if not question.strip():
        raise Malformed('field "instruction" is empty')
    if not answer.strip():
        raise Malformed('field "output" is empty: there is nothing to learn')
    return [*turns, {"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _message_turns(row: Mapping[str, Any]) -> list[Turn]:
    field = next((name for name in ("messages", "conversations") if row.get(name) is not None), None)
    if field is None:
        found = ", ".join(sorted(map(str, row))[:12]) or "none"
        raise Malformed(f'field "messages" (or "conversations") missing; columns found: {found}')
    if not isinstance(row[field], Sequence) or isinstance(row[field], str):
        raise Malformed(f'field "{field}" is a JSON {_json_type(row[field])}, not a list of turns')
    return [_turn(message, field) for message in row[field]]


def _turn(message: Any, field: str) -> Turn:
    if not isinstance(message, Mapping):
        raise Malformed(f'field "{field}" has a turn that is a JSON {_json_type(message)}, not an object')
    speaker = message.get("role", message.get("from"))
    if not isinstance(speaker, str):
        raise Malformed(f'field "{field}" has a turn without "role" (or "from")')
    role = ROLES.get(speaker.lower())
    if role is None:
        raise Malformed(f'field "{field}" has a turn of the unknown role {speaker[:40]!r}; known are {", ".join(ROLES)}')
    calls = message.get("tool_calls") or []
    content = _content(message.get("content", message.get("value")), field, optional=bool(calls))
    if role == "call":
        return {"role": "assistant", "content": "", "tool_calls": _calls(content)}
    if role == "assistant" and not content.strip() and not calls:
        raise Malformed(f'field "{field}" has an empty answer')
    turn: Turn = {"role": role, "content": content}
    if calls:
        turn["tool_calls"] = _calls(json.dumps(calls))
    if isinstance(reasoning := message.get("reasoning_content"), str):
        turn["reasoning_content"] = _clean(reasoning)
    return turn


def _content(value: Any, field: str, *, optional: bool) -> str:
    """Text of a turn: a string, or a list of text parts as OpenAI's format has them."""
    if value is None and optional:
        return ""
    if isinstance(value, str):
        return _clean(value)
    if isinstance(value, Sequence) and all(isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in value):
        return _clean("".join(part["text"] for part in value))
    raise Malformed(f'field "{field}" has a turn whose content is a JSON {_json_type(value)}, not text')


def _calls(text: str) -> list[dict[str, Any]]:
    """Tool calls in the form that chat templates take, from the JSON of one call or of a list of them."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    listed = [value] if isinstance(value, Mapping) else value
    if not isinstance(listed, list) or not listed:
        raise Malformed(NOT_A_CALL)
    return [_call(item) for item in listed]


def _call(item: Any) -> dict[str, Any]:
    function = item.get("function", item) if isinstance(item, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise Malformed(NOT_A_CALL)
    return {"type": "function", "function": {"name": function["name"], "arguments": _arguments(function)}}


def _arguments(call: Mapping[str, Any]) -> Any:
    """The arguments as an object; OpenAI's format carries them as JSON inside a string."""
    arguments = call.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            return json.loads(arguments)
        except (ValueError, RecursionError):
            return arguments
    return arguments


def _tools(value: Any) -> tuple[dict[str, Any], ...]:
    """Function schemas from a list, or from the JSON text of one; each wrapped as {"type": "function", "function": ...}."""
    if value is None or value == "":
        return ()
    try:
        tools = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError) as error:
        raise Malformed('field "tools" is not JSON') from error
    if not isinstance(tools, Sequence) or not all(isinstance(tool, Mapping) for tool in tools):
        raise Malformed('field "tools" is not a list of function schemas')
    return tuple(dict(tool) if "function" in tool else {"type": "function", "function": dict(tool)} for tool in tools)


def _text(row: Mapping[str, Any], name: str, *, optional: bool = False) -> str:
    value = row.get(name)
    if value is None and optional:
        return ""
    if not isinstance(value, str):
        raise Malformed(f'field "{name}" is a JSON {_json_type(value)}, not text')
    return _clean(value)


def _clean(text: str) -> str:
    """`text` itself. A lone surrogate (half an emoji, from a careless cut) has no UTF-8 form, and tokenizers refuse it."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise Malformed("the text holds half a surrogate pair, which is not valid Unicode") from error
    return text


def _fields(names: Sequence[str]) -> str:
    quoted = " and ".join(f'"{name}"' for name in names)
    return f"field {quoted}" if len(names) == 1 else f"fields {quoted}"


def _json_type(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, (int, float)):
        return "number"
    if isinstance(value, str):
        return "string"
    return "object" if isinstance(value, Mapping) else "list"
