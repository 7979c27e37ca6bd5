"""The same rows say the same, whatever kind of file they come from."""

from __future__ import annotations

import datetime
import gzip
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest

from dflash_dist.data.account import BadRow
from dflash_dist.data.padding import Padding
from dflash_dist.data.sources import BLOCK, Chunk, FileSource, find_sources
from tests.data.files import chat, write_rows

Rows = list[dict[str, Any]]


def read(path: Path | str) -> tuple[Rows, Counter[str]]:
    """The rows, and what was noted of them."""
    noted = Counter[str]()
    chunks = [chunk for source in find_sources(str(path)) for chunk in source.chunks()]
    return [row for chunk in chunks for _, row in chunk.parsed(noted)], noted


def call(name: str, **arguments: Any) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {"role": "assistant", "tool_calls": [{"type": "function", "function": function}]}


def tool(name: str, **properties: Any) -> dict[str, Any]:
    return {"function": {"name": name, "parameters": {"type": "object", "properties": properties}}}


def asked(*answers: dict[str, Any], tools: list[Any] | None = None) -> dict[str, Any]:
    messages = [message for answer in answers for message in ({"role": "user", "content": "q"}, answer)]
    return {"messages": messages} | ({"tools": tools} if tools else {})


# Calls and tools with other keys each, and a row without any.
CITY, SYMBOL = {"type": "string", "description": "Where."}, {"type": "string", "enum": ["A", "B"]}
ROWS = [
    asked(call("weather", city="Oslo"), tools=[tool("weather", city=CITY)]),
    asked(
        call("stock", symbol="A", unit={"name": "kr"}), tools=[tool("stock", symbol=SYMBOL), tool("weather", city=CITY)]
    ),
    asked({"role": "assistant", "content": "a \u00e9\n"}),
    asked(call("weather", city="Rome"), call("now"), tools=[tool("weather", city=CITY)]),
]


# ------------------------------------------------------------------------------------------------ writers


def lines(rows: Rows) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def padded(rows: Rows) -> Rows:
    return pa.Table.from_pylist(rows, schema_of(rows)).to_pylist()


def schema_of(rows: Rows) -> pa.Schema:
    """With the columns of all rows, not of the first alone."""
    columns = {key: [row.get(key) for row in rows] for row in rows for key in row}
    return pa.table(columns).schema


def write_jsonl(path: Path, rows: Rows) -> Path:
    path = path / "rows.jsonl"
    path.write_bytes(lines(rows))
    return path


def write_padded_jsonl(path: Path, rows: Rows) -> Path:
    return write_jsonl(path, padded(rows))


def write_padded_array(path: Path, rows: Rows) -> Path:
    (path / "rows.json").write_text(json.dumps(padded(rows), indent=1))
    return path / "rows.json"


def write_padded_gzip(path: Path, rows: Rows) -> Path:
    (path / "rows.jsonl.gz").write_bytes(gzip.compress(lines(padded(rows))))
    return path / "rows.jsonl.gz"


def write_padded_zstd(path: Path, rows: Rows) -> Path:
    (path / "rows.jsonl.zst").write_bytes(pa.compress(lines(padded(rows)), codec="zstd", asbytes=True))
    return path / "rows.jsonl.zst"


def write_structs(path: Path, rows: Rows) -> Path:
    pa.parquet.write_table(pa.Table.from_pylist(rows, schema_of(rows)), path / "rows.parquet")
    return path / "rows.parquet"


def write_json_columns(path: Path, rows: Rows) -> Path:
    columns = {key: [json.dumps(row[key]) if key in row else None for row in rows] for row in rows for key in row}
    table = pa.table({key: pa.array(column, pa.json_()) for key, column in columns.items()})
    pa.parquet.write_table(table, path / "rows.parquet")
    return path / "rows.parquet"


def write_json_columns_unknown_to_arrow(path: Path, rows: Rows) -> Path:
    write_json_columns(path, rows)
    table = pa.parquet.read_table(path / "rows.parquet")
    pa.parquet.write_table(table, path / "rows.parquet", store_schema=False)
    return path / "rows.parquet"


def write_json_messages(path: Path, rows: Rows) -> Path:
    """As `datasets` does: lists of JSON, since messages differ in keys."""
    messages = [[json.dumps(message) for message in row["messages"]] for row in rows]
    column = pa.array(messages, pa.list_(pa.string())).cast(pa.list_(pa.json_()))
    tools = pa.array([row.get("tools") for row in rows])
    pa.parquet.write_table(pa.table({"messages": column, "tools": tools}), path / "rows.parquet")
    return path / "rows.parquet"


def hub(path: Path, rows: Rows) -> datasets.Dataset:
    path = write_rows(path / "published.jsonl", rows)
    return datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=str(path.parent / "cache"))


def write_by_datasets(path: Path, rows: Rows) -> Path:
    hub(path, rows).to_parquet(path / "rows.parquet")
    return path / "rows.parquet"


def write_structs_by_datasets(path: Path, rows: Rows) -> Path:
    datasets.Dataset.from_list(rows).to_parquet(path / "rows.parquet")
    return path / "rows.parquet"


def write_datasets_save(path: Path, rows: Rows) -> Path:
    saved = hub(path, rows)
    saved.save_to_disk(path / "saved", num_shards=2)
    again = datasets.load_from_disk(str(path / "saved"))
    again.map(lambda row: {"messages": [{"role": "user", "content": "a cache"}]})  # it lies beside the dataset
    assert len(list((path / "saved").glob("*.arrow"))) == 3
    return path / "saved"


def write_jsonl_by_datasets(path: Path, rows: Rows) -> Path:
    datasets.Dataset.from_list(rows).to_json(path / "rows.jsonl")
    return path / "rows.jsonl"


WRITERS = [value for name, value in list(globals().items()) if name.startswith("write_") and name != "write_rows"]


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__.removeprefix("write_"))
def test_rows_are_the_same_from_every_kind_of_file(tmp_path, write: Callable[[Path, Rows], Path]):
    assert read(write(tmp_path, ROWS))[0] == ROWS


def test_rows_are_the_same_from_a_hub_dataset(tmp_path, monkeypatch):
    for published in (hub(tmp_path, ROWS), datasets.Dataset.from_list(ROWS)):
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, published=published, **__: published)
        assert read("org/name")[0] == ROWS


# ------------------------------------------------------------------------------------------------ JSON columns


def test_json_is_read_at_any_depth(tmp_path):
    """A list of structs of JSON beside a map of lists of JSON, as text, number, list, object and null."""
    values = ["a \u00e9\n", 1, [1.5, {"b": '"'}], {"c": None}, None]
    texts = [json.dumps(value) for value in values]
    structs = pa.array([[{"x": text, "y": text} for text in texts], [{"x": None, "y": "1"}], None]).cast(
        pa.list_(pa.struct({"x": pa.json_(), "y": pa.string()}))
    )
    maps = pa.array([[("k", texts)], [], None], pa.map_(pa.string(), pa.list_(pa.string()))).cast(
        pa.map_(pa.string(), pa.list_(pa.json_()))
    )
    pa.parquet.write_table(pa.table({"structs": structs, "maps": maps}), tmp_path / "rows.parquet")
    present = [({"x": value} if value is not None else {}) | {"y": text} for value, text in zip(values, texts)]
    present[3] = {"x": {}, "y": texts[3]}
    assert read(tmp_path / "rows.parquet")[0] == [
        {"structs": present, "maps": {"k": [*values[:3], {}, None]}},
        {"structs": [{"y": "1"}], "maps": {}},
        {},
    ]


@pytest.mark.parametrize("text", ['{"a": ', "[" * 20_000 + "]" * 20_000], ids=["cut", "nested too deeply"])
def test_what_is_no_json_in_a_column_of_it_is_a_bad_row(tmp_path, text):
    table = pa.table({"messages": pa.array(["[]", text, "[]"], pa.json_())})
    pa.parquet.write_table(table, tmp_path / "rows.parquet")
    first, bad, last = read(tmp_path / "rows.parquet")[0]
    assert first == last == {"messages": []}
    assert isinstance(bad, BadRow) and bad.cause == "malformed JSON"


def test_a_value_that_json_does_not_have_is_a_bad_row_where_templates_write_json(tmp_path):
    day = datetime.date(2026, 11, 2)
    [row] = read(write_structs(tmp_path, [{"messages": [call("weather", day=day)]}]))[0]
    assert isinstance(row, BadRow)
    assert str(row) == ("no JSON: messages[].tool_calls[].function.arguments.day is a date, which JSON does not have")
    assert read(write_structs(tmp_path, [{"messages": [], "made": day}]))[0] == [{"messages": [], "made": day}]


# ------------------------------------------------------------------------------------------------ nulls

UNIT = "messages[].tool_calls[].function.arguments.unit"
LEFT_OUT = "null left out as padding, since other rows have a value there: "
KEPT = "null kept, since no row has a value there: "
# The target itself wrote nulls: calls have other keys each, so nothing was padded.
OWN = [asked(call("weather", city="Oslo", unit=None)), asked(call("weather", city="Rome", unit="C"), call("now"))]
# All calls have the same keys, and none a value under one of them.
NEVER = [asked(call("weather", city="Oslo", unit=None)), asked(call("weather", city="Rome", unit=None))]
# The same keys again, with a value in one row: written by the target or added, nobody can tell.
EITHER = [asked(call("weather", city="Oslo", unit=None)), asked(call("weather", city="Rome", unit="C"))]


@pytest.mark.parametrize("write", [write_jsonl, write_json_columns, write_json_messages])
def test_a_null_is_kept_where_other_calls_show_that_nothing_was_padded(tmp_path, write):
    assert read(write(tmp_path, OWN)) == (OWN, Counter())


@pytest.mark.parametrize("write", [w for w in WRITERS if w is not write_json_messages], ids=lambda w: w.__name__)
def test_a_null_is_kept_where_no_row_explains_it(tmp_path, write):
    rows, noted = read(write(tmp_path, NEVER))
    assert rows == NEVER
    assert noted in (Counter({KEPT + UNIT: 2}), Counter())  # a column of JSON is as it was written


@pytest.mark.parametrize("write", [write_jsonl, write_padded_jsonl, write_padded_array, write_structs])
def test_a_null_that_other_rows_explain_is_left_out_and_noted(tmp_path, write):
    expected = [asked(call("weather", city="Oslo")), EITHER[1]]
    assert read(write(tmp_path, EITHER)) == (expected, Counter({LEFT_OUT + UNIT: 1}))


def strict(*required: str, **properties: Any) -> dict[str, Any]:
    """A tool whose calls have every required key, null or not."""
    made = tool("weather", **properties)
    made["function"]["parameters"]["required"] = list(required)
    return made


UNIT_OR_NONE = {"type": ["string", "null"]}


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__.removeprefix("write_"))
def test_a_tools_description_tells_what_its_calls_have_in_every_kind_of_file(tmp_path, write):
    """Required, so the target wrote the null; unknown to the tool, so another tool's call has it."""
    weather = strict("city", "unit", city=CITY, unit=UNIT_OR_NONE)
    stock = tool("stock", symbol=CITY)
    rows = [
        asked(call("weather", city="Oslo", unit=None), tools=[weather]),
        asked(call("weather", city="Rome", unit="C"), tools=[weather]),
        asked(call("stock", symbol="A"), tools=[stock, weather]),
        asked(call("stock", symbol="B"), call("weather", city="Bonn", unit=None), tools=[weather, stock]),
    ]
    assert read(write(tmp_path, rows)) == (rows, Counter())


@pytest.mark.parametrize("key", ["tools", "functions"])
@pytest.mark.parametrize("form", [lambda tools: tools, json.dumps, lambda tools: [json.dumps(tool) for tool in tools]])
def test_a_description_tells_it_in_every_form(tmp_path, key, form):
    rows = [row | {key: form([strict("unit"), strict("unit")["function"]])} for row in EITHER]
    assert read(write_jsonl(tmp_path, rows)) == (rows, Counter())


@pytest.mark.parametrize("tools", [[strict("city", city=CITY, unit=UNIT_OR_NONE)], "[", "5", [5], ["["]])
def test_where_the_description_leaves_it_open_the_other_rows_decide(tmp_path, tools):
    rows, noted = read(write_jsonl(tmp_path, [row | {"tools": tools} for row in EITHER]))
    kept = [row["messages"][1]["tool_calls"][0]["function"]["arguments"] for row in rows]
    assert kept == [{"city": "Oslo"}, {"city": "Rome", "unit": "C"}]
    assert noted == {LEFT_OUT + UNIT: 1}


def test_nulls_outside_of_free_json_say_nothing_in_any_file(tmp_path):
    row = {"messages": [{"role": "user", "content": "q", "name": None, "tool_calls": None}], "tools": None, "id": None}
    for write in (write_jsonl, write_structs, write_json_columns):
        assert read(write(tmp_path, [row])) == ([{"messages": [{"role": "user", "content": "q"}]}], Counter())


def test_what_is_said_of_nulls_does_not_depend_on_chunks_or_their_order(tmp_path, monkeypatch):
    rows = [*padded(ROWS), *EITHER, *NEVER, *OWN]
    chunks = [Chunk("", 1, [json.dumps(row).encode() for row in rows[k : k + 1]]) for k in range(len(rows))]
    whole = Chunk("", 1, [line for chunk in chunks for line in chunk.rows]).look()
    for order in (chunks, chunks[::-1], [*chunks[5:], *chunks[:5]]):
        parts = Padding()
        parts.add_all(chunk.look() for chunk in order)
        assert [parts.without(row, Counter()) for row in rows] == [whole.without(row, Counter()) for row in rows]


def test_objects_that_differ_are_not_looked_into(tmp_path):
    """Else what is known would grow with every name that a tool's arguments ever had."""
    rows = [asked(call("f", **{f"a{k}": {f"b{k}": 1}})) for k in range(100)]
    known = Chunk("", 1, [json.dumps(row).encode() for row in rows]).look()
    assert len(known.keys) + len(known.valued) <= 6


def test_a_file_without_nulls_is_read_once(tmp_path):
    def look(chunks):
        raise AssertionError("looked through")

    path = write_jsonl(tmp_path, ROWS)
    assert sum(len(chunk.rows) for chunk in FileSource(path).chunks(look)) == len(ROWS)
    path = write_jsonl(tmp_path, [{"messages": [{"role": "user", "content": "null", "name": None}]}])
    assert sum(len(chunk.rows) for chunk in FileSource(path).chunks(look)) == 1
    with pytest.raises(AssertionError, match="looked through"):
        list(FileSource(write_jsonl(tmp_path, NEVER)).chunks(look))


@pytest.mark.parametrize("before", [1, 2, 3])
def test_a_null_across_the_edge_of_what_is_read_at_once_is_seen(tmp_path, before):
    text = lines([chat("q", "x"), *EITHER])
    path = write_jsonl(tmp_path, [chat("q", "x" * (BLOCK - text.index(b"null") - before + 1)), *EITHER])
    assert path.read_bytes()[BLOCK - before :].startswith(b"null")
    assert read(path)[1] == {LEFT_OUT + UNIT: 1}
