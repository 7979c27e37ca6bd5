"""Files and hub datasets -> raw rows.

A source is a JSONL file (plain, .gz or .zst), a JSON array, a Parquet file, an Arrow file that `datasets` saved, or a
split of a Hugging Face dataset. Its rows come in chunks of raw bytes or Arrow tables, which other processes can parse.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from dflash_dist.data.padding import FREE_JSON, Padding

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json", ".json.gz", ".json.zst", ".parquet")
SAVED_BY_DATASETS = "state.json"  # beside the Arrow files of a dataset's `save_to_disk`, which it names
DESCRIPTIONS = (SAVED_BY_DATASETS, "dataset_info.json", "dataset_infos.json", "dataset_dict.json")
UNFINISHED = (".partial", ".parts", ".tmp", ".incomplete")  # folders that somebody still writes, such as `regenerate`
BLOCK = 1 << 20  # [bytes] that are read at once
CHUNK_ROWS = 512
CHUNK_BYTES = 8 << 20
LONGEST_ROW = 4 << 20  # [bytes]; a million tokens: no packed row holds that, and it is most often a broken export


class BadRow(ValueError):
    """A row that cannot be used; the text up to the first colon is the cause under which it is counted."""

    @property
    def cause(self) -> str:
        return str(self).split(":")[0]


@dataclass(frozen=True)
class Chunk:
    """Consecutive rows of a source, not parsed yet."""

    first: int  # number of the first row, from 1
    rows: list[bytes | None] | pa.Table  # lines, None for one that is too long; or an Arrow table
    padding: Padding = field(default_factory=Padding)  # of all lines of the source; a table's types tell of its own

    def parsed(self, noted: Counter[str]) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
        """Row numbers with rows, or with what is wrong with them. Blank lines count but give nothing.

        Args:
            noted: counts what was assumed of nulls, as `Padding.without` does.
        """
        if isinstance(self.rows, pa.Table):
            padding = Padding.of_schema(self.rows.schema)
            raw: Iterator[dict[str, Any] | BadRow | None] = _table_rows(self.rows)
        else:
            padding, raw = self.padding, map(_parse_line, self.rows)
        for number, row in enumerate(raw, self.first):
            if isinstance(row, dict):
                try:
                    row = padding.without(row, noted)
                except ValueError as error:
                    row = BadRow(f"no JSON: {error}")
                except RecursionError:
                    row = BadRow("nested too deeply: no template can render it")
            if row is not None:
                yield number, row

    def look(self) -> Padding:
        """What its lines tell of nulls. One that cannot be parsed tells nothing."""
        padding = Padding()
        for line in self.rows:
            if line is not None and _FREE_JSON.search(line):
                with contextlib.suppress(RecursionError):
                    padding.add_row(_parse_line(line))
        return padding


# In any order: what it says of all of them does not depend on it.
Look = Callable[[Iterator[Chunk]], Iterable[Padding]]


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

    def chunks(self, look: Look = lambda chunks: map(Chunk.look, chunks)) -> Iterator[Chunk]:
        """All rows. Lines are looked through before, if they may hold padding: twice as much reading, which `look` may
        spread over processes.

        Raises:
            ValueError: the file cannot be read, or not to its end.
        """
        try:
            if self.path.suffix == ".parquet":
                yield from _parquet_chunks(self.path)
            elif self.path.suffix == ".arrow":
                yield from _arrow_chunks(self.path)
            else:
                padding = Padding().add_all(look(_line_chunks(self.path)) if _may_be_padded(self.path) else ())
                for chunk in _line_chunks(self.path):
                    yield replace(chunk, padding=padding)
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

    def chunks(self, look: Look | None = None) -> Iterator[Chunk]:
        """All rows. Types tell all of nulls, so that nothing has to look through them."""
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


def _opened(path: Path) -> pa.NativeFile:
    return pa.input_stream(str(path), compression={".gz": "gzip", ".zst": "zstd"}.get(path.suffix))


_FREE_JSON = re.compile("|".join(f'"{key}"' for key in FREE_JSON).encode())


def _may_be_padded(path: Path) -> bool:
    """Whether a file of JSON holds both a null and free JSON: most do not, and need not be parsed twice."""
    null = free = False
    block = b""
    with _opened(path) as stream:
        while not (null and free) and (more := stream.read(BLOCK)):
            block = block[-16:] + more  # a word may lie across the edge
            null, free = null or b"null" in block, free or _FREE_JSON.search(block) is not None
    return null and free


def _line_chunks(path: Path) -> Iterator[Chunk]:
    with _opened(path) as stream, io.BufferedReader(stream, BLOCK) as lines:
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
    # Other writers mark JSON without saying so in Arrow's own words.
    with pa.parquet.ParquetFile(path, arrow_extensions_enabled=True) as file:
        for batch in file.iter_batches(CHUNK_ROWS):
            yield Chunk(first, pa.Table.from_batches([batch]))
            first += batch.num_rows


def arrow_files(state: Path) -> list[Path]:
    """The files of the dataset that `datasets` saved with this state; caches of its own may lie beside them."""
    try:
        return [state.with_name(file["filename"]) for file in json.loads(state.read_bytes())["_data_files"]]
    except (ValueError, TypeError, KeyError, RecursionError):
        return []  # another file of this name


def _arrow_chunks(path: Path) -> Iterator[Chunk]:
    first = 1
    with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as stream:
        for batch in stream:
            for start in range(0, batch.num_rows, CHUNK_ROWS):
                table = pa.Table.from_batches([batch.slice(start, CHUNK_ROWS)])
                yield Chunk(first, table)
                first += table.num_rows


def _table_rows(table: pa.Table) -> Iterator[dict[str, Any] | BadRow]:
    """Rows as JSON would have them: a map is an object, and JSON that a column holds as text is read."""
    kinds = {column.name: column.type for column in table.schema if _needs_reading(column.type)}
    for row in table.to_pylist():
        try:
            yield row | {column: _read(row[column], kind) for column, kind in kinds.items()}
        except (ValueError, RecursionError) as error:
            yield BadRow(f"malformed JSON: in a column of JSON, {error}")


def _needs_reading(kind: pa.DataType) -> bool:
    if isinstance(kind, pa.JsonType) or pa.types.is_map(kind):
        return True
    if isinstance(kind, pa.ExtensionType):
        return _needs_reading(kind.storage_type)
    return any(_needs_reading(kind.field(k).type) for k in range(kind.num_fields))


def _read(value: Any, kind: pa.DataType) -> Any:
    if value is None or not _needs_reading(kind):
        return value
    if isinstance(kind, pa.JsonType):
        return json.loads(value)
    if isinstance(kind, pa.ExtensionType):
        return _read(value, kind.storage_type)
    if pa.types.is_map(kind):
        return {key: _read(item, kind.item_type) for key, item in value}
    if pa.types.is_struct(kind):
        return {child.name: _read(value[child.name], child.type) for child in kind}
    return [_read(item, kind.value_type) for item in value]


def _parse_line(line: bytes | None) -> dict[str, Any] | BadRow | None:
    """None for a blank line."""
    if line is None:
        return BadRow(f"too long: above {LONGEST_ROW >> 20} MiB")
    if not line.strip():
        return None
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return BadRow(f"not UTF-8: {error}")
    except (ValueError, RecursionError) as error:
        return BadRow(f"malformed JSON: {error}")
    if not isinstance(row, dict):
        return BadRow(f"no object: expected {{...}}, found {type(row).__name__}")
    return row
