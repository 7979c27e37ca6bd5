"""Sources -> tokenised documents in an Arrow cache: made once, on all cores, shared by all ranks, never held in memory.

An entry of the cache is a folder for one file or split. Its name says everything that its content depends on, so
nothing in it ever goes stale; it appears by a rename, so it is whole.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from dflash_dist.data.chat import ChatEncoder, Document, Text
from dflash_dist.data.files import BadRow, Chunk, Source
from dflash_dist.data.padding import Padding
from dflash_dist.data.sources import BadRows, digest, read_row, shape_of
from dflash_dist.data.workers import Workers
from dflash_dist.files import locked, remove_leftovers, whole, writing
from dflash_dist.reading import reading

# What is known of each document, in one small file that opening reads; the tokens lie in another, read where needed.
INDEX = pa.schema(
    {
        "row": pa.int32(),  # of the source, from 1; several documents may come from one row
        "length": pa.int32(),  # tokens
        "first_anchor": pa.int32(),  # the first token that is supervised with its successor; NO_ANCHOR without one
        "supervised": pa.list_(pa.int32()),  # begin, end, begin, end, ...
    }
)
TOKENS = pa.schema({"input_ids": pa.int32()})
TOKEN_BATCHES = b"token_batches"  # metadata of the index: the size of each batch of tokens
NO_ANCHOR = np.iinfo(np.int32).max
# A batch of tokens is read into the map as a whole; a document lies in one batch.
TOKENS_A_BATCH = 1 << 20
AT_ONCE = 1 << 16  # documents that a sum over all of them looks at together: a bound on memory
# A worker process imports the tokenizer's library first, which takes seconds: too long for less than this.
CHUNKS_ALONE = 8
# The modules that decide what documents say.
CODE = ("padding", "files", "keys", "sources", "template", "chat", "workers", "documents")


@dataclass
class Summary:
    """What an entry tells of its source, besides the documents."""

    source: str
    shape: str = ""
    rows: int = 0
    dropped: Counter[str] = field(default_factory=Counter)  # by cause
    unread: Counter[str] = field(default_factory=Counter)  # rows by a key that nothing reads
    noted: Counter[str] = field(default_factory=Counter)  # what was read otherwise than it stands there, in words
    bad: dict[str, int] = field(default_factory=dict)  # by cause
    bad_listed: list[str] = field(default_factory=list)
    digest: str = ""  # of all documents


@dataclass(frozen=True)
class Entry:
    """The documents of a source."""

    index: pa.RecordBatch  # of INDEX
    token_batches: np.ndarray  # tokens before each batch of tokens
    read_tokens: Callable[[int], np.ndarray]  # a batch by number, as a view of its file

    def column(self, name: str) -> np.ndarray:
        return self.index.column(name).to_numpy()


class Documents:
    """Documents by number. Their tokens stay in memory-mapped files."""

    def __init__(self, entries: Sequence[Entry]):
        self.entries = entries
        self.row = _joined([entry.column("row") for entry in entries])
        self.length = _joined([entry.column("length") for entry in entries])
        self.first_anchor = _joined([entry.column("first_anchor") for entry in entries])
        self._first = np.cumsum([0, *(entry.index.num_rows for entry in entries)])  # document of each entry
        self._end = [
            np.cumsum(entry.column("length"), dtype=np.int64) for entry in entries
        ]  # tokens up to each document's end

    @staticmethod
    def of(documents: Sequence[Document]) -> Documents:
        """Documents in memory, each a row of its own."""
        index, tokens = as_arrays(range(1, len(documents) + 1), documents)
        return Documents([Entry(index, np.zeros(1, np.int64), lambda _: tokens)])

    def __len__(self) -> int:
        return int(self._first[-1])

    def __getitem__(self, number: int) -> Document:
        which = int(np.searchsorted(self._first, number, "right")) - 1
        entry, within = self.entries[which], number - int(self._first[which])
        length = int(self.length[number])
        token = int(self._end[which][within]) - length
        batch = int(np.searchsorted(entry.token_batches, token, "right")) - 1
        begin = token - int(entry.token_batches[batch])
        edges, offsets = _lists(entry.index, "supervised")
        spans = edges[offsets[within] : offsets[within + 1]].reshape(-1, 2)
        return Document(entry.read_tokens(batch)[begin : begin + length], [(int(b), int(e)) for b, e in spans])

    def supervised_tokens(self, limit: int, at_least: int = 1) -> np.ndarray:
        """[len(self)]: supervised tokens among the first `limit` of each document; with `at_least` 2, how many of them
        can be anchors, since the last of a range has no supervised successor."""
        counts = np.zeros(len(self), np.int32)
        for entry, first in zip(self.entries, self._first):
            edges, offsets = _lists(entry.index, "supervised")
            for start in range(0, entry.index.num_rows, AT_ONCE):
                some = offsets[start : start + AT_ONCE + 1]
                begin, end = edges[some[0] : some[-1]].reshape(-1, 2).T
                inside = np.maximum(np.minimum(end, limit) - begin - (at_least - 1), 0)
                owner = np.repeat(np.arange(len(some) - 1), np.diff(some) // 2)
                counts[first + start :][: len(some) - 1] = np.bincount(owner, inside, minlength=len(some) - 1)
        return counts


def _joined(arrays: list[np.ndarray]) -> np.ndarray:
    return arrays[0] if len(arrays) == 1 else np.concatenate([np.zeros(0, np.int32), *arrays])


def _lists(batch: pa.RecordBatch, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Values and offsets of a column of lists; views, not copies."""
    column = batch.column(name)
    return column.values.to_numpy(), column.offsets.to_numpy()


def as_arrays(rows: Sequence[int], documents: Sequence[Document]) -> tuple[pa.RecordBatch, np.ndarray]:
    """The index of documents that came from `rows`, and their tokens one after the other."""
    edges = [np.array(document.supervised, np.int32).reshape(-1) for document in documents]
    offsets = np.cumsum([0, *map(len, edges)], dtype=np.int32)
    columns = [
        pa.array(rows, pa.int32()),
        pa.array([len(document.input_ids) for document in documents], pa.int32()),
        pa.array([next((b for b, e in d.supervised if e - b > 1), NO_ANCHOR) for d in documents], pa.int32()),
        pa.ListArray.from_arrays(offsets, np.concatenate([np.zeros(0, np.int32), *edges])),
    ]
    tokens = np.concatenate([np.zeros(0, np.int32), *(document.input_ids for document in documents)])
    return pa.RecordBatch.from_arrays(columns, schema=INDEX), tokens


class EntryWriter:
    """Writes documents into a folder, as they come."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.indices: list[pa.RecordBatch] = []
        self.content = hashlib.sha256()
        self._waiting: list[np.ndarray] = []
        self._sizes: list[int] = []

    def __enter__(self) -> EntryWriter:
        self._file = pa.OSFile(str(self.folder / "tokens.arrow"), "wb")
        self._writer = pa.ipc.new_file(self._file, TOKENS)
        return self

    def add(self, index: pa.RecordBatch, tokens: np.ndarray) -> None:
        self.indices.append(index)
        self._waiting.append(tokens)
        self.content.update(tokens.tobytes())
        for name in ("length", "supervised"):
            for buffer in index.column(name).buffers():
                self.content.update(buffer or b"")
        if sum(map(len, self._waiting)) >= TOKENS_A_BATCH:
            self._flush()

    def _flush(self) -> None:
        tokens = np.concatenate([np.zeros(0, np.int32), *self._waiting])
        self._sizes.append(len(tokens))
        self._writer.write_batch(pa.RecordBatch.from_arrays([pa.array(tokens)], schema=TOKENS))
        self._waiting = []

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._flush()
            # With the index, so that opening need not look into the tokens.
            schema = INDEX.with_metadata({TOKEN_BATCHES: json.dumps(self._sizes)})
            index = pa.Table.from_batches(self.indices, INDEX).combine_chunks()
            with pa.OSFile(str(self.folder / "documents.arrow"), "wb") as file, pa.ipc.new_file(file, schema) as writer:
                writer.write_table(index)
        self._writer.close()
        self._file.close()


def read_entry(folder: Path) -> Entry:
    """An entry that was written whole; only its index is read."""
    documents, tokens = (
        pa.ipc.open_file(pa.memory_map(str(folder / f"{name}.arrow"))) for name in ("documents", "tokens")
    )
    index = documents.get_batch(0) if documents.num_record_batches else as_arrays([], [])[0]
    sizes = json.loads(documents.schema.metadata[TOKEN_BATCHES])
    starts = np.cumsum([0, *sizes[:-1]], dtype=np.int64)
    return Entry(index, starts, lambda number: tokens.get_batch(number).column(0).to_numpy())


# ------------------------------------------------------------------------------------------------ the cache


def open_documents(
    source: Source, encoder: ChatEncoder, folder: Path, max_bad_rows: float, workers: int | None = None
) -> tuple[Entry, Summary]:
    """The documents of `source`, from the cache in `folder` or made now. Whichever process comes first makes them; the
    others wait for its lock, which the operating system releases also when it dies.

    Args:
        max_bad_rows: where a count, making them stops once more rows are bad and enough of them are listed.
        workers: processes that tokenise; by default one a core.

    Raises:
        ValueError: the source cannot be read, its rows have several shapes, or too many are bad.
    """
    made = entry_folder(folder, source, encoder)
    if not made.is_dir():
        with (
            writing(f"the cache of tokenised data in {folder}", "make room, or set data.cache_dir"),
            locked(made.with_suffix(".lock"), _say_waiting),
        ):
            if not made.is_dir():
                remove_leftovers(folder, made.name)
                with whole(made) as begun:
                    begun.mkdir()
                    _write_entry(begun, source, encoder, max_bad_rows, workers or len(os.sched_getaffinity(0)))
    with reading(f"the cache of tokenised data {made}", "delete this folder, which the next start makes anew"):
        told = json.loads((made / "summary.json").read_text())
        counters = {name: Counter(told[name]) for name in ("dropped", "unread", "noted")}
        return read_entry(made), Summary(**(told | counters))


def entry_folder(folder: Path, source: Source, encoder: ChatEncoder) -> Path:
    """Where the entry lies, made or not; its name changes with everything that its content depends on."""
    return folder / digest(source.identity(), encoder.identity, _code_version())


@cache
def _code_version() -> str:
    """Changes with the code that makes documents and with the libraries it stands on."""
    code = [(Path(__file__).parent / f"{name}.py").read_bytes() for name in CODE]
    versions = [importlib.metadata.version(name) for name in ("transformers", "tokenizers")]
    return hashlib.sha256(b"".join(code)).hexdigest() + str(versions)


def _say_waiting(_: str) -> None:
    print("waiting for another process to tokenise the data", flush=True)


def _write_entry(folder: Path, source: Source, encoder: ChatEncoder, max_bad_rows: float, workers: int) -> None:
    summary, bad = Summary(source.name), BadRows()
    with (
        EntryWriter(folder) as writer,
        tqdm(desc=f"tokenising {source.name}", unit=" rows", delay=3, leave=False) as progress,
    ):
        for encoded in _encode_all(encoder, source, workers):
            if encoded.other_shape:
                raise ValueError(f"{source.name}, {encoded.other_shape}")
            summary.shape = encoded.shape
            writer.add(encoded.index, encoded.tokens)
            for number, error in encoded.bad:
                bad.add(source.name, number, error)
            if len(bad.listed) == bad.LISTED:
                bad.refuse_above(max_bad_rows, None)
            summary.dropped += encoded.dropped
            summary.unread += encoded.unread
            summary.noted += encoded.noted
            summary.rows = encoded.last_row
            progress.update(encoded.last_row - progress.n)
    summary.bad, summary.bad_listed, summary.digest = bad.by_cause, bad.listed, writer.content.hexdigest()
    (folder / "summary.json").write_text(json.dumps(vars(summary), indent=2))


# ------------------------------------------------------------------------------------------------ on all cores


@dataclass(frozen=True)
class Encoded:
    """The documents of a chunk."""

    index: pa.RecordBatch
    tokens: np.ndarray
    last_row: int
    bad: list[tuple[int, BadRow]]
    dropped: Counter[str]
    unread: Counter[str]
    noted: Counter[str]
    shape: str  # empty as long as no row had one
    other_shape: str = ""  # names a row that has another shape than the first


def encode_chunk(encoder: ChatEncoder, chunk: Chunk, shape: str) -> Encoded:
    """Parses, renders and tokenises a chunk. Without a shape, that of its first row with one counts."""
    rows: list[int] = []
    texts: list[Text] = []
    bad: list[tuple[int, BadRow]] = []
    dropped, unread, noted = Counter[str](), Counter[str](), Counter[str]()
    other_shape = ""
    for number, row in chunk.parsed(noted):
        try:
            if isinstance(row, BadRow):
                raise row
            shape = shape or shape_of(row)
            if shape_of(row) != shape:
                other_shape = (
                    f"row {number}: it has the shape '{shape_of(row)}', the rows before it '{shape}'; split the file,"
                    " or bring its rows to one shape"
                )
                break
            read = read_row(row)
            made = encoder.texts(read)
        except BadRow as error:
            bad.append((number, error))
            continue
        except RecursionError:
            bad.append((number, BadRow("nested too deeply: no template can render it")))
            continue
        if not made:
            dropped["no assistant turn"] += 1
        unread.update(encoder.unread(read))
        if encoder.goes_on(read):
            noted["row with an answer that goes on behind its end of turn, and is taught up to that"] += 1
        rows += [number] * len(made)
        texts += made
    documents, unknown = encoder.tokenise(texts), dict[int, BadRow]()
    for number, document in zip(rows, documents):
        try:
            encoder.refuse_unknown(document.input_ids)
        except BadRow as error:
            unknown[number] = error
    if unknown:
        bad = sorted([*bad, *unknown.items()], key=lambda listed: listed[0])
        documents = [document for number, document in zip(rows, documents) if number not in unknown]
        rows = [number for number in rows if number not in unknown]
    index, tokens = as_arrays(rows, documents)
    return Encoded(index, tokens, chunk.first + len(chunk.rows) - 1, bad, dropped, unread, noted, shape, other_shape)


def _encode_all(encoder: ChatEncoder, source: Source, workers: int) -> Iterator[Encoded]:
    """Encodes a source's chunks in their order."""
    with Workers(encoder, workers, CHUNKS_ALONE) as pool:
        chunks = source.chunks(lambda lines: pool.map(_look, lines))
        shape = ""
        while not shape and (chunk := next(chunks, None)):  # the first row says the shape of all
            encoded = encode_chunk(encoder, chunk, shape)
            shape = encoded.shape
            yield encoded
        yield from pool.map(partial(encode_chunk, shape=shape), chunks)


def _look(_: ChatEncoder, chunk: Chunk) -> Padding:
    return chunk.look()
