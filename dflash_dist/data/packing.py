"""Documents -> packed rows -> batches.

Packing happens once; each epoch shuffles the rows. Which rows make a step is a pure function of the data, the seed and
the global batch size, so that resuming needs one integer and ranks only slice.
"""

from __future__ import annotations

import bisect
import hashlib
import math
from collections.abc import Iterator, Sequence
from functools import cached_property, lru_cache

import numpy as np
import torch

from dflash_dist.batch import Batch, Place
from dflash_dist.data.chat import Document
from dflash_dist.data.documents import Documents


class PackedRows:
    """Documents laid whole into rows of `seq_len` tokens; longer ones are cut at the end.

    Args:
        documents: where the tokens are; not held in memory.
        chosen: numbers of the documents to lay out; one that is named twice is laid out twice.
        seq_len: tokens a row.
        pad_id: the token that fills a row's end.
        pack: several documents a row, the fullest fit first; otherwise one a row.
    """

    def __init__(self, documents: Documents, chosen: np.ndarray, seq_len: int, pad_id: int, pack: bool = True):
        self.documents, self.seq_len, self.pad_id, self.packs = documents, seq_len, pad_id, pack
        lengths = np.minimum(documents.length[chosen], seq_len)
        row_of = pack_best_fit(lengths, seq_len) if pack else np.arange(len(chosen), dtype=np.int32)
        by_row = np.argsort(row_of, kind="stable")
        self.chosen, self.lengths = chosen[by_row], lengths[by_row]  # in the order of the rows
        self.starts = np.concatenate([[0], np.cumsum(np.bincount(row_of))])

    def __len__(self) -> int:
        return len(self.starts) - 1

    def packed(self) -> PackedRows:
        """The same documents, several a row."""
        return PackedRows(self.documents, self.chosen, self.seq_len, self.pad_id)

    @property
    def conversations(self) -> int:
        return len(np.unique(self.documents.row[self.chosen]))

    @property
    def filled_tokens(self) -> np.ndarray:
        """[rows]: tokens that are not padding."""
        return self._by_row(self.lengths)

    @property
    def tokens(self) -> int:
        """Those that are not padding."""
        return int(self.lengths.sum(dtype=np.int64))

    @cached_property
    def supervised(self) -> int:
        """Tokens that are."""
        return int(self.documents.supervised(self.seq_len)[self.chosen].sum(dtype=np.int64))

    @cached_property
    def anchors(self) -> np.ndarray:
        """[rows]: tokens that can be an anchor."""
        return self._by_row(self.documents.anchors(self.seq_len)[self.chosen])

    def _by_row(self, counts: np.ndarray) -> np.ndarray:
        return np.add.reduceat(counts, self.starts[:-1], dtype=np.int64)

    @property
    def filled(self) -> float:
        """Share of the rows' tokens that are not padding."""
        return self.tokens / (len(self) * self.seq_len)

    @property
    def fingerprint(self) -> str:
        """Changes with any token of the documents, and with the way they are laid out."""
        content = tuple(account.digest for account in self.documents.accounts)
        state = hashlib.sha256(repr((content, self.seq_len)).encode())
        for array in (self.chosen, self.starts):
            state.update(array.astype(np.int64).tobytes())
        return state.hexdigest()[:16]

    def describe(self) -> str:
        """One line."""
        return (
            f"{self.conversations:,} conversations -> {len(self.chosen):,} documents, {self.tokens:,} tokens"
            f" ({self.supervised / self.tokens:.0%} supervised)"
            f" -> {len(self):,} rows of {self.seq_len}, {self.filled:.1%} filled"
        )

    def count(self, token: int, most: int = 20_000) -> tuple[int, int]:
        """How often a token stands in the documents, and among how many tokens it was looked for: all, or those of at
        most `most` documents, spread over all."""
        found = tokens = 0
        for number in self.chosen[:: math.ceil(len(self.chosen) / most)].tolist():
            ids = self.documents[number].input_ids[: self.seq_len]
            found, tokens = found + int(np.count_nonzero(ids == token)), tokens + len(ids)
        return found, tokens

    def row(self, index: int) -> Iterator[Document]:
        """The documents of a row, whole; an index past the end gives none."""
        if index < len(self):
            for number in self.chosen[self.starts[index] : self.starts[index + 1]]:
                yield self.documents[int(number)]

    def batch(self, indices: Sequence[int], part: str = "") -> Batch:
        """The rows `indices` of a `part` of the data, on the host and without blocks; an index past the end gives a row
        of padding."""
        shape = (len(indices), self.seq_len)
        input_ids = np.full(shape, self.pad_id, np.int64)
        loss_mask = np.zeros(shape, bool)
        document_ids, position_ids = (np.zeros(shape, np.int64) for _ in range(2))
        filled = []
        for b, index in enumerate(indices):
            end, count = 0, 0
            for count, document in enumerate(self.row(index), 1):
                length = min(len(document.input_ids), self.seq_len)
                span = slice(end, end + length)
                input_ids[b, span] = document.input_ids[:length]
                loss_mask[b, span] = document.loss_mask[:length]
                position_ids[b, span] = np.arange(length)
                document_ids[b, span] = count - 1
                end += length
            position_ids[b, end:] = np.arange(self.seq_len - end)
            document_ids[b, end:] = count
            filled.append(end)
        ids, mask, documents, positions = map(torch.from_numpy, (input_ids, loss_mask, document_ids, position_ids))
        return Batch.of_rows(ids, mask, documents, positions, Place(part, list(indices)), filled)


def pack_best_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Best-fit decreasing: the longest document first, each into a fullest row that still holds it.

    Rows are kept by their free tokens, of which there are at most `capacity` kinds: a million documents take seconds.

    Returns:
        [len(lengths)] int32: the row of each document.
    """
    assert len(lengths) and lengths.min() > 0 and lengths.max() <= capacity, f"a row holds 1 to {capacity} tokens"
    row_of = np.zeros(len(lengths), np.int32)
    rows_with: dict[int, list[int]] = {}  # free tokens -> rows
    kinds: list[int] = []  # the keys of `rows_with`, sorted
    count = 0
    order = np.argsort(-lengths, kind="stable").astype(np.int32)
    for document, length in zip(memoryview(order.data), memoryview(lengths[order].data)):
        fit = bisect.bisect_left(kinds, length)
        if fit < len(kinds):
            free = kinds[fit]
            row = rows_with[free].pop()
            if not rows_with[free]:
                del rows_with[free], kinds[fit]
        else:
            free, row = capacity, count
            count += 1
        row_of[document] = row
        free -= length
        if free:
            if free not in rows_with:
                rows_with[free] = []
                bisect.insort(kinds, free)
            rows_with[free].append(row)
    return row_of


# Independent random streams of one seed: numpy mixes the numbers of a seed sequence.
ROW_ORDER, TRAINING_ANCHORS, VALIDATION_ANCHORS, SOURCE_SHARE = range(4)


def random_stream(seed: int, stream: int, *counters: int) -> np.random.Generator:
    """A generator that depends on nothing but its arguments."""
    return np.random.default_rng((seed, stream, *counters))


def global_rows(step: int, num_rows: int, global_batch_size: int, seed: int) -> list[int]:
    """The rows of step `step` (from 0) over all ranks: an endless stream of shuffled epochs, cut into batches."""
    rows: list[int] = []
    begin, end = step * global_batch_size, (step + 1) * global_batch_size
    for epoch in range(begin // num_rows, -(-end // num_rows)):
        order = _epoch_order(seed, epoch, num_rows)
        rows += order[max(begin - epoch * num_rows, 0) : end - epoch * num_rows].tolist()
    return rows


@lru_cache(maxsize=4)
def _epoch_order(seed: int, epoch: int, num_rows: int) -> np.ndarray:
    return random_stream(seed, ROW_ORDER, epoch).permutation(num_rows)
