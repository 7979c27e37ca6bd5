from __future__ import annotations

import dataclasses
import gzip
import io
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from dflash_dist.data import sources
from dflash_dist.data.account import BadRow
from dflash_dist.data.conversations import Conversation, Text, read_conversations, read_row
from dflash_dist.data.sources import FileSource, HubSource, find_sources
from tests.data.files import chat, chats, write_rows


def numbered(path: Path | str) -> list[tuple[int, Any]]:
    """Row numbers with rows, or with the cause for which a row is bad; over all files."""
    chunks = [chunk for source in find_sources(str(path)) for chunk in source.chunks()]
    parsed = [pair for chunk in chunks for pair in chunk.parsed(Counter())]
    return [(number, row.cause if isinstance(row, BadRow) else row) for number, row in parsed]


def parquet(rows: list[dict[str, Any]]) -> bytes:
    columns = {key: [row.get(key) for row in rows] for row in rows for key in row}
    file = io.BytesIO()
    pa.parquet.write_table(pa.table(columns), file)
    return file.getvalue()


def zstd(content: bytes) -> bytes:
    return pa.compress(content, codec="zstd", asbytes=True)


# ------------------------------------------------------------------------------------------------ files and folders

ROWS = [{"text": f"row {number} \u00e9\u2028", "prompt_length": number} for number in range(1, 6)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
ARRAY = json.dumps(ROWS, indent=2).encode()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        pytest.param("rows.jsonl", LINES, id="lines"),
        pytest.param("rows.jsonl", LINES.rstrip(b"\n"), id="lines, the last without an end"),
        pytest.param("rows.jsonl", LINES.replace(b"\n", b"\r\n"), id="lines of Windows"),
        pytest.param("rows.jsonl.gz", gzip.compress(LINES), id="gzip"),
        pytest.param("rows.jsonl.gz", gzip.compress(LINES[:7]) + gzip.compress(LINES[7:]), id="gzip in two parts"),
        pytest.param("rows.jsonl.zst", zstd(LINES), id="Zstandard"),
        pytest.param("rows.jsonl.zst", zstd(LINES[:7]) + zstd(LINES[7:]), id="Zstandard in two parts"),
        pytest.param("rows.json", LINES, id="lines in .json"),
        pytest.param("rows.json", ARRAY, id="array"),
        pytest.param("rows.json.gz", gzip.compress(ARRAY), id="array, gzip"),
        pytest.param("rows.json.zst", zstd(ARRAY), id="array, Zstandard"),
        pytest.param("rows.parquet", parquet(ROWS), id="Parquet"),
    ],
)
def test_every_kind_of_file_gives_its_rows(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert numbered(tmp_path / name) == list(enumerate(ROWS, 1))


def test_a_folder_gives_all_its_files_in_order_of_their_names(tmp_path):
    (tmp_path / "b" / "deeper").mkdir(parents=True)
    write_rows(tmp_path / "c.jsonl", [{"from": "c"}])
    write_rows(tmp_path / "b/deeper/z.json", [{"from": "b/deeper/z"}])
    write_rows(tmp_path / "b/a.jsonl", [{"from": "b/a"}])
    (tmp_path / "a.parquet").write_bytes(parquet([{"from": "a"}]))
    (tmp_path / "README.md").write_text("about the data")
    assert [row["from"] for _, row in numbered(tmp_path)] == ["a", "b/a", "b/deeper/z", "c"]


NOTES = {"description": "", "features": {"messages": [{"role": {"dtype": "string"}}]}, "splits": ["train"]}


def test_what_lies_in_a_folder_beside_its_data_is_no_data(tmp_path):
    """Hidden files and what notebooks, downloads, macOS, Spark and `datasets` leave there."""
    write_rows(tmp_path / "rows.jsonl", [{"from": "rows"}])
    others = [".rows.jsonl", "._rows.jsonl", ".ipynb_checkpoints/rows-checkpoint.jsonl", ".cache/huggingface/x.json"]
    others += ["b/.git/x.json", "__MACOSX/rows.jsonl", "_temporary/0/part-0.jsonl", "_committed.json"]
    others += ["rows.jsonl.partial", "rows.jsonl~", "answers.jsonl.parts/rank-00000.jsonl", "x.incomplete/a.jsonl"]
    for name in others:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write_rows(tmp_path / name, [{"from": name}])
    for name in ("dataset_info.json", "b/dataset_infos.json", "dataset_dict.json"):
        (tmp_path / name).write_text(json.dumps(NOTES))
    for name in ("about.json", "answers.jsonl.settings.json"):
        (tmp_path / name).write_text(json.dumps(NOTES, indent=2))
    assert numbered(tmp_path) == [(1, {"from": "rows"})]
    passed_over: list[Path] = []
    find_sources(str(tmp_path), passed_over)
    names = ["_committed.json", "about.json", "answers.jsonl.settings.json", "b/dataset_infos.json"]
    assert passed_over == [tmp_path / name for name in (*names, "dataset_dict.json", "dataset_info.json")]
    assert numbered(tmp_path / "_committed.json") == [(1, {"from": "_committed.json"})], "named, it is data"
    assert numbered(tmp_path / ".cache") == [(1, {"from": ".cache/huggingface/x.json"})]


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(json.dumps(chats(1)[0], indent=2), id="one row"),
        pytest.param(json.dumps({"rows": chats(2)}, indent=2), id="rows inside an object"),
        pytest.param(json.dumps({"prompt": "q", "answer": "a"}), id="one row of unknown shape"),
        pytest.param('{"messages": [\n', id="a row that was cut"),
        pytest.param("{}\n{}\n", id="two rows"),
        pytest.param("[]", id="no rows"),
        pytest.param('{"_data_files": [{"name": "x"}]}\n{}', id="rows that name files"),
        pytest.param("[" * 20_000, id="nested too deeply"),
    ],
)
def test_whatever_could_be_data_is_data(tmp_path, content):
    """Else rows would be lost without a word."""
    for name in ("rows.json", "state.json"):  # the one that `datasets` has, too
        (tmp_path / name).write_text(content)
    by_name = content.startswith('{"prompt"')  # known to be no row where `datasets` calls it so
    expected = ["rows.json"] if by_name else ["rows.json", "state.json"]
    assert find_sources(str(tmp_path)) == [FileSource(tmp_path / name) for name in expected]


def test_a_file_counts_once_whatever_links_lead_to_it(tmp_path):
    data, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    (data / "sub").mkdir(parents=True)
    elsewhere.mkdir()
    write_rows(data / "sub/rows.jsonl", [{"from": "sub"}])
    write_rows(elsewhere / "far.jsonl", [{"from": "far"}])
    (data / "a.jsonl").symlink_to(data / "sub/rows.jsonl")
    os.link(data / "sub/rows.jsonl", data / "z.jsonl")
    (data / "again").symlink_to(data / "sub")
    (data / "loop").symlink_to(data)
    (data / "further").symlink_to(elsewhere)
    assert [row["from"] for _, row in numbered(data)] == ["sub", "far"]


def test_a_link_that_leads_nowhere_is_refused(tmp_path):
    write_rows(tmp_path / "a.jsonl", chats(1))
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "absent.jsonl")
    with pytest.raises(ValueError, match=r"data folder .* cannot be read: .*b\.jsonl"):
        find_sources(str(tmp_path))


def test_a_folder_of_descriptions_alone_is_refused_and_names_them(tmp_path):
    (tmp_path / "dataset_info.json").write_text(json.dumps(NOTES))
    with pytest.raises(ValueError, match=r"holds no file ending in .* but dataset_info\.json"):
        find_sources(str(tmp_path))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("absent.jsonl", r"data file .*absent\.jsonl does not exist"),
        ("absent", r"data file .*absent does not exist"),
        ("rows.csv", r"data file .*rows\.csv is of no known kind: its name must end in one of \.jsonl, "),
        ("empty", r"data folder .*empty holds no file ending in \.jsonl, "),
    ],
)
def test_a_path_without_data_is_refused(tmp_path, path, message):
    (tmp_path / "rows.csv").write_text("a,b\n")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=message):
        find_sources(str(tmp_path / path))


@pytest.mark.parametrize("missing", [1, 5, 40])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.jsonl.gz", gzip.compress(LINES)),
        ("rows.jsonl.zst", zstd(LINES)),
        ("rows.json.gz", gzip.compress(ARRAY)),
        ("rows.parquet", parquet(ROWS)),
    ],
    ids=["gzip", "Zstandard", "array", "Parquet"],
)
def test_a_file_that_ends_early_is_named(tmp_path, name, content, missing):
    (tmp_path / name).write_bytes(content[:-missing])
    with pytest.raises(ValueError, match=rf"{name} cannot be read to its end"):
        numbered(tmp_path / name)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b'[{"text": 1}', id="no end"),
        pytest.param(b'[{"text": 1}]]', id="two ends"),
        pytest.param(b'["\xff"]', id="not UTF-8"),
        pytest.param(b"[" + b"1" * 5000 + b"]", id="a number too long to read"),  # defect reported
        pytest.param(b"[" * 20_000 + b"]" * 20_000, id="nested too deeply"),  # defect reported
    ],
)
def test_a_broken_array_is_named(tmp_path, content):
    (tmp_path / "rows.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"rows\.json begins as a JSON array but is not one"):
        numbered(tmp_path / "rows.json")


def test_blank_lines_are_rows_without_content(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", ["", ROWS[0], " \t", "\r", ROWS[1], ""])
    assert numbered(path) == [(2, ROWS[0]), (5, ROWS[1])]


def test_only_a_line_feed_ends_a_row(tmp_path):
    row = {"text": "a\u2028b\u2029c\u0085d\u000be"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n\r" + json.dumps(row) + "\r\n")
    assert numbered(tmp_path / "rows.jsonl") == [(1, row), (2, row)]


@pytest.mark.parametrize(
    ("name", "content"),
    [("rows.jsonl", LINES), ("rows.json", ARRAY), ("rows.parquet", parquet(ROWS))],
    ids=["lines", "array", "Parquet"],
)
def test_rows_are_numbered_over_all_chunks(tmp_path, monkeypatch, name, content):
    monkeypatch.setattr(sources, "CHUNK_ROWS", 2)
    (tmp_path / name).write_bytes(content)
    assert [(chunk.first, len(chunk.rows)) for chunk in FileSource(tmp_path / name).chunks()] == [
        (1, 2),
        (3, 2),
        (5, 1),
    ]
    assert numbered(tmp_path / name) == list(enumerate(ROWS, 1))


def test_a_chunk_of_long_rows_has_fewer_of_them(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "CHUNK_BYTES", 2 * len(json.dumps(ROWS[0])))
    path = write_rows(tmp_path / "rows.jsonl", ROWS)
    assert [(chunk.first, len(chunk.rows)) for chunk in FileSource(path).chunks()] == [(1, 2), (3, 2), (5, 1)]
    assert numbered(path) == list(enumerate(ROWS, 1))


@pytest.mark.parametrize("length", [101, 199, 200, 201, 202, 1000])
def test_a_row_that_is_too_long_is_bad_and_the_next_one_is_read(tmp_path, monkeypatch, length):
    monkeypatch.setattr(sources, "LONGEST_ROW", 100)
    path = write_rows(tmp_path / "rows.jsonl", [ROWS[0], "x" * length, ROWS[1], "x" * length])
    expected = [(1, ROWS[0]), (2, "too long"), (3, ROWS[1]), (4, "too long")]
    assert numbered(path) == expected
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    assert numbered(path) == expected


def test_a_row_of_five_megabytes_is_too_long_and_one_of_three_is_not(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{"text": "x" * 5_000_000}, {"text": "y" * 3_000_000}, ROWS[0]])
    assert numbered(path) == [(1, "too long"), (2, {"text": "y" * 3_000_000}), (3, ROWS[0])]


@pytest.mark.parametrize(
    ("line", "cause"),
    [
        (b'{"messages": [', "malformed JSON"),
        (b"hello", "malformed JSON"),
        pytest.param(b"[" * 20_000 + b"]" * 20_000, "malformed JSON", id="nested too deeply"),
        pytest.param(
            b'{"a": ' + b"1" * 5000 + b"}", "malformed JSON", id="a number too long to read"
        ),  # defect reported
        (b'{"text": "\xff"}', "not UTF-8"),
        (b"[1, 2]", "no object"),
        (b'"text"', "no object"),
        (b"null", "no object"),
    ],
)
def test_a_line_that_is_no_object_is_a_bad_row_and_the_next_one_is_read(tmp_path, line, cause):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"{}\n" + line + b"\n{}\n")
    assert numbered(path) == [(1, {}), (2, cause), (3, {})]


def test_what_arrow_adds_to_make_rows_alike_is_left_out(tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": "q", "name": "me"}, {"role": "assistant", "tool_calls": [{"x": 1}]}]},
        {"messages": [{"role": "user", "content": ""}], "tools": [{"y": {"z": 1.5}}], "finish_reason": "stop"},
    ]
    (tmp_path / "rows.parquet").write_bytes(parquet(rows))
    assert numbered(tmp_path / "rows.parquet") == [(1, rows[0]), (2, rows[1])]


# ------------------------------------------------------------------------------------------------ the hub


@pytest.fixture
def hub(monkeypatch):
    """Stands in for the hub: every dataset has ROWS. Lists what was asked for."""
    import datasets

    asked = []

    def load_dataset(path, name=None, *, split=None, revision=None):
        asked.append((path, name, split, revision))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("org/name", ("org/name", None, "train", None)),
        ("org/name/subset", ("org/name", "subset", "train", None)),
        ("org/na.me-2:test_sft", ("org/na.me-2", None, "test_sft", None)),
        ("org/name@v1.0", ("org/name", None, "train", "v1.0")),
        ("org/name/subset:train[:10%]@refs/pr/1", ("org/name", "subset", "train[:10%]", "refs/pr/1")),
    ],
)
def test_a_hub_dataset_is_named_with_subset_split_and_revision(hub, name, asked):
    assert find_sources(name) == [HubSource(name)]
    assert numbered(name) == list(enumerate(ROWS, 1))
    assert set(hub) == {asked}


@pytest.mark.parametrize("name", ["name", "org/name/subset/more", "org/name:", "org/name@", "org/absent.jsonl", "/a/b"])
def test_what_cannot_be_a_hub_dataset_is_a_missing_file(hub, name):
    with pytest.raises(ValueError, match=f"data file {name} does not exist"):
        find_sources(name)
    assert not hub


def test_rows_of_a_hub_dataset_are_numbered_over_all_chunks(hub, monkeypatch):
    monkeypatch.setattr(sources, "CHUNK_ROWS", 2)
    assert [(chunk.first, len(chunk.rows)) for chunk in HubSource("org/name").chunks()] == [(1, 2), (3, 2), (5, 1)]
    assert numbered("org/name") == list(enumerate(ROWS, 1))


def test_a_hub_dataset_stays_the_same_until_its_rows_change(hub, monkeypatch):
    import datasets

    first = HubSource("org/name").identity()
    assert HubSource("org/name").identity() == first
    assert HubSource("org/name:test").identity() != first
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: datasets.Dataset.from_list(ROWS[1:]))
    assert HubSource("org/name").identity() != first


@pytest.mark.parametrize(
    "kind", ["DatasetNotFoundError", "DataFilesNotFoundError", "DatasetGenerationError", "ValueError"]
)
def test_a_hub_dataset_that_cannot_be_had_is_named(monkeypatch, kind):
    import builtins

    import datasets

    error = getattr(datasets.exceptions, kind, None) or getattr(builtins, kind)  # defect reported: ...GenerationError

    def load_dataset(*args, **kwargs):
        raise error("not on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match=r"org/name is neither a .* nor a dataset .*: not on the Hub"):
        HubSource("org/name").identity()


# ------------------------------------------------------------------------------------------------ shapes of rows

USER = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"x": 1, "y": [2]}}}
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
CALL_AS_TEXT = json.dumps(CALL["function"])


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        pytest.param({"messages": [USER, ANSWER]}, Conversation([USER, ANSWER]), id="messages"),
        pytest.param(
            {"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}]},
            Conversation([{"role": "system", "content": "s"}, USER]),
            id="ShareGPT",
        ),
        pytest.param(
            {"conversations": [{"from": "user", "value": "q"}, {"from": "chatgpt", "value": "a"}]},
            Conversation([USER, ANSWER]),
            id="ShareGPT, other names",
        ),
        pytest.param({"conversations": [USER, ANSWER]}, Conversation([USER, ANSWER]), id="conversations of messages"),
        pytest.param(
            {
                "conversations": [
                    {"from": "human", "value": "q"},
                    {"from": "function_call", "value": CALL_AS_TEXT},
                    {"from": "observation", "value": "3"},
                    {"from": "gpt", "value": "a"},
                ],
                "tools": json.dumps(TOOLS),
            },
            Conversation([USER, CALLING, {"role": "tool", "content": "3"}, ANSWER], TOOLS),
            id="ShareGPT with tools",
        ),
        pytest.param({"prompt": "q", "response": "a"}, Conversation([USER, ANSWER]), id="prompt and response"),
        pytest.param(
            {"prompt": [{"role": "system", "content": "s"}, USER], "response": "a"},
            Conversation([{"role": "system", "content": "s"}, USER, ANSWER]),
            id="prompt of messages",
        ),
        pytest.param({"text": "q>a", "prompt_length": 2}, Text("q>a", [(2, 3)]), id="text"),
        pytest.param({"text": "a", "prompt_length": 0}, Text("a", [(0, 1)]), id="text without a prompt"),
    ],
)
@pytest.mark.parametrize("form", ["jsonl", "parquet"])
@pytest.mark.parametrize("finish_reason", ["stop", "length"])
def test_every_shape_is_read(tmp_path, row, expected, form, finish_reason):
    row = {**row, "finish_reason": finish_reason}
    path = tmp_path / f"row.{form}"
    path.write_bytes(parquet([row]) if form == "parquet" else json.dumps(row).encode())
    [(_, read)] = numbered(path)
    if isinstance(expected, Conversation):  # a text ends where it ends
        expected = dataclasses.replace(expected, finished=finish_reason == "stop")
    assert read_row(read) == expected


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (["messages", "conversations", "text", "prompt_length", "prompt", "response"], "messages"),
        (["conversations", "text", "prompt_length", "prompt", "response"], "conversations"),
        (["text", "prompt_length", "prompt", "response"], "text"),
        (["text", "prompt", "response"], "response"),
    ],
)
def test_of_several_shapes_the_first_counts(keys, said):
    row = {
        "messages": [{"role": "user", "content": "messages"}],
        "conversations": [{"from": "human", "value": "conversations"}],
        "text": "text",
        "prompt_length": 0,
        "prompt": "q",
        "response": "response",
    }
    read = read_row({key: row[key] for key in keys})
    assert (read.text if isinstance(read, Text) else read.messages[-1]["content"]) == said


def read_messages(*messages: dict[str, Any]) -> list[dict[str, Any]]:
    read = read_row({"messages": list(messages)})
    assert isinstance(read, Conversation)
    return read.messages


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_thinking_is_given_under_the_names_that_templates_read(key):
    thinking = {"reasoning_content": "hm", "thinking": "hm"}
    assert read_messages(USER, {**ANSWER, key: "hm"}) == [USER, {**ANSWER, **thinking}]
    assert read_messages(USER, {"role": "assistant", key: "hm"}) == [USER, {**ANSWER, "content": "", **thinking}]
    assert read_messages(USER, {**ANSWER, key: None}) == read_messages(USER, {**ANSWER, key: ""}) == [USER, ANSWER]
    assert read_messages({**USER, key: "hm"}) == [USER]


@pytest.mark.parametrize(
    "call",
    [
        CALL,
        CALL["function"],
        {"function": CALL["function"]},
        {"function": {"name": "add", "arguments": '{"x": 1, "y": [2]}'}},
    ],
)
@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}, {"content": []}])
def test_tool_calls_are_brought_to_one_form(call, content):
    assert read_messages(USER, {"role": "assistant", "tool_calls": [call], **content}) == [USER, CALLING]


@pytest.mark.parametrize("arguments", [{}, {"arguments": {}}, {"arguments": ""}, {"arguments": "{}"}])
def test_a_tool_call_may_have_no_arguments(arguments):
    [_, message] = read_messages(USER, {"role": "assistant", "tool_calls": [{"name": "now", **arguments}]})
    assert message["tool_calls"] == [{"type": "function", "function": {"name": "now", "arguments": {}}}]


def test_a_message_keeps_what_templates_read_and_nothing_else():
    result = {"role": "tool", "content": "3", "name": "add", "tool_call_id": "c1"}
    assert read_messages(USER, {**CALLING, "tool_calls": [{**CALL, "id": "c1", "index": 0}]}, result) == [
        USER,
        {**CALLING, "tool_calls": [{**CALL, "id": "c1"}]},
        result,
    ]
    assert read_messages({**USER, "name": None, "weight": 0, "tool_calls": [CALL]}) == [USER]


def test_a_line_break_joins_the_text_parts_of_a_content():
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    assert read_messages({"role": "user", "content": parts}) == [{"role": "user", "content": "one \ntwo"}]


@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS)])
def test_tools_are_read_as_a_list_or_as_json(tools):
    assert read_row({"messages": [USER], "tools": tools}) == Conversation([USER], TOOLS)


@pytest.mark.parametrize("tools", [None, [], "", " ", "[]", "null"])
def test_no_tools_are_none(tools):
    assert read_row({"messages": [USER], "tools": tools}) == Conversation([USER], None)


@pytest.mark.parametrize("role", ["system", "developer", "tool"])
def test_context_may_be_empty(role):
    assert read_messages({"role": role, "content": ""}, USER)[0] == {"role": role, "content": ""}


def calling(**changes: Any) -> dict[str, Any]:
    """A row with a tool call of other content."""
    return {"messages": [USER, {"role": "assistant", "tool_calls": [{"function": CALL["function"] | changes}]}]}


@pytest.mark.parametrize(
    ("row", "error"),
    [
        ({}, "unknown shape: expected 'messages'; .*, found the keys \\(none\\)"),
        ({"text": "x", "prompt": "y"}, "unknown shape: .*'text' and 'prompt_length'; .* found the keys prompt, text"),
        ({"messages": []}, "no messages: .*'messages'"),
        ({"messages": "hello"}, "no messages: .*'messages'"),
        ({"conversations": {"from": "human"}}, "no messages: .*'conversations'"),
        ({"messages": ["hello"]}, "no role"),
        ({"messages": [{"content": "q"}]}, "no role"),
        ({"messages": [{"from": "human", "value": "q"}]}, "no role"),
        ({"messages": [{"role": "critic", "content": "q"}]}, "unknown role: 'critic'"),
        ({"messages": [{"role": ["user"], "content": "q"}]}, "unknown role"),
        ({"conversations": [{"from": "bing", "value": "q"}]}, "unknown role: 'bing'"),
        ({"conversations": [{"from": ["human"], "value": "q"}]}, "unknown role"),
        ({"conversations": [{"from": "function_call", "value": "add(1)"}]}, "wrong function_call: not JSON"),
        ({"conversations": [{"from": "function_call"}]}, "wrong function_call: not JSON"),
        ({"messages": [{"role": "user"}]}, "empty content: .*user"),
        (chat("q", ""), "empty content: .*assistant"),
        (chat(" \n"), "empty content: .*user"),
        ({"prompt": "q", "response": None}, "empty content: .*assistant"),
        ({"prompt": None, "response": "a"}, "no prompt"),
        ({"prompt": "q", "response": ["a"]}, "no text: the content .*assistant is list"),
        (chat(5), "no text: the content of a message of role user is int"),
        (chat({"a": 1}), "no text: .* is dict"),
        (chat(["a", "b"]), "no text: .* is list"),
        (chat([{"type": "text", "text": "q"}, {"type": "image_url"}]), "no text: .*image_url"),
        (chat([{"type": "text", "text": None}]), "no text"),  # defect reported
        (chat([{"type": "text", "text": 5}]), "no text"),  # defect reported
        ({"messages": [USER, {**ANSWER, "reasoning": ["hm"]}]}, "wrong reasoning"),
        ({"messages": [USER, {**ANSWER, "tool_calls": "add(1)"}]}, "wrong tool call"),
        ({"messages": [USER, {**ANSWER, "tool_calls": ["add(1)"]}]}, "wrong tool call"),
        (calling(name=None), "wrong tool call"),
        (calling(arguments="x = 1"), "wrong arguments of a tool call: not JSON"),
        (calling(arguments="[" * 20_000 + "]" * 20_000), "wrong arguments of a tool call"),  # defect reported
        (calling(arguments="[1]"), "wrong tool call: .*object"),
        (calling(arguments=1), "wrong tool call: .*object"),
        ({"messages": [USER], "tools": "add"}, "wrong tools: not JSON"),
        ({"messages": [USER], "tools": {"name": "add"}}, "wrong tools: expected a list"),
        ({"text": "x", "prompt_length": 1}, "wrong prompt_length: .* below 1, found 1"),
        ({"text": "x", "prompt_length": -1}, "wrong prompt_length: .* found -1"),
        ({"text": "x", "prompt_length": "0"}, "wrong prompt_length: .* found '0'"),
        ({"text": "x", "prompt_length": False}, "wrong prompt_length"),
        ({"text": "", "prompt_length": 0}, "wrong prompt_length"),
        ({"text": ["x"], "prompt_length": 0}, "no text: 'text' must be a string"),
    ],
)
def test_a_row_that_cannot_be_used_says_why(row, error):
    with pytest.raises(BadRow, match=error) as raised:
        read_row(row)
    assert raised.value.cause == str(raised.value).split(":")[0]


@pytest.mark.parametrize("text", ["\ud800", "\udfff", "x\0"], ids=["high", "low", "NUL"])
@pytest.mark.parametrize(
    "place",
    [
        chat,
        lambda text: chat("q", "a" + text),
        lambda text: {"messages": [{"role": "system", "content": text}]},
        lambda text: {"messages": [USER, {**ANSWER, "reasoning": text}]},
        lambda text: {"messages": [{**USER, "name": text}]},
        lambda text: calling(name=text),
        lambda text: calling(arguments={"x": [text]}),
        lambda text: calling(arguments={text: 1}),
        lambda text: calling(arguments=json.dumps({"x": text})),
        lambda text: {"messages": [USER, {"role": "assistant", "tool_calls": [{**CALL, "id": text}]}]},
        lambda text: {"messages": [USER, CALLING, {"role": "tool", "content": text}]},
        lambda text: {"messages": [USER], "tools": [{"name": text}]},  # defect reported
        lambda text: {"messages": [USER], "tools": json.dumps([{"name": text}])},  # defect reported
        lambda text: {"conversations": [{"from": "human", "value": text}]},
        lambda text: {"prompt": text, "response": "a"},
        lambda text: {"prompt": "q", "response": text},
        lambda text: {"text": "x" + text, "prompt_length": 0},
    ],
)
def test_text_that_no_tokenizer_can_take_is_bad_wherever_it_is(place, text):
    with pytest.raises(BadRow, match="broken text: "):
        read_row(place(text))


def test_whole_surrogate_pairs_are_text():
    [message] = read_messages(json.loads('{"role": "user", "content": "\\ud83d\\ude00"}'))
    assert message["content"] == "😀"


# ------------------------------------------------------------------------------------------------ small data at once


def test_conversations_are_numbered_over_all_files_and_their_blank_lines(tmp_path):
    write_rows(tmp_path / "a.jsonl", [chat("q1"), "", chat("q3"), ""])  # defect reported: the blank line at the end
    write_rows(tmp_path / "b.jsonl", [chat("q5")])
    read = [(number, conversation.messages[0]["content"]) for number, conversation in read_conversations(tmp_path)]
    assert read == [(1, "q1"), (3, "q3"), (5, "q5")]


@pytest.mark.parametrize("bad", ["{", {"messages": []}, {"text": "qa", "prompt_length": 1}])
def test_a_bad_row_among_conversations_is_named(tmp_path, bad):
    write_rows(tmp_path / "a.jsonl", chats(2))
    path = write_rows(tmp_path / "b.jsonl", [*chats(1), bad, *chats(1)])
    with pytest.raises(ValueError, match=rf"1 bad rows, .*\n  {path}, row 2: (malformed JSON|no messages): "):
        list(read_conversations(tmp_path))
    assert [number for number, _ in read_conversations(tmp_path, max_bad_rows=1)] == [1, 2, 3, 5]


def test_more_bad_rows_than_allowed_are_all_named(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", ["{", *chats(1), "{"])
    with pytest.raises(ValueError, match=r"2 bad rows, where max_bad_rows allows 1:\n.*row 1: .*\n.*row 3: "):
        list(read_conversations(path, max_bad_rows=1))


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_nothing_to_read_is_refused(tmp_path, content):
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"a\.jsonl holds no conversation"):
        list(read_conversations(path))
