"""Documents -> packed rows -> batches.

Packing happens once; each epoch shuffles the rows. Which rows make a step is a pure function of the data, the seed and
the global batch size, so that resuming needs one integer and ranks only slice.
"""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch

from dflash_dist.data.chat import Document


@dataclass(frozen=True)
class PackedBatch:
    """`B` packed rows of `S` tokens on the host.

    Positions restart with each document. Padding at a row's end is a document of its own without supervision.
    """

    input_ids: torch.Tensor  # [B, S] int64
    attention_mask: torch.Tensor  # [B, S] bool, False on padding
    loss_mask: torch.Tensor  # [B, S] bool, True where supervised
    position_ids: torch.Tensor  # [B, S] int64
    document_ids: torch.Tensor  # [B, S] int64, counted within the row

    def to(self, device: torch.device) -> PackedBatch:
        return PackedBatch(*(getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)))


class PackedRows:
    """Documents packed whole into rows of `seq_len` tokens, fullest fit first.

    Args:
        documents: none longer than `seq_len`.
        seq_len: tokens a row.
        pad_id: the token that fills a row's end.
    """

    def __init__(self, documents: Sequence[Document], seq_len: int, pad_id: int):
        self.seq_len, self.pad_id = seq_len, pad_id
        lengths = np.array([len(document.input_ids) for document in documents])
        self.starts = np.concatenate([[0], np.cumsum(lengths)])
        self.input_ids = np.concatenate([np.asarray(d.input_ids, np.int32) for d in documents])
        self.loss_mask = np.concatenate([np.asarray(d.loss_mask, bool) for d in documents])
        self.rows = pack_best_fit(lengths.tolist(), seq_len)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def filled(self) -> float:
        """Share of the rows' tokens that are not padding."""
        return len(self.input_ids) / (len(self) * self.seq_len)

    def fingerprint(self) -> str:
        """Changes with any token, mask, or the way the rows are packed."""
        digest = hashlib.sha256()
        row_lengths = np.array([len(row) for row in self.rows])
        for array in (self.input_ids, self.loss_mask, self.starts, np.concatenate(self.rows), row_lengths):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()[:16]

    def batch(self, indices: Sequence[int]) -> PackedBatch:
        """The rows `indices`; an index past the end gives a row of padding."""
        shape = (len(indices), self.seq_len)
        input_ids = np.full(shape, self.pad_id, np.int64)
        real = np.zeros(shape, bool)
        loss_mask = np.zeros(shape, bool)
        position_ids = np.zeros(shape, np.int64)
        document_ids = np.zeros(shape, np.int64)
        for b, index in enumerate(indices):
            documents = self.rows[index] if index < len(self) else []
            end = 0
            for number, document in enumerate(documents):
                source = slice(self.starts[document], self.starts[document + 1])
                length = source.stop - source.start
                span = slice(end, end + length)
                input_ids[b, span] = self.input_ids[source]
                loss_mask[b, span] = self.loss_mask[source]
                position_ids[b, span] = np.arange(length)
                document_ids[b, span] = number
                end += length
            real[b, :end] = True
            position_ids[b, end:] = np.arange(self.seq_len - end)
            document_ids[b, end:] = len(documents)
        return PackedBatch(*map(torch.from_numpy, (input_ids, real, loss_mask, position_ids, document_ids)))


def pack_best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing: the longest document first, each into the fullest row that still holds it.

    Returns:
        For each row the indices of its documents.
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, row), sorted
    for document in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[document]
        assert 0 < length <= capacity, f"document {document} has {length} tokens, a row holds {capacity}"
        fit = bisect.bisect_left(room, (length, -1))
        if fit < len(room):
            free, row = room.pop(fit)
        else:
            free, row = capacity, len(rows)
            rows.append([])
        rows[row].append(document)
        bisect.insort(room, (free - length, row))
    return rows


# Independent random streams of one seed: numpy mixes the numbers of a seed sequence.
ROW_ORDER, TRAINING_ANCHORS, VALIDATION_ANCHORS = range(3)


def random_stream(seed: int, stream: int, *counters: int) -> np.random.Generator:
    """A generator that depends on nothing but its arguments."""
    return np.random.default_rng((seed, stream, *counters))


def global_rows(step: int, num_rows: int, global_batch_size: int, seed: int) -> list[int]:
    """The rows of step `step` (from 0) over all ranks: an endless stream of shuffled epochs, cut into batches."""
    rows: list[int] = []
    begin, end = step * global_batch_size, (step + 1) * global_batch_size
    for epoch in range(begin // num_rows, -(-end // num_rows)):
        order = random_stream(seed, ROW_ORDER, epoch).permutation(num_rows)
        rows += order[max(begin - epoch * num_rows, 0) : end - epoch * num_rows].tolist()
    return rows
