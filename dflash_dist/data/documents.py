"""Sources -> tokenised documents in an Arrow cache: made once, on all cores, shared by all ranks, never held in memory.

An entry of the cache is a folder for one file or split. Its name says everything that its content depends on, so
nothing in it ever goes stale; it appears by a rename, so it is whole.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tqdm import tqdm

from dflash_dist.data.account import SAID, Account, BadRow
from dflash_dist.data.chat import ChatEncoder, Document
from dflash_dist.data.conversations import Text, read_row, shape_of
from dflash_dist.data.padding import Padding
from dflash_dist.data.sources import TOO_DEEP, Chunk, Source, digest
from dflash_dist.data.workers import Workers
from dflash_dist.files import locked, remove_leftovers, whole, writing
from dflash_dist.reading import reading

NO_LIMIT = np.iinfo(np.int32).max
SCHEMA = pa.schema(
    {
        "row": pa.int32(),  # of the source, from 1; several documents may come from one row
        "input_ids": pa.list_(pa.int32()),
        "supervised": pa.list_(pa.int32()),  # begin, end, begin, end, ...
    }
)
TOKENS_A_BATCH = 1 << 20  # in the file: few enough batches to open quickly, and small enough to sum over one by one
# A worker process imports the tokenizer's library first, which takes seconds: too long for less than this.
CHUNKS_ALONE = 8
WAITING = "waiting for another process to tokenise the data"
# The modules that decide what documents say.
CODE = ("account", "keys", "padding", "sources", "conversations", "template", "chat", "workers", "documents")


def count_anchors(spans: np.ndarray, document: np.ndarray, limit: int) -> np.ndarray:
    """How many tokens of each supervised range can be anchors: those whose next token, in the same document, is
    supervised too. That is all of a range but its last, which can be one only if the next range follows at once.

    Args:
        spans: [N, 2] ranges [begin, end) of documents, ascending within each.
        document: [N] the document of each.
        limit: tokens at which documents are cut.
    """
    begin, end = spans.T
    goes_on = np.zeros(len(spans), bool)
    goes_on[:-1] = (document[1:] == document[:-1]) & (begin[1:] == end[:-1])
    return np.maximum(np.minimum(end + goes_on, limit) - begin - 1, 0)


class Documents:
    """Documents by number. Their tokens stay in memory-mapped files.

    Args:
        entries: the documents of each source, as `open_documents` gives them.
    """

    def __init__(self, entries: Sequence[tuple[pa.Table, Account]]):
        tables, self.accounts = [table for table, _ in entries], [account for _, account in entries]
        before = np.cumsum([0, *(account.rows for account in self.accounts)]).tolist()
        rows = [first + table["row"].to_numpy() for first, table in zip(before, tables)]
        self._table = pa.concat_tables([SCHEMA.empty_table(), *tables])
        self.length = pc.list_value_length(self._table["input_ids"]).to_numpy()  # [documents] tokens
        self.row = np.concatenate([np.zeros(0, np.int32), *rows])  # [documents] where each came from, over all sources

    @staticmethod
    def of(documents: Sequence[Document]) -> Documents:
        """Documents in memory, each a row of its own."""
        batch = as_batch(range(1, len(documents) + 1), documents)
        return Documents([(pa.Table.from_batches([batch]), Account(rows=len(documents)))])

    def __len__(self) -> int:
        return len(self.length)

    def __getitem__(self, number: int) -> Document:
        ids, edges = (self._table[name][number].values.to_numpy() for name in ("input_ids", "supervised"))
        return Document(ids, list(map(tuple, edges.reshape(-1, 2).tolist())))

    def of_row(self, row: int) -> list[Document]:
        """Those that came from a row, counted over all sources."""
        return [self[int(number)] for number in np.flatnonzero(self.row == row)]

    def supervised(self, limit: int) -> np.ndarray:
        """[documents]: supervised tokens among the first `limit` of each."""
        return self._sums(lambda spans, _: np.maximum(np.minimum(spans[:, 1], limit) - spans[:, 0], 0))

    def anchors(self, limit: int) -> np.ndarray:
        """[documents]: tokens of each that can be anchors where it is cut at `limit`."""
        return self._sums(lambda spans, document: count_anchors(spans, document, limit))

    def first_anchor(self) -> int | None:
        """The earliest place that an anchor has in any of them."""
        places = [spans[count_anchors(spans, document, NO_LIMIT) > 0, 0] for spans, document in self._spans()]
        return min((int(place.min()) for place in places if len(place)), default=None)

    def _sums(self, count: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> np.ndarray:
        sums = np.zeros(len(self), np.int32)
        for spans, document in self._spans():
            np.add.at(sums, document, count(spans, document))
        return sums

    def _spans(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Supervised ranges [N, 2] and the number of the document [N] of each; batch by batch, a bound on memory."""
        first = 0
        for lists in self._table["supervised"].chunks:
            document = np.repeat(np.arange(first, first + len(lists)), np.diff(lists.offsets) // 2)
            yield lists.flatten().to_numpy().reshape(-1, 2), document
            first += len(lists)


def as_batch(rows: Sequence[int], documents: Sequence[Document]) -> pa.RecordBatch:
    """Documents that came from `rows`."""
    ids = [document.input_ids for document in documents]
    supervised = [np.array(document.supervised, np.int32).reshape(-1) for document in documents]
    columns = [pa.array(values, kind) for values, kind in zip((rows, ids, supervised), SCHEMA.types)]
    return pa.RecordBatch.from_arrays(columns, schema=SCHEMA)


def write_documents(file: Path, batches: Iterable[pa.RecordBatch]) -> str:
    """Writes documents as they come. Returns a digest of them, which their batches belong to."""
    content, waiting, tokens = hashlib.sha256(), [], 0
    with pa.OSFile(str(file), "wb") as out, pa.ipc.new_file(out, SCHEMA) as writer:
        for batch in batches:
            ids, supervised = batch["input_ids"], batch["supervised"]
            for array in (ids.values, ids.value_lengths(), supervised.offsets, supervised.values):
                content.update(array.to_numpy())
            waiting.append(batch)
            tokens += len(ids.values)
            if tokens >= TOKENS_A_BATCH:
                writer.write_batch(pa.concat_batches(waiting))
                waiting, tokens = [], 0
        if waiting:
            writer.write_batch(pa.concat_batches(waiting))
    return content.hexdigest()


# ------------------------------------------------------------------------------------------------ the cache


def open_documents(
    source: Source, encoder: ChatEncoder, folder: Path, max_bad_rows: float, workers: int | None = None
) -> tuple[pa.Table, Account]:
    """The documents of `source`, from the cache in `folder` or made now, and what became of its rows. Whichever process
    comes first makes them; the others wait for its lock, which the operating system releases also when it dies.

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
            locked(made.with_suffix(".lock"), lambda _: print(WAITING, flush=True)),
        ):
            if not made.is_dir():
                remove_leftovers(folder, made.name)
                account, cores = Account(source.name), workers or len(os.sched_getaffinity(0))
                with whole(made) as begun:
                    begun.mkdir()
                    encoded = _encoded(source, encoder, max_bad_rows, cores, account)
                    account.digest = write_documents(begun / "documents.arrow", encoded)
                    (begun / "account.json").write_text(json.dumps(vars(account), indent=2))
    with reading(f"the cache of tokenised data {made}", "delete this folder, which the next start makes anew"):
        account = Account(**json.loads((made / "account.json").read_text()))
        return pa.ipc.open_file(pa.memory_map(str(made / "documents.arrow"))).read_all(), account


def entry_folder(folder: Path, source: Source, encoder: ChatEncoder) -> Path:
    """Where the entry lies, made or not; its name changes with everything that its content depends on."""
    return folder / digest(source.identity(), encoder.identity, _code_version())


@cache
def _code_version() -> str:
    """Changes with the code that makes documents and with the libraries it stands on."""
    code = [(Path(__file__).parent / f"{name}.py").read_bytes() for name in CODE]
    versions = [importlib.metadata.version(name) for name in ("transformers", "tokenizers")]
    return hashlib.sha256(b"".join(code)).hexdigest() + str(versions)


def _encoded(
    source: Source, encoder: ChatEncoder, max_bad_rows: float, workers: int, account: Account
) -> Iterator[pa.RecordBatch]:
    """The documents of a source, encoded on all cores; the account takes what became of its rows."""
    with (
        Workers(encoder, workers, CHUNKS_ALONE) as pool,
        tqdm(desc=f"tokenising {source.name}", unit=" rows", delay=3, leave=False) as progress,
    ):
        for batch, more in pool.map(encode_chunk, source.chunks(lambda chunks: pool.map(_look, chunks))):
            account.add(more)
            if len(account.shapes) > 1:
                (shape, _), (other, row) = list(account.shapes.items())[:2]
                raise ValueError(
                    f"{source.name}, row {row}: it has the shape '{other}', the rows before it '{shape}'; split the"
                    " file, or bring its rows to one shape"
                )
            if len(account.bad_listed) == SAID:
                account.refuse_above(max_bad_rows)
            progress.update(more.rows)
            yield batch


def encode_chunk(encoder: ChatEncoder, chunk: Chunk) -> tuple[pa.RecordBatch, Account]:
    """Parses, renders and tokenises a chunk."""
    account, bad = Account(chunk.source, len(chunk.rows)), dict[int, BadRow]()
    rows: list[int] = []
    texts: list[Text] = []
    for number, row in chunk.parsed(account.noted):
        try:
            if isinstance(row, dict):
                account.shapes.setdefault(shape_of(row), number)
            read = read_row(row)
            made = encoder.texts(read)
        except (BadRow, RecursionError) as error:
            bad[number] = error if isinstance(error, BadRow) else BadRow(TOO_DEEP)
            continue
        if not made:
            account.dropped["no assistant turn"] += 1
        account.unread.update(encoder.unread(read))
        if encoder.goes_on(read):
            account.noted["row with an answer that goes on behind its end of turn, and is taught up to that"] += 1
        rows += [number] * len(made)
        texts += made
    documents = list(zip(rows, encoder.tokenise(texts)))
    for number, document in documents:
        try:
            encoder.refuse_unknown(document.input_ids)
        except BadRow as error:
            bad[number] = error
    for number in sorted(bad):
        account.add_bad(number, bad[number])
    documents = [(number, document) for number, document in documents if number not in bad]
    return as_batch([number for number, _ in documents], [document for _, document in documents]), account


def _look(_: ChatEncoder, chunk: Chunk) -> Padding:
    return chunk.look()
