from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from dflash_dist.data.chat import Document
from dflash_dist.data.packing import (
    ROW_ORDER,
    TRAINING_ANCHORS,
    VALIDATION_ANCHORS,
    PackedRows,
    global_rows,
    pack_best_fit,
    random_stream,
)

PAD = 0
LONG = Document([11, 12, 13], [False, True, True])
SHORT = Document([21, 22], [True, False])


def unique_documents(lengths: Sequence[int]) -> list[Document]:
    """Documents in which no token occurs twice, none of them the padding; every third token is not supervised."""
    ends = np.cumsum(lengths)
    spans = [range(end - length + 1, end + 1) for end, length in zip(ends.tolist(), lengths)]
    return [Document(list(span), [token % 3 > 0 for token in span]) for span in spans]


def chat_lengths() -> list[int]:
    """Lengths as chat data has them: most of a few hundred tokens, a few that fill a row of 2048."""
    drawn = np.random.default_rng(0).lognormal(mean=6.0, sigma=0.9, size=2000)
    return drawn.clip(8, 2048).astype(int).tolist()


def documents_in(rows: PackedRows) -> list[Document]:
    """The documents read back from all rows, split where the document id changes."""
    batch = rows.batch(range(len(rows)))
    found = []
    for row in range(len(rows)):
        real = batch.attention_mask[row]
        for number in batch.document_ids[row][real].unique():
            here = real & (batch.document_ids[row] == number)
            found.append(Document(batch.input_ids[row][here].tolist(), batch.loss_mask[row][here].tolist()))
    return found


def test_a_packed_row_reads_as_written():
    batch = PackedRows([SHORT, LONG], seq_len=7, pad_id=99).batch([0])
    assert batch.input_ids.tolist() == [[11, 12, 13, 21, 22, 99, 99]]
    assert batch.attention_mask.tolist() == [[True, True, True, True, True, False, False]]
    assert batch.loss_mask.tolist() == [[False, True, True, True, False, False, False]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 0, 1]]
    assert batch.document_ids.tolist() == [[0, 0, 0, 1, 1, 2, 2]]


def test_a_full_row_has_no_padding():
    batch = PackedRows([SHORT, LONG], seq_len=5, pad_id=99).batch([0])
    assert batch.input_ids.tolist() == [[11, 12, 13, 21, 22]]
    assert batch.attention_mask.all()
    assert batch.document_ids.tolist() == [[0, 0, 0, 1, 1]]


def test_ids_and_positions_are_int64_and_masks_are_bool():
    batch = PackedRows([SHORT, LONG], seq_len=7, pad_id=PAD).batch([0])
    assert {batch.input_ids.dtype, batch.position_ids.dtype, batch.document_ids.dtype} == {torch.int64}
    assert {batch.attention_mask.dtype, batch.loss_mask.dtype} == {torch.bool}


def test_a_token_that_equals_the_padding_still_counts_as_text():
    batch = PackedRows([Document([PAD, 5], [True, True])], seq_len=3, pad_id=PAD).batch([0])
    assert batch.attention_mask.tolist() == [[True, True, False]]
    assert batch.loss_mask.tolist() == [[True, True, False]]


def test_every_document_is_whole_and_there_exactly_once():
    documents = unique_documents(chat_lengths())
    found = documents_in(PackedRows(documents, seq_len=2048, pad_id=PAD))
    assert sorted(found, key=lambda document: document.input_ids) == documents


def test_positions_restart_with_every_document_and_with_the_padding():
    batch = PackedRows(unique_documents([4, 3, 2, 4, 1]), seq_len=8, pad_id=PAD).batch([0, 1])
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2, 3], [0, 1, 2, 0, 1, 0, 0, 1]]


def test_chat_lengths_fill_at_least_98_percent_of_the_rows():
    lengths = chat_lengths()
    rows = PackedRows(unique_documents(lengths), seq_len=2048, pad_id=PAD)
    padding = int((~rows.batch(range(len(rows))).attention_mask).sum())
    assert rows.filled == sum(lengths) / (len(rows) * 2048)
    assert padding == len(rows) * 2048 - sum(lengths)
    assert rows.filled >= 0.98


def test_an_index_past_the_end_gives_a_row_of_padding():
    rows = PackedRows([LONG], seq_len=4, pad_id=99)
    batch = rows.batch([1, 0, 7])
    for row in (0, 2):
        assert batch.input_ids[row].tolist() == [99, 99, 99, 99]
        assert batch.position_ids[row].tolist() == [0, 1, 2, 3]
        assert batch.document_ids[row].tolist() == [0, 0, 0, 0]
        assert not batch.attention_mask[row].any()
        assert not batch.loss_mask[row].any()
    assert batch.input_ids[1].tolist() == [11, 12, 13, 99]


def test_a_batch_gives_the_rows_in_the_order_asked_for():
    rows = PackedRows([LONG, SHORT], seq_len=3, pad_id=99)
    assert rows.batch([1, 0, 1]).input_ids.tolist() == [[21, 22, 99], [11, 12, 13], [21, 22, 99]]


def test_the_longest_document_comes_first_and_goes_into_the_fullest_row_that_holds_it():
    # 6 opens row 0, 5 opens row 1, 4 fills row 0, 3 and 2 fill row 1.
    assert pack_best_fit([6, 3, 4, 5, 2], capacity=10) == [[0, 2], [3, 1, 4]]
    # 8 opens row 0, 7 opens row 1, 2 fits both and fills row 0.
    assert pack_best_fit([7, 8, 2], capacity=10) == [[1, 2], [0]]


def test_equal_documents_keep_their_order():
    assert pack_best_fit([3, 3, 3], capacity=6) == [[0, 1], [2]]


@pytest.mark.parametrize("lengths", [[4], [2, 0]])
def test_a_document_that_no_row_holds_is_a_bug(lengths):
    with pytest.raises(AssertionError, match="a row holds 3"):
        pack_best_fit(lengths, capacity=3)


def test_the_fingerprint_is_the_same_for_the_same_documents():
    first = PackedRows([LONG, SHORT], seq_len=4, pad_id=PAD).fingerprint()
    again = PackedRows([Document([11, 12, 13], [False, True, True]), Document([21, 22], [True, False])], 4, PAD)
    assert again.fingerprint() == first


@pytest.mark.parametrize(
    "documents",
    [
        pytest.param([Document([11, 12, 14], [False, True, True]), SHORT], id="a token"),
        pytest.param([Document([11, 12, 13], [True, True, True]), SHORT], id="a mask"),
        pytest.param([SHORT, LONG], id="the order"),
        pytest.param([LONG], id="a document less"),
        pytest.param([Document([11, 12, 13, 21], [False, True, True, True]), Document([22], [False])], id="a boundary"),
    ],
)
def test_the_fingerprint_changes_with(documents):
    before = PackedRows([LONG, SHORT], seq_len=5, pad_id=PAD).fingerprint()
    assert PackedRows(documents, seq_len=5, pad_id=PAD).fingerprint() != before


def test_the_fingerprint_changes_with_where_a_row_ends():
    documents = [LONG, SHORT]
    together, apart = PackedRows(documents, seq_len=5, pad_id=PAD), PackedRows(documents, seq_len=4, pad_id=PAD)
    assert (together.rows, apart.rows) == ([[0, 1]], [[0], [1]])
    assert together.fingerprint() != apart.fingerprint()


def stream_of(steps: int, num_rows: int, global_batch_size: int, seed: int = 0) -> list[int]:
    """The rows of the first steps, one after another."""
    return [row for step in range(steps) for row in global_rows(step, num_rows, global_batch_size, seed)]


@pytest.mark.parametrize(
    ("num_rows", "global_batch_size"),
    [
        pytest.param(12, 4, id="epochs end with a batch"),
        pytest.param(5, 3, id="epochs end inside a batch"),
        pytest.param(3, 8, id="a batch is larger than the data set"),
        pytest.param(1, 2, id="one row"),
    ],
)
def test_every_row_comes_exactly_once_an_epoch(num_rows, global_batch_size):
    rows = stream_of(num_rows, num_rows, global_batch_size)  # as many epochs as a batch has rows
    epochs = [rows[start : start + num_rows] for start in range(0, len(rows), num_rows)]
    assert len(epochs) == global_batch_size
    assert all(sorted(epoch) == list(range(num_rows)) for epoch in epochs)


def test_every_step_has_the_whole_batch():
    assert [len(global_rows(step, 5, 3, seed=0)) for step in range(7)] == [3] * 7
    assert len(global_rows(2, 3, 20, seed=0)) == 20


def test_the_rows_of_a_step_depend_on_nothing_but_the_arguments():
    before = global_rows(17, 40, 6, seed=3)
    np.random.seed(1)
    torch.manual_seed(1)
    global_rows(0, 40, 6, seed=3)
    assert global_rows(17, 40, 6, seed=3) == before


def test_the_stream_of_rows_does_not_depend_on_how_it_is_cut_into_batches():
    assert stream_of(12, 7, 2) == stream_of(8, 7, 3) == stream_of(1, 7, 24)


def test_epochs_and_seeds_shuffle_differently():
    first, second = global_rows(0, 64, 64, seed=0), global_rows(1, 64, 64, seed=0)
    other_seed = global_rows(0, 64, 64, seed=1)
    orders = [list(range(64)), first, second, other_seed]
    assert len({tuple(order) for order in orders}) == 4


def test_random_streams_of_different_arguments_differ():
    streams = (ROW_ORDER, TRAINING_ANCHORS, VALIDATION_ANCHORS)
    drawn = {
        int(random_stream(seed, stream, step, row).integers(2**63))
        for seed in range(4)
        for stream in streams
        for step in range(4)
        for row in range(4)
    }
    assert len(drawn) == 4 * 3 * 4 * 4


def test_a_random_stream_repeats_whatever_else_was_drawn():
    first = random_stream(1, TRAINING_ANCHORS, 5, 2).integers(1000, size=8).tolist()
    random_stream(1, TRAINING_ANCHORS, 5, 1).integers(1000, size=99)
    np.random.seed(0)
    assert random_stream(1, TRAINING_ANCHORS, 5, 2).integers(1000, size=8).tolist() == first
