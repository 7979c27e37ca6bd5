"""Raw rows -> conversations, whatever shape the rows have."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dflash_dist.data.account import Account, BadRow
from dflash_dist.data.keys import (
    BEGUN_KEYS,
    REASONING_KEYS,
    REFUSED_IN_CALL,
    REFUSED_IN_MESSAGE,
    REFUSED_IN_ROW,
    SHAPES,
    SUPERVISION_KEYS,
    SYSTEM_KEYS,
    THINKING_SWITCHES,
    TOOL_KEYS,
    refuse_keys,
    says_nothing,
    shapes_of,
    unread_in_message,
    unread_in_row,
)
from dflash_dist.data.sources import find_sources

Message = dict[str, Any]
Spans = list[tuple[int, int]]  # ranges [begin, end), ascending
ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "system": "system",
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "assistant", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
}
TEXT_PARTS = ("text", "input_text", "output_text")


@dataclass(frozen=True)
class Conversation:
    """Messages as chat templates take them, but for the mark of an answer that is context (`is_context`)."""

    messages: list[Message]
    tools: list[Any] | None = None
    finished: bool = True  # False where the last answer was cut by the length limit: its end is not the target's
    template_args: dict[str, Any] = field(default_factory=dict)  # this row's own
    unread: tuple[str, ...] = field(default=(), compare=False)  # keys that might matter and that nothing reads

    @property
    def asked(self) -> list[Message]:
        """What the last answer answers: all messages, without a last one of the assistant."""
        return self.messages[:-1] if self.messages[-1]["role"] == "assistant" else self.messages


@dataclass(frozen=True)
class Text:
    """A rendered conversation, and the ranges of its characters that the assistant wrote."""

    text: str
    answers: Spans
    unread: tuple[str, ...] = field(default=(), compare=False)  # of a row that is a rendered text


def is_context(message: Message) -> bool:
    """Whether an answer is there for what follows only: nobody learns it, and the target does not write it again."""
    return message.get("weight") == 0


# ------------------------------------------------------------------------------------------------ rows


def shape_of(row: Mapping[str, Any]) -> str:
    """Which of SHAPES a row has; one with none of them is a BadRow."""
    if shapes := shapes_of(row):
        return shapes[0]
    expected = "; ".join(" and ".join(f"'{key}'" for key in keys) for keys in SHAPES.values())
    raise BadRow(f"unknown shape: expected {expected}, found the keys {', '.join(sorted(row)) or '(none)'}")


def read_row(row: dict[str, Any] | BadRow) -> Conversation | Text:
    """A row of any shape: a conversation, or a text that a template rendered already. A BadRow names the field that is
    wrong, or is the one that was handed in, of a row that could not be parsed."""
    if isinstance(row, BadRow):
        raise row
    shape = shape_of(row)
    refuse_keys(row, REFUSED_IN_ROW)
    unread = list(unread_in_row(row, shape))
    if shape == "text":
        return _text(row, tuple(unread))
    turns = _turns(row, shape)
    if not isinstance(turns, list) or not turns:
        raise BadRow(f"no messages: expected a non-empty list under '{shape}'")
    messages = []
    for turn in turns:
        messages.append(_message(turn))
        unread += unread_in_message(turn)
    return Conversation(
        _with_system(messages, row),
        _tools(row),
        row.get("finish_reason") != "length",
        _template_args(row),
        tuple(dict.fromkeys(unread)),
    )


def _text(row: dict[str, Any], unread: tuple[str, ...]) -> Text:
    text, length = row["text"], row["prompt_length"]
    if not isinstance(text, str):
        raise BadRow("no text: 'text' must be a string")
    if not isinstance(length, int) or isinstance(length, bool) or not 0 <= length < len(text):
        raise BadRow(
            f"wrong prompt_length: it counts the characters before the answer, below {len(text)}, found {length!r}"
        )
    _refuse_broken(text)
    return Text(text, [(length, len(text))], unread)


def _turns(row: dict[str, Any], shape: str) -> Any:
    """The messages of a row as it has them, under OpenAI's keys."""
    if shape == "messages":
        return row["messages"]
    if shape == "conversations":
        turns = row["conversations"]
        return [_from_sharegpt(turn) for turn in turns] if isinstance(turns, list) else None
    prompt = row["prompt"]
    asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if not isinstance(asked, list):
        raise BadRow("no prompt: 'prompt' must be text or a list of messages")
    thinking = {key: row[key] for key in REASONING_KEYS if not isinstance(row.get(key), bool) and row.get(key)}
    return [*asked, {"role": "assistant", "content": row["response"]} | thinking]


def _from_sharegpt(turn: Any) -> Any:
    if not isinstance(turn, dict) or "from" not in turn:
        return turn
    who, said = turn["from"], turn.get("value")
    if not isinstance(who, str) or who not in SHAREGPT_ROLES:
        raise BadRow(f"unknown role: {who!r} is not one of {', '.join(SHAREGPT_ROLES)}")
    message = {key: value for key, value in turn.items() if key not in ("from", "value")}
    message["role"] = SHAREGPT_ROLES[who]
    if who == "function_call":
        calls = _json(said, "function_call")
        return message | {"tool_calls": calls if isinstance(calls, list) else [calls]}
    return message | {"content": said}


def _with_system(messages: list[Message], row: dict[str, Any]) -> list[Message]:
    """The messages behind the system prompt that stands beside them; it may be theirs already."""
    found = [row[key] for key in SYSTEM_KEYS if not says_nothing(row.get(key))]
    if not found:
        return messages
    prompts = [_message({"role": "system", "content": content}) for content in found]
    if messages[0]["role"] in ("system", "developer"):
        prompts.append(messages[0])
    else:
        messages = [prompts[0], *messages]
    if len({prompt["content"].strip() for prompt in prompts}) > 1:
        raise BadRow("two system prompts: the row has another one beside its turns than it has elsewhere")
    return messages


def _template_args(row: dict[str, Any]) -> dict[str, Any]:
    """The arguments of the chat template that a row was written under."""
    stated = row.get("chat_template_kwargs") or {}
    if isinstance(stated, str):
        stated = _json(stated, "chat_template_kwargs")
    if not isinstance(stated, dict):
        raise BadRow("wrong chat_template_kwargs: expected an object with the chat template's arguments")
    _refuse_broken(stated)
    switches = {key: row[key] for key in THINKING_SWITCHES if isinstance(row.get(key), bool)}
    return switches | {key: value for key, value in stated.items() if value is not None}


# ------------------------------------------------------------------------------------------------ messages


def _message(raw: Any) -> Message:
    """A message with the fields that templates read, and no others but `weight`: 0 for an answer that is context."""
    if not isinstance(raw, dict) or "role" not in raw:
        raise BadRow("no role: every message needs a 'role' and a 'content'")
    role = "tool" if raw["role"] == "function" else raw["role"]  # OpenAI's older name
    if role not in ROLES:
        raise BadRow(f"unknown role: {role!r} is not one of {', '.join(ROLES)}")
    refuse_keys(raw, REFUSED_IN_MESSAGE)
    message: Message = {"role": role, "content": _content(raw.get("content"), role)}
    if role == "assistant":
        message |= _answer(raw)
    message |= {key: raw[key] for key in ("name", "tool_call_id") if isinstance(raw.get(key), str)}
    # A system prompt and a tool's result may be empty; nobody asks or answers nothing.
    if role in ("user", "assistant") and not (
        message["content"].strip() or "tool_calls" in message or "reasoning_content" in message
    ):
        raise BadRow(f"empty content: a message of role {role} says nothing")
    _refuse_broken(message)
    return message


def _content(content: Any, role: str) -> str:
    """Text, the text parts of a list in OpenAI's form, or nothing. A line break joins parts, as vLLM does it."""
    if content is None:
        return ""
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        if others := {str(part.get("type")) for part in content} - {*TEXT_PARTS}:
            raise BadRow(f"no text: content of type {', '.join(sorted(others))} in a message of role {role}")
        texts = [part.get("text", "") for part in content]
        if not all(isinstance(text, str) for text in texts):
            raise BadRow(f"no text: a part of a message of role {role} has none")
        return "\n".join(texts)
    if not isinstance(content, str):
        raise BadRow(f"no text: the content of a message of role {role} is {type(content).__name__}")
    return content


def _answer(raw: dict[str, Any]) -> Message:
    """What only an assistant's message has."""
    answer: Message = {}
    if begun := [key for key in BEGUN_KEYS if raw.get(key)]:
        raise BadRow(f"begun answer: '{begun[0]}' says that the target did not write its beginning")
    reasoning = next((raw[key] for key in REASONING_KEYS if raw.get(key)), None)
    if reasoning is not None:
        if not isinstance(reasoning, str):
            raise BadRow("wrong reasoning: it must be text")
        answer |= {"reasoning_content": reasoning, "thinking": reasoning}
    calls = raw.get("tool_calls") or []
    if not isinstance(calls, list):
        raise BadRow("wrong tool call: 'tool_calls' must be a list")
    if raw.get("function_call"):
        if calls:
            raise BadRow("wrong tool call: a message has both 'tool_calls' and 'function_call'")
        calls = [raw["function_call"]]
    if calls:
        answer["tool_calls"] = [_tool_call(call) for call in calls]
    for key in SUPERVISION_KEYS:
        if raw.get(key) not in (None, 0, 1):
            raise BadRow(f"wrong {key}: an answer is learned or not, 1 or 0, found {raw[key]!r}")
        if raw.get(key) == 0:
            answer["weight"] = 0
    return answer


def _tool_call(call: Any) -> dict[str, Any]:
    """`{"type": "function", "function": {"name", "arguments": {...}}}`, as templates expect it.

    Arguments that come as a JSON string, OpenAI's form, are parsed: most templates would quote the string once more.
    """
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadRow("wrong tool call: expected a function with a name and arguments")
    refuse_keys(function, REFUSED_IN_CALL)
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        arguments = _json(arguments, "arguments of a tool call")
    if not isinstance(arguments, dict):
        raise BadRow("wrong tool call: its arguments must be an object")
    made = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    return made | ({"id": call["id"]} if isinstance(call.get("id"), str) else {})


def _tools(row: dict[str, Any]) -> list[Any] | None:
    """Tool descriptions as engines hand them to templates; columns of text hold them as JSON."""
    found = []
    for key in TOOL_KEYS:
        tools = row.get(key)
        if isinstance(tools, str):
            tools = _json(tools, key) if tools.strip() else None
        if tools is not None and not isinstance(tools, list):
            raise BadRow(f"wrong {key}: expected a list of tool descriptions")
        if tools:
            found.append([_tool(tool) for tool in tools])
    if len(found) > 1 and found[0] != found[1]:
        raise BadRow(f"wrong tools: {' and '.join(map(repr, TOOL_KEYS))} describe different ones")
    _refuse_broken(found)
    return found[0] if found else None


def _tool(tool: Any) -> Any:
    """A description under 'function', where older rows have it flat; tools of other types stay as they are."""
    if isinstance(tool, str):
        tool = _json(tool, "tools")
    flat = isinstance(tool, dict) and isinstance(tool.get("name"), str) and tool.get("type") in (None, "function")
    if not flat or "function" in tool:
        return tool
    return {"type": "function", "function": {key: value for key, value in tool.items() if key != "type"}}


# ------------------------------------------------------------------------------------------------ what is no use


# Half of a surrogate pair cannot be encoded; NUL ends the text in many a tokenizer.
_BROKEN = re.compile("[\ud800-\udfff\0]")


def _refuse_broken(value: Any) -> None:
    for text in strings(value):
        if found := _BROKEN.search(text):
            what = "a NUL character" if found[0] == "\0" else "half of a surrogate pair"
            raise BadRow(f"broken text: {what}, which no tokenizer can take")


def strings(value: Any) -> Iterator[str]:
    """All text in a value as JSON has it, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from strings(item)


def _json(text: Any, what: str) -> Any:
    try:
        return json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise BadRow(f"wrong {what}: not JSON ({error})") from error


# ------------------------------------------------------------------------------------------------ small data at once


def read_conversations(
    path: str | Path, max_bad_rows: float = 0, account: Account | None = None
) -> Iterator[tuple[int, Conversation]]:
    """The conversations at `path` with their row numbers, counted from 1 over all files; for what is read once.

    Args:
        account: takes what was read, and what was assumed of it.

    Raises:
        ValueError: nothing is there, or more than `max_bad_rows` rows are bad; names file and row.
    """
    account = account or Account()
    before, found = 0, False
    for source in find_sources(str(path)):
        account.source = source.name
        for chunk in source.chunks():
            for number, row in chunk.parsed(account.noted):
                try:
                    conversation = read_row(row)
                    if isinstance(conversation, Text):
                        raise BadRow("no messages: an already rendered text cannot be answered")
                except BadRow as error:
                    account.add_bad(number, error)
                    account.refuse_above(max_bad_rows)
                    continue
                account.unread.update(conversation.unread)
                found = True
                yield before + number, conversation
            account.rows += len(chunk.rows)
        before = account.rows
    if not found:
        raise ValueError(f"{path} holds no conversation")


def name_row(path: str | Path, number: int) -> str:
    """File and row in it of a row's number, as `read_conversations` counts."""
    for source in find_sources(str(path)):
        rows = sum(len(chunk.rows) for chunk in source.chunks())
        if number <= rows:
            return f"{source.name}, row {number}"
        number -= rows
    raise AssertionError(f"{path} has no row {number}")
