"""Files and hub datasets -> conversations, whatever shape their rows have.

A source is a JSONL file (plain, .gz or .zst), a JSON array, a Parquet file, a folder of these, or a split of a Hugging
Face dataset. Its rows come in chunks of raw bytes or Arrow tables, which other processes can parse.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

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
TEXT_PARTS = ("text", "input_text", "output_text")

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json", ".json.gz", ".json.zst", ".parquet")
CHUNK_ROWS = 512
CHUNK_BYTES = 8 << 20
LONGEST_ROW = 4 << 20  # [bytes]; a million tokens: no packed row holds that, and it is most often a broken export


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


class BadRow(ValueError):
    """A row that cannot be used; the text up to the first colon is the cause under which it is counted."""

    @property
    def cause(self) -> str:
        return str(self).split(":")[0]


# ------------------------------------------------------------------------------------------------ where rows lie


@dataclass(frozen=True)
class Chunk:
    """Consecutive rows of a source, not parsed yet."""

    first: int  # number of the first row, from 1
    rows: list[bytes | None] | pa.Table  # lines, None for one that is too long; or an Arrow table

    def parsed(self) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
        """Row numbers with rows, or with what is wrong with them. Blank lines count but give nothing."""
        if isinstance(self.rows, pa.Table):
            for number, row in enumerate(self.rows.to_pylist(), self.first):
                yield number, _without_nulls(row)
            return
        for number, line in enumerate(self.rows, self.first):
            if line is None or line.strip():
                try:
                    yield number, _parse_line(line)
                except BadRow as error:
                    yield number, error


@dataclass(frozen=True)
class FileSource:
    path: Path

    @property
    def name(self) -> str:
        return str(self.path)

    def identity(self) -> str:
        """Changes when the file does."""
        stat = self.path.stat()
        return f"{self.path.resolve()} {stat.st_size} {stat.st_mtime_ns}"

    def chunks(self) -> Iterator[Chunk]:
        try:
            if self.path.suffix == ".parquet":
                yield from _parquet_chunks(self.path)
            else:
                yield from _line_chunks(self.path)
        except (OSError, pa.ArrowInvalid) as error:
            raise ValueError(f"{self.path} cannot be read to its end: {error}") from error


@dataclass(frozen=True)
class HubSource:
    """A split of a Hugging Face dataset: `org/name[/subset][:split][@revision]`."""

    name: str

    PATTERN = re.compile(
        r"(?P<id>[\w.-]+/[\w.-]+)(/(?P<subset>[\w.-]+))?(:(?P<split>[^@]+))?(@(?P<revision>[\w./-]+))?"
    )

    def identity(self) -> str:
        return f"{self.name} {self._dataset()._fingerprint}"

    def chunks(self) -> Iterator[Chunk]:
        first = 1
        for table in self._dataset().with_format("arrow").iter(CHUNK_ROWS):
            yield Chunk(first, table)
            first += table.num_rows

    def _dataset(self) -> Any:
        import datasets  # slow to import, and only needed here

        parts = self.PATTERN.fullmatch(self.name)
        assert parts, f"find_sources made a hub source of {self.name}"
        try:
            return datasets.load_dataset(
                parts["id"], parts["subset"], split=parts["split"] or "train", revision=parts["revision"]
            )
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise ValueError(
                f"{self.name} is neither a file or folder here nor a dataset that the hub gives: {error}"
            ) from error


Source = FileSource | HubSource


def find_sources(path: str) -> list[Source]:
    """The file at `path`, the files of the folder at `path` in order of their names, or the hub dataset of that name.

    Raises:
        ValueError: there is no such thing, or the folder holds no file of a known kind.
    """
    local = Path(path).expanduser()
    if local.is_dir():
        files = sorted(file for file in local.rglob("*") if file.name.endswith(SUFFIXES) and file.is_file())
        if not files:
            raise ValueError(f"data folder {path} holds no file ending in {', '.join(SUFFIXES)}")
        return [FileSource(file) for file in files]
    if local.is_file():
        if not local.name.endswith(SUFFIXES):
            raise ValueError(f"data file {path} is of no known kind: its name must end in one of {', '.join(SUFFIXES)}")
        return [FileSource(local)]
    if path.endswith(SUFFIXES) or not HubSource.PATTERN.fullmatch(path):
        raise ValueError(f"data file {path} does not exist")
    return [HubSource(path)]


def _line_chunks(path: Path) -> Iterator[Chunk]:
    compression = {".gz": "gzip", ".zst": "zstd"}.get(path.suffix)
    with pa.input_stream(str(path), compression=compression) as stream, io.BufferedReader(stream, 1 << 20) as lines:
        if lines.peek(64).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"[" and ".json" in path.suffixes:
            yield from _array_chunks(path, lines)
            return
        number, first, size, rows = 0, 1, 0, []
        while line := lines.readline(LONGEST_ROW + 2):
            number += 1
            too_long = len(line.rstrip(b"\n")) > LONGEST_ROW
            rows.append(None if too_long else line)
            size += len(line)
            while too_long and line and not line.endswith(b"\n"):
                line = lines.readline(LONGEST_ROW)
            if len(rows) == CHUNK_ROWS or size > CHUNK_BYTES:
                yield Chunk(first, rows)
                first, size, rows = number + 1, 0, []
        if rows:
            yield Chunk(first, rows)


def _array_chunks(path: Path, stream: io.BufferedReader) -> Iterator[Chunk]:
    """A JSON array, as ShareGPT is published: read whole, since nothing marks its rows."""
    try:
        rows = iter(json.load(stream))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} begins as a JSON array but is not one: {error}") from error
    for first in itertools.count(1, CHUNK_ROWS):
        lines: list[bytes | None] = [json.dumps(row).encode() for row in itertools.islice(rows, CHUNK_ROWS)]
        if not lines:
            return
        yield Chunk(first, lines)


def _parquet_chunks(path: Path) -> Iterator[Chunk]:
    first = 1
    with pa.parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(CHUNK_ROWS):
            yield Chunk(first, pa.Table.from_batches([batch]))
            first += batch.num_rows


def _without_nulls(value: Any) -> Any:
    """Arrow gives every struct the keys of all structs in its column; those that a row does not have are null."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


def _parse_line(line: bytes | None) -> dict[str, Any]:
    if line is None:
        raise BadRow(f"too long: above {LONGEST_ROW >> 20} MiB")
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise BadRow(f"not UTF-8: {error}") from error
    except (ValueError, RecursionError) as error:
        raise BadRow(f"malformed JSON: {error}") from error
    if not isinstance(row, dict):
        raise BadRow(f"no object: expected {{...}}, found {type(row).__name__}")
    return row


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
    for shape, keys in SHAPES.items():
        if all(key in row for key in keys):
            return shape
    expected = "; ".join(" and ".join(f"'{key}'" for key in keys) for keys in SHAPES.values())
    raise BadRow(f"unknown shape: expected {expected}, found the keys {', '.join(sorted(row)) or '(none)'}")


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
        unread.update(dict.fromkeys(unread_in_message(turn)))
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
    for text in _strings(stated):
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
    if role == "assistant":
        message |= _answer(raw)
    for key in ("name", "tool_call_id"):
        if isinstance(raw.get(key), str):
            message[key] = raw[key]
    # A system prompt and a tool's result may be empty; nobody asks or answers nothing.
    if role in ("user", "assistant") and not (
        message["content"].strip() or "tool_calls" in message or "reasoning_content" in message
    ):
        raise BadRow(f"empty content: a message of role {role} says nothing")
    for text in _strings(message):
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
    for text in _strings(found):
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


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


# Half of a surrogate pair cannot be encoded; NUL ends the text in many a tokenizer.
_BROKEN = re.compile("[\ud800-\udfff\0]")


def _refuse_broken(text: str) -> None:
    if found := _BROKEN.search(text):
        what = "a NUL character" if found[0] == "\0" else "half of a surrogate pair"
        raise BadRow(f"broken text: {what}, which no tokenizer can take")


# ------------------------------------------------------------------------------------------------ small data at once


def read_conversations(path: str | Path, max_bad_rows: float = 0) -> Iterator[tuple[int, Conversation]]:
    """The conversations at `path` with their row numbers, counted from 1 over all files; for what is read once.

    Raises:
        ValueError: nothing is there, or more than `max_bad_rows` rows are bad; names file and row.
    """
    before, found, bad = 0, False, BadRows()
    for source in find_sources(str(path)):
        last = 0
        for chunk in source.chunks():
            last = chunk.first + len(chunk.rows) - 1
            for number, row in chunk.parsed():
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


def digest(*parts: Any) -> str:
    """A short name for everything that `parts` say."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:24]
