"""A look at data before a run: some of its rows, spread over all, tokenised."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from dflash_dist.data.account import Account
from dflash_dist.data.chat import ChatEncoder
from dflash_dist.data.documents import Documents, encode_chunk
from dflash_dist.data.padding import Padding
from dflash_dist.data.sources import Chunk, find_sources

CHUNKS = 8  # that are tokenised, of 512 rows at most


@dataclass(frozen=True)
class Sample:
    rows: int  # of the data
    account: Account  # of the rows that were looked at
    documents: Documents  # from these

    @property
    def tokens(self) -> float:
        """Of all the data, to go by these rows."""
        return float(self.documents.length.sum()) * self.rows / self.account.rows

    @property
    def found(self) -> set[int]:
        """The tokens that stand in these rows."""
        return set(np.unique(np.concatenate([self.documents[i].input_ids for i in range(len(self.documents))])))

    def longest_of(self, share: float) -> int:
        """Tokens that no more than 1 - `share` of the documents exceed."""
        return int(np.quantile(self.documents.length, share, method="higher"))


def look_at(path: str, encoder: ChatEncoder) -> Sample:
    """Reads all of the data once to count its rows, and tokenises a few thousand of them.

    Raises:
        ValueError: there is no such data, it cannot be read, or nothing in it can be learned from.
    """
    sources = find_sources(path)
    total, account, batches = 0, Account(path), list[pa.RecordBatch]()
    counts = [_count(source.chunks(_first)) for source in sources]
    each = max(CHUNKS // len(sources), 1)
    looked_into = {number * len(sources) // CHUNKS for number in range(CHUNKS)}
    for number, (source, (chunks, rows)) in enumerate(zip(sources, counts)):
        total += rows
        if number in looked_into:
            wanted = {k * chunks // each for k in range(each)}
            for place, chunk in enumerate(source.chunks(_first)):
                if place in wanted:
                    batch, more = encode_chunk(encoder, chunk)
                    account.add(more)
                    batches.append(batch)
    documents = Documents([(pa.Table.from_batches(batches), account)])
    if not documents.anchors(int(documents.length.max(initial=1))).any():
        why = "".join(f"; {count} x {cause}" for cause, count in (account.bad + account.dropped).items())
        raise ValueError(
            f"nothing in {path} can be learned from, to go by {account.rows} of its rows{why}. Prompts are answered by"
            " the target first: python -m dflash_dist regenerate --target TARGET --prompts THESE --out ANSWERS"
        )
    return Sample(total, account, documents)


def _count(chunks: Iterator[Chunk]) -> tuple[int, int]:
    """Chunks and rows."""
    sizes = [len(chunk.rows) for chunk in chunks]
    return len(sizes), sum(sizes)


def _first(chunks: Iterator[Chunk]) -> Iterable[Padding]:
    """What the first rows tell of nulls is enough here."""
    return map(Chunk.look, itertools.islice(chunks, 1))
