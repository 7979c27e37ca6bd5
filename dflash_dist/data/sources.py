"""Files, folders of them and hub datasets -> raw rows.

A source is a JSONL file (plain, .gz or .zst), a JSON array, a Parquet file, an Arrow file that `datasets` saved, or a
split of a Hugging Face dataset. Its rows come in chunks of raw bytes or Arrow batches, which other processes can parse.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from dflash_dist.data.account import BadRow
from dflash_dist.data.keys import shapes_of
from dflash_dist.data.padding import FREE_JSON, Padding, is_list
from dflash_dist.reading import parse

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json", ".json.gz", ".json.zst", ".parquet")
SAVED_BY_DATASETS = "state.json"  # beside the Arrow files of a dataset's `save_to_disk`, which it names
DESCRIPTIONS = (SAVED_BY_DATASETS, "dataset_info.json", "dataset_infos.json", "dataset_dict.json")
UNFINISHED = (".partial", ".parts", ".tmp", ".incomplete")  # folders that somebody still writes, such as `regenerate`
BLOCK = 1 << 20  # [bytes] that are read at once
CHUNK_ROWS = 512
CHUNK_BYTES = 8 << 20
TOO_DEEP = "nested too deeply: no template can render it"
LONGEST_ROW = 4 << 20  # [bytes]; a million tokens: no packed row holds that, and it is most often a broken export

Lines = list[bytes | None]  # None for one that is too long
_FREE_JSON = re.compile("|".join(f'"{key}"' for key in FREE_JSON).encode())


@dataclass(frozen=True)
class Chunk:
    """Consecutive rows of a source, not parsed yet."""

    source: str  # its name
    first: int  # number of the first row, from 1
    rows: Lines | pa.Table | pa.RecordBatch
    padding: Padding = field(default_factory=Padding)  # of all rows of the source

    def parsed(self, noted: Counter[str]) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
        """Row numbers with rows, or with what is wrong with them. Blank lines count but give nothing.

        Args:
            noted: counts what was assumed of nulls, as `Padding.without` does.
        """
        rows = map(_parse_line, self.rows) if isinstance(self.rows, list) else _parse_table(self.rows)
        for number, row in enumerate(rows, self.first):
            if isinstance(row, dict):
                try:
                    row = self.padding.without(row, noted)
                except ValueError as error:
                    row = BadRow(f"no JSON: {error}")
                except RecursionError:
                    row = BadRow(TOO_DEEP)
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
        tables = {".parquet": _parquet_batches, ".arrow": _arrow_batches}.get(self.path.suffix)
        padding = None if tables else Padding()
        try:
            if padding and _may_be_padded(self.path):
                padding.add_all(look(_numbered(self.name, _line_lists(self.path), Padding())))
            yield from _numbered(self.name, (tables or _line_lists)(self.path), padding)
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
        return _numbered(self.name, self._dataset().with_format("arrow").iter(CHUNK_ROWS))

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


def digest(*parts: Any) -> str:
    """A short name for everything that `parts` say."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:24]


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
        try:
            data, others = _files_in(local)
        except OSError as error:
            raise ValueError(f"data folder {path} cannot be read: {error}") from error
        if not data:
            none = f" but {', '.join(file.name for file in others)}" if others else ""
            raise ValueError(f"data folder {path} holds no file ending in {', '.join(SUFFIXES)}{none}")
        if passed_over is not None:
            passed_over += sorted(others)
        return [FileSource(file) for file in sorted(data)]
    if local.is_file():
        if not local.name.endswith(SUFFIXES):
            raise ValueError(f"data file {path} is of no known kind: its name must end in one of {', '.join(SUFFIXES)}")
        return [FileSource(local)]
    if path.endswith(SUFFIXES) or not HubSource.PATTERN.fullmatch(path):
        raise ValueError(f"data file {path} does not exist; `regenerate` is what writes a target's answers")
    return [HubSource(path)]


def _files_in(folder: Path) -> tuple[list[Path], list[Path]]:
    """The data files of a folder and of the folders in it, each once, whatever links lead there; and the files that end
    as data does and are none."""
    data: list[Path] = []
    others: list[Path] = []
    seen: set[tuple[int, int]] = set()  # device and inode

    def is_new(path: Path) -> bool:
        stat = path.stat()  # a link that leads nowhere is an error
        new = (stat.st_dev, stat.st_ino) not in seen
        seen.add((stat.st_dev, stat.st_ino))
        return new

    def look_into(folder: Path) -> None:
        for path in sorted(folder.iterdir()):
            if path.name.startswith("."):  # of notebooks, of downloads, of macOS
                continue
            hidden = path.name.startswith("_")
            if path.is_dir():
                if not hidden and not path.name.endswith(UNFINISHED) and is_new(path):
                    look_into(path)
            elif path.name.endswith(SUFFIXES):
                if hidden or (path.suffix == ".json" and _describes(path)):
                    others.append(path)
                elif is_new(path):
                    data.append(path)
                if path.name == SAVED_BY_DATASETS:
                    data.extend(filter(is_new, _saved_beside(path)))

    if is_new(folder):
        look_into(folder)
    return data, others


def _describes(path: Path) -> bool:
    """Whether a file is one object that is no row and holds none. On a single line that could be a bad row, unless it
    is known by its name."""
    if path.stat().st_size > LONGEST_ROW:
        return False
    content = path.read_bytes().strip()
    try:
        found = parse(content)
    except ValueError:
        return False
    if not isinstance(found, dict) or not (b"\n" in content or path.name in DESCRIPTIONS):
        return False
    inside = [value[0] for value in found.values() if isinstance(value, list) and value]
    return not any(isinstance(row, dict) and shapes_of(row) for row in (found, *inside))


def _saved_beside(state: Path) -> list[Path]:
    """The files of the dataset that `datasets` saved with this state; caches of its own may lie beside them."""
    try:
        return [state.with_name(file["filename"]) for file in parse(state.read_bytes())["_data_files"]]
    except (ValueError, TypeError, KeyError):
        return []  # another file of this name


# ------------------------------------------------------------------------------------------------ kinds of files


def _numbered(source: str, parts: Iterable[Any], padding: Padding | None = None) -> Iterator[Chunk]:
    """The parts that a file is read in as chunks. Of tables, the types tell the padding."""
    first = 1
    for rows in parts:
        yield Chunk(source, first, rows, Padding.of_schema(rows.schema) if padding is None else padding)
        first += len(rows)


def _opened(path: Path) -> pa.NativeFile:
    return pa.input_stream(str(path), compression={".gz": "gzip", ".zst": "zstd"}.get(path.suffix))


def _may_be_padded(path: Path) -> bool:
    """Whether a file of JSON holds both a null and free JSON: most do not, and need not be parsed twice."""
    null = free = False
    block = b""
    with _opened(path) as stream:
        while not (null and free) and (more := stream.read(BLOCK)):
            block = block[-16:] + more  # a word may lie across the edge
            null, free = null or b"null" in block, free or _FREE_JSON.search(block) is not None
    return null and free


def _line_lists(path: Path) -> Iterator[Lines]:
    with _opened(path) as stream, io.BufferedReader(stream, BLOCK) as lines:
        if lines.peek(64).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"[" and ".json" in path.suffixes:
            yield from _array_lists(path, lines)
            return
        rows: Lines = []
        size = 0
        while line := lines.readline(LONGEST_ROW + 2):
            too_long = len(line.rstrip(b"\n")) > LONGEST_ROW
            rows.append(None if too_long else line)
            size += len(line)
            while too_long and line and not line.endswith(b"\n"):
                line = lines.readline(LONGEST_ROW)
            if len(rows) == CHUNK_ROWS or size > CHUNK_BYTES:
                yield rows
                rows, size = [], 0
        if rows:
            yield rows


def _array_lists(path: Path, stream: io.BufferedReader) -> Iterator[Lines]:
    """A JSON array, as ShareGPT is published: read whole, since nothing marks its rows."""
    try:
        rows = parse(stream.read())
    except ValueError as error:
        raise ValueError(f"{path} begins as a JSON array but is not one: {error}") from error
    for start in range(0, len(rows), CHUNK_ROWS):
        yield [json.dumps(row).encode() for row in rows[start : start + CHUNK_ROWS]]


def _parquet_batches(path: Path) -> Iterator[pa.RecordBatch]:
    # Other writers mark JSON without saying so in Arrow's own words.
    with pa.parquet.ParquetFile(path, arrow_extensions_enabled=True) as file:
        yield from file.iter_batches(CHUNK_ROWS)


def _arrow_batches(path: Path) -> Iterator[pa.RecordBatch]:
    with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as stream:
        yield from stream.read_all().to_batches(CHUNK_ROWS)


# ------------------------------------------------------------------------------------------------ rows


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


def _parse_table(table: pa.Table | pa.RecordBatch) -> Iterator[dict[str, Any] | BadRow]:
    """Rows as JSON would have them: a map is an object, and JSON that a column holds as text is read."""
    readers = {column.name: read for column in table.schema if (read := _reader(column.type))}
    for row in table.to_pylist():
        try:
            yield row | {column: read(row[column]) for column, read in readers.items()}
        except (ValueError, RecursionError) as error:
            yield BadRow(f"malformed JSON: in a column of JSON, {error}")


def _reader(kind: pa.DataType) -> Callable[[Any], Any] | None:
    """What reads values of an Arrow type as JSON would have them; None where Python has them so."""
    if isinstance(kind, pa.JsonType):
        return lambda text: None if text is None else json.loads(text)
    if isinstance(kind, pa.ExtensionType):
        return _reader(kind.storage_type)
    if pa.types.is_map(kind):
        of = _reader(kind.item_type) or (lambda value: value)
        return lambda pairs: None if pairs is None else {key: of(value) for key, value in pairs}
    if pa.types.is_struct(kind) and (fields := {child.name: read for child in kind if (read := _reader(child.type))}):
        return lambda value: value and value | {key: read(value[key]) for key, read in fields.items()}
    if is_list(kind) and (item := _reader(kind.value_type)):
        return lambda items: None if items is None else [item(value) for value in items]
    return None
