"""Files, folders of them and hub datasets -> conversations, whatever shape their rows have."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dflash_dist.data.files import (
    DESCRIPTIONS,
    LONGEST_ROW,
    SAVED_BY_DATASETS,
    SUFFIXES,
    UNFINISHED,
    BadRow,
    FileSource,
    HubSource,
    Source,
    arrow_files,
)
from dflash_dist.data.keys import (
    BEGUN_KEYS,
    REASONING_KEYS,
    REFUSED_IN_CALL,
    REFUSED_IN_MESSAGE,
    REFUSED_IN_ROW,
    SUPERVISION_KEYS,
    SYSTEM_KEYS,
    THINKING_SWITCHES,
    TOOL_KEYS,
    refused_keys,
    says_nothing,
    unread_in_message,
    unread_in_row,
)

Message = dict[str, Any]
ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
NOTED = 10  # notes of one kind that are said
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
class Rendered:
    """A text that a template already rendered; from character `prompt_length` on the target wrote it."""

    text: str
    prompt_length: int
    finished: bool = True
    unread: tuple[str, ...] = field(default=(), compare=False)


# ------------------------------------------------------------------------------------------------ where rows lie


def find_sources(path: str, passed_over: list[Path] | None = None) -> list[Source]:
    """The file at `path`, the data files of the folder at `path` in order of their names, or the hub dataset of that
    name.

    Args:
        passed_over: takes the files of the folder that end as data does and are none.

    Raises:
        ValueError: there is no such thing, or the folder holds no file of a known kind.
    """
    local = Path(path).expanduser()
    if local.is_dir():
        folder = _Folder()
        try:
            folder.look_into(local)
        except OSError as error:
            raise ValueError(f"data folder {path} cannot be read: {error}") from error
        if not folder.data:
            none = f" but {', '.join(file.name for file in folder.passed_over)}" if folder.passed_over else ""
            raise ValueError(f"data folder {path} holds no file ending in {', '.join(SUFFIXES)}{none}")
        if passed_over is not None:
            passed_over += sorted(folder.passed_over)
        return [FileSource(file) for file in sorted(folder.data)]
    if local.is_file():
        if not local.name.endswith(SUFFIXES):
            raise ValueError(f"data file {path} is of no known kind: its name must end in one of {', '.join(SUFFIXES)}")
        return [FileSource(local)]
    if path.endswith(SUFFIXES) or not HubSource.PATTERN.fullmatch(path):
        raise ValueError(f"data file {path} does not exist")
    return [HubSource(path)]


class _Folder:
    """The data files of a folder and of the folders in it, each once, whatever links lead there."""

    def __init__(self) -> None:
        self.data: list[Path] = []
        self.passed_over: list[Path] = []
        self._seen: set[tuple[int, int]] = set()  # device and inode

    def look_into(self, folder: Path) -> None:
        if self._is_new(folder):
            for path in sorted(folder.iterdir()):
                if path.name.startswith("."):  # of notebooks, of downloads, of macOS
                    continue
                if path.is_dir():
                    if not path.name.startswith("_") and not path.name.endswith(UNFINISHED):
                        self.look_into(path)
                elif path.name.endswith(SUFFIXES):
                    self._add(path)
                    if path.name == SAVED_BY_DATASETS:
                        self.data += filter(self._is_new, arrow_files(path))

    def _add(self, path: Path) -> None:
        if path.name.startswith("_") or (path.suffix == ".json" and _describes(path)):
            self.passed_over.append(path)
        elif self._is_new(path):
            self.data.append(path)

    def _is_new(self, path: Path) -> bool:
        stat = path.stat()  # a link that leads nowhere is an error
        new = (stat.st_dev, stat.st_ino) not in self._seen
        self._seen.add((stat.st_dev, stat.st_ino))
        return new


def _describes(path: Path) -> bool:
    """Whether a file is one object that is no row and holds none. On a single line that could be a bad row, unless it
    is known by its name."""
    if path.stat().st_size > LONGEST_ROW:
        return False
    content = path.read_bytes().strip()
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        return False
    if not isinstance(found, dict) or not (b"\n" in content or path.name in DESCRIPTIONS):
        return False
    inside = [value[0] for value in found.values() if isinstance(value, list) and value]
    return not any(isinstance(row, dict) and _shapes(row) for row in (found, *inside))


# ------------------------------------------------------------------------------------------------ shapes of rows

# shape -> the keys that tell it; where a row has the keys of several, the first counts
SHAPES = {
    "messages": ("messages",),
    "conversations": ("conversations",),
    "text": ("text", "prompt_length"),
    "prompt/response": ("prompt", "response"),
}


def shape_of(row: dict[str, Any]) -> str:
    """Which of SHAPES a row has.

    Raises:
        BadRow: none of them.
    """
    if shapes := _shapes(row):
        return shapes[0]
    expected = "; ".join(" and ".join(f"'{key}'" for key in keys) for keys in SHAPES.values())
    raise BadRow(f"unknown shape: expected {expected}, found the keys {', '.join(sorted(row)) or '(none)'}")


def _shapes(row: dict[str, Any]) -> list[str]:
    return [shape for shape, keys in SHAPES.items() if all(key in row for key in keys)]


def read_row(row: dict[str, Any]) -> Conversation | Rendered:
    """A row of any shape.

    Raises:
        BadRow: naming the field that is wrong.
    """
    finished = row.get("finish_reason") != "length"
    shape = shape_of(row)
    _refuse_keys(row, REFUSED_IN_ROW)
    unread = dict.fromkeys(unread_in_row(row, shape))
    if shape == "text":
        return _rendered(row, finished, tuple(unread))
    if shape == "prompt/response":
        prompt = row["prompt"]
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if not isinstance(turns, list):
            raise BadRow("no prompt: 'prompt' must be text or a list of messages")
        thinking = {key: row[key] for key in REASONING_KEYS if not isinstance(row.get(key), bool) and row.get(key)}
        turns = [*turns, {"role": "assistant", "content": row["response"]} | thinking]
    elif shape == "conversations":
        turns = _from_sharegpt(row["conversations"])
    else:
        turns = row["messages"]
    if not isinstance(turns, list) or not turns:
        raise BadRow(f"no messages: expected a non-empty list under '{shape}'")
    messages = []
    for turn in turns:
        messages.append(_message(turn))
        for key in unread_in_message(turn):
            unread[key] = None
    return Conversation(_with_system(messages, row), _tools(row), finished, _template_args(row), unread=tuple(unread))


def is_context(message: Message) -> bool:
    """Whether an answer is there for what follows only: nobody learns it, and the target does not write it again."""
    return message.get("weight") == 0


def _refuse_keys(values: dict[str, Any], refused: dict[str, str]) -> None:
    for key, reason in refused_keys(values, refused):
        raise BadRow(f"unusable key '{key}': {reason}")


def _rendered(row: dict[str, Any], finished: bool, unread: tuple[str, ...]) -> Rendered:
    text, length = row["text"], row["prompt_length"]
    if not isinstance(text, str):
        raise BadRow("no text: 'text' must be a string")
    if not isinstance(length, int) or isinstance(length, bool) or not 0 <= length < len(text):
        raise BadRow(
            f"wrong prompt_length: it counts the characters before the answer, below {len(text)}, found {length!r}"
        )
    _refuse_broken(text)
    return Rendered(text, length, finished, unread)


def _from_sharegpt(turns: Any) -> list[Any]:
    if not isinstance(turns, list):
        return []
    messages = []
    for turn in turns:
        if isinstance(turn, dict) and "from" in turn:
            role = SHAREGPT_ROLES.get(turn["from"]) if isinstance(turn["from"], str) else None
            if role is None:
                raise BadRow(f"unknown role: {turn['from']!r} is not one of {', '.join(SHAREGPT_ROLES)}")
            said: dict[str, Any] = {"content": turn.get("value")}
            if turn["from"] == "function_call":
                calls = _json(turn.get("value"), "function_call")
                said = {"tool_calls": calls if isinstance(calls, list) else [calls]}
            turn = {key: turn[key] for key in turn.keys() - {"from", "value"}} | {"role": role} | said
        messages.append(turn)
    return messages


def _with_system(messages: list[Message], row: dict[str, Any]) -> list[Message]:
    """The messages behind the system prompt that stands beside them; it may be theirs already."""
    if row.keys().isdisjoint(SYSTEM_KEYS):
        return messages
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
    if row.keys().isdisjoint({"chat_template_kwargs", *THINKING_SWITCHES}):
        return {}
    stated = row.get("chat_template_kwargs") or {}
    if isinstance(stated, str):
        stated = _json(stated, "chat_template_kwargs")
    if not isinstance(stated, dict):
        raise BadRow("wrong chat_template_kwargs: expected an object with the chat template's arguments")
    for text in strings(stated):
        _refuse_broken(text)
    switches = {key: row[key] for key in THINKING_SWITCHES if isinstance(row.get(key), bool)}
    return switches | {key: value for key, value in stated.items() if value is not None}


def _message(raw: Any) -> Message:
    """A message with the fields that templates read, and no others but `weight`: 0 for an answer that is context."""
    if not isinstance(raw, dict) or "role" not in raw:
        raise BadRow("no role: every message needs a 'role' and a 'content'")
    role = "tool" if raw["role"] == "function" else raw["role"]  # OpenAI's older name
    if role not in ROLES:
        raise BadRow(f"unknown role: {role!r} is not one of {', '.join(ROLES)}")
    _refuse_keys(raw, REFUSED_IN_MESSAGE)
    message: Message = {"role": role, "content": _content(raw.get("content"), role)}
    if role == "assistant" and not raw.keys() <= {"role", "content"}:
        message |= _answer(raw)
    for key in ("name", "tool_call_id"):
        if isinstance(raw.get(key), str):
            message[key] = raw[key]
    # A system prompt and a tool's result may be empty; nobody asks or answers nothing.
    if role in ("user", "assistant") and not (
        message["content"].strip() or "tool_calls" in message or "reasoning_content" in message
    ):
        raise BadRow(f"empty content: a message of role {role} says nothing")
    for text in strings(message):
        _refuse_broken(text)
    return message


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
    if not all(_is_supervised(key, raw[key]) for key in SUPERVISION_KEYS if raw.get(key) is not None):
        answer["weight"] = 0
    return answer


def _is_supervised(key: str, value: Any) -> bool:
    if value not in (0, 1):
        raise BadRow(f"wrong {key}: an answer is learned or not, 1 or 0, found {value!r}")
    return bool(value)


def _content(content: Any, role: str) -> str:
    """Text, the text parts of a list in OpenAI's form, or nothing. A line break joins parts, as vLLM does it."""
    if content is None:
        return ""
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        others = {str(part.get("type")) for part in content} - {*TEXT_PARTS}
        if others:
            raise BadRow(f"no text: content of type {', '.join(sorted(others))} in a message of role {role}")
        texts = [part.get("text", "") for part in content]
        content = "\n".join(texts) if all(isinstance(text, str) for text in texts) else None
        if content is None:
            raise BadRow(f"no text: a part of a message of role {role} has none")
    if not isinstance(content, str):
        raise BadRow(f"no text: the content of a message of role {role} is {type(content).__name__}")
    return content


def _tool_call(call: Any) -> dict[str, Any]:
    """`{"type": "function", "function": {"name", "arguments": {...}}}`, as templates expect it.

    Arguments that come as a JSON string, OpenAI's form, are parsed: most templates would quote the string once more.
    """
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadRow("wrong tool call: expected a function with a name and arguments")
    _refuse_keys(function, REFUSED_IN_CALL)
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        arguments = _json(arguments, "arguments of a tool call")
    if not isinstance(arguments, dict):
        raise BadRow("wrong tool call: its arguments must be an object")
    made = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    return made | ({"id": call["id"]} if isinstance(call.get("id"), str) else {})


def _tools(row: dict[str, Any]) -> list[Any] | None:
    """Tool descriptions as engines hand them to templates; columns of text hold them as JSON."""
    found = [tools for key in TOOL_KEYS if (tools := _tool_list(key, row.get(key)))]
    if len(found) > 1 and found[0] != found[1]:
        raise BadRow(f"wrong tools: {' and '.join(map(repr, TOOL_KEYS))} describe different ones")
    for text in strings(found):
        _refuse_broken(text)
    return found[0] if found else None


def _tool_list(key: str, tools: Any) -> list[Any] | None:
    if isinstance(tools, str):
        tools = _json(tools, key) if tools.strip() else None
    if tools is not None and not isinstance(tools, list):
        raise BadRow(f"wrong {key}: expected a list of tool descriptions")
    return [_tool(tool) for tool in tools or []]


def _tool(tool: Any) -> Any:
    """A description under 'function', where older rows have it flat; tools of other types stay as they are."""
    if isinstance(tool, str):
        tool = _json(tool, "tools")
    flat = isinstance(tool, dict) and isinstance(tool.get("name"), str) and tool.get("type") in (None, "function")
    if not flat or "function" in tool:
        return tool
    return {"type": "function", "function": {key: value for key, value in tool.items() if key != "type"}}


def _json(text: Any, what: str) -> Any:
    try:
        return json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise BadRow(f"wrong {what}: not JSON ({error})") from error


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


# Half of a surrogate pair cannot be encoded; NUL ends the text in many a tokenizer.
_BROKEN = re.compile("[\ud800-\udfff\0]")


def _refuse_broken(text: str) -> None:
    if found := _BROKEN.search(text):
        what = "a NUL character" if found[0] == "\0" else "half of a surrogate pair"
        raise BadRow(f"broken text: {what}, which no tokenizer can take")


# ------------------------------------------------------------------------------------------------ small data at once


def read_conversations(
    path: str | Path, max_bad_rows: float = 0, noted: Counter[str] | None = None
) -> Iterator[tuple[int, Conversation]]:
    """The conversations at `path` with their row numbers, counted from 1 over all files; for what is read once.

    Args:
        noted: counts what was assumed of nulls, for `describe_noted`.

    Raises:
        ValueError: nothing is there, or more than `max_bad_rows` rows are bad; names file and row.
    """
    before, found, bad = 0, False, BadRows()
    noted = Counter() if noted is None else noted
    for source in find_sources(str(path)):
        last = 0
        for chunk in source.chunks():
            last = chunk.first + len(chunk.rows) - 1
            for number, row in chunk.parsed(noted):
                try:
                    if isinstance(row, BadRow):
                        raise row
                    conversation = read_row(row)
                    if isinstance(conversation, Rendered):
                        raise BadRow("no messages: an already rendered text cannot be answered")
                except BadRow as error:
                    bad.add(source.name, number, error)
                    bad.refuse_above(max_bad_rows, None)
                    continue
                found = True
                yield before + number, conversation
        before += last
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


class BadRows:
    """Bad rows so far: how many by cause, and the first of them in words."""

    LISTED = 10

    def __init__(self) -> None:
        self.by_cause: dict[str, int] = {}
        self.listed: list[str] = []

    @property
    def count(self) -> int:
        return sum(self.by_cause.values())

    def add(self, source: str, number: int, error: BadRow) -> None:
        self.by_cause[error.cause] = self.by_cause.get(error.cause, 0) + 1
        if len(self.listed) < self.LISTED:
            self.listed.append(f"{source}, row {number}: {error}")

    def merge(self, by_cause: dict[str, int], listed: list[str]) -> None:
        for cause, count in by_cause.items():
            self.by_cause[cause] = self.by_cause.get(cause, 0) + count
        self.listed = [*self.listed, *listed][: self.LISTED]

    def refuse_above(self, limit: float, rows: int | None) -> None:
        """Raises a ValueError that lists the first bad rows if there are more than `limit`: a count, or below 1 a
        share of all `rows`. Without `rows`, only a count can be judged."""
        share = 0 < limit < 1
        if share and rows is None:
            return
        if self.count > (limit * (rows or 0) if share else limit):
            of = f" of {rows:,}" if rows else ""
            raise ValueError(
                f"{self.count} bad rows{of}, where max_bad_rows allows {limit:g}:\n  " + "\n  ".join(self.listed)
            )


def describe_unread(unread: Counter[str]) -> str:
    """Names keys with the numbers of rows that have them."""
    return "keys that nothing reads: " + ", ".join(f"{key} ({count:,} rows)" for key, count in unread.most_common())


def describe_noted(noted: Counter[str]) -> Iterator[str]:
    """What was read otherwise than it stands there, a line a fact, the most frequent ones."""
    for note, count in noted.most_common(NOTED):
        yield f"{count:,} x {note}"
    if len(noted) > NOTED:
        yield f"and {len(noted) - NOTED:,} further notes like these"


def digest(*parts: Any) -> str:
    """A short name for everything that `parts` say."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:24]
