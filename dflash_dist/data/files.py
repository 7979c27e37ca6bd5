"""Files and hub datasets -> raw rows.

A source is a JSONL file (plain, .gz or .zst), a JSON array, a Parquet file, or a split of a Hugging Face dataset. Its
rows come in chunks of raw bytes or Arrow tables, which other processes can parse.
"""

from __future__ import annotations

import io
import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json", ".json.gz", ".json.zst", ".parquet")
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
