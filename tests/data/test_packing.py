from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from dflash_dist.batch import may_be_anchor
from dflash_dist.data.account import Account
from dflash_dist.data.chat import Document
from dflash_dist.data.documents import Documents
from dflash_dist.data.packing import (
    ROW_ORDER,
    SOURCE_SHARE,
    TRAINING_ANCHORS,
    VALIDATION_ANCHORS,
    PackedRows,
    _epoch_order,
    global_rows,
    pack_best_fit,
    random_stream,
)
from dflash_dist.ranks import World

PAD = 0


def document(tokens: Sequence[int], *supervised: tuple[int, int]) -> Document:
    return Document(np.array(tokens, np.int32), list(supervised))


LONG = document([11, 12, 13], (1, 3))
SHORT = document([21, 22], (0, 1))


def pack(
    documents: Sequence[Document],
    seq_len: int,
    pad_id: int = PAD,
    chosen: Sequence[int] | None = None,
    digests: Sequence[str] = ("content",),
    **options: bool,
) -> PackedRows:
    numbers = np.arange(len(documents)) if chosen is None else np.array(chosen)
    held = Documents.of(documents)
    held.accounts = [Account(digest=digest) for digest in digests]
    return PackedRows(held, numbers, seq_len, pad_id, **options)


def unique_documents(lengths: Sequence[int]) -> list[Document]:
    """Documents in which no token occurs twice, none of them the padding; every third token is not supervised."""
    ends = np.cumsum(lengths).tolist()
    spans = [range(end - length + 1, end + 1) for end, length in zip(ends, lengths)]
    return [document(span, *((k, k + 2) for k in range(0, len(span) - 1, 3))) for span in spans]


def chat_lengths(seed: int, capacity: int) -> np.ndarray:
    """Lengths as chat data has them: most of a few hundred tokens, a few that fill a row."""
    drawn = np.random.default_rng(seed).lognormal(mean=6.0, sigma=0.9, size=2000)
    return drawn.clip(8, capacity).astype(np.int32)


# ------------------------------------------------------------------------------------------------ rows


def test_a_packed_row_reads_as_written():
    batch = pack([LONG, SHORT], seq_len=7, pad_id=99).batch([0])
    assert batch.input_ids.tolist() == [[11, 12, 13, 21, 22, 99, 99]]
    assert batch.filled == [5]
    assert batch.loss_mask.tolist() == [[False, True, True, True, False, False, False]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 0, 1]]
    assert batch.document_ids.tolist() == [[0, 0, 0, 1, 1, 2, 2]]


def test_a_full_row_has_no_padding():
    batch = pack([LONG, SHORT], seq_len=5, pad_id=99).batch([0])
    assert batch.input_ids.tolist() == [[11, 12, 13, 21, 22]]
    assert batch.filled == [5]
    assert batch.document_ids.tolist() == [[0, 0, 0, 1, 1]]


def test_ids_and_positions_are_int64_and_masks_are_bool():
    batch = pack([SHORT, LONG], seq_len=7).batch([0])
    assert {batch.input_ids.dtype, batch.position_ids.dtype, batch.document_ids.dtype} == {torch.int64}
    assert batch.loss_mask.dtype == torch.bool


def test_a_token_that_equals_the_padding_still_counts_as_text():
    batch = pack([document([PAD, 5], (0, 2))], seq_len=3).batch([0])
    assert batch.filled == [2]
    assert batch.loss_mask.tolist() == [[True, True, False]]


def slow_row(documents: Sequence[Document], seq_len: int, pad_id: int) -> list[tuple[int, bool, int, int]]:
    """Token by token: token, whether it is supervised, position, document."""
    cells = []
    for number, held in enumerate(documents):
        for position, token in enumerate(held.input_ids.tolist()):
            if position < seq_len:
                supervised = any(begin <= position < end for begin, end in held.supervised)
                cells.append((token, supervised, position, number))
    padding = seq_len - len(cells)
    return cells + [(pad_id, False, position, len(documents)) for position in range(padding)]


@pytest.mark.parametrize("several", [True, False])
def test_batches_are_those_of_a_slow_reference(several):
    documents = unique_documents([4, 3, 2, 4, 1, 9, 8, 12, 5])
    rows = pack(documents, seq_len=8, chosen=[0, 1, 2, 3, 4, 5, 6, 7, 8, 1, 7], pack=several)
    asked = [2, 0, len(rows), len(rows) - 1, 1]
    batch = rows.batch(asked)
    fields = (batch.input_ids, batch.loss_mask, batch.position_ids, batch.document_ids)
    read = [list(zip(*(field[row].tolist() for field in fields))) for row in range(len(asked))]
    assert read == [slow_row(list(rows.row(index)), 8, PAD) for index in asked]
    held = [[min(len(each.input_ids), 8) for each in rows.row(index)] for index in asked]
    assert batch.filled == [sum(lengths) for lengths in held] and batch.place.rows == asked


@pytest.mark.parametrize("several", [True, False])
def test_a_rows_anchors_are_those_that_blocks_are_drawn_from(several):
    """Counted by ranges and by masks; also where ranges touch, or only rows or documents do."""
    documents = [
        *unique_documents([4, 3, 2, 1, 9, 12]),
        *(document(range(5), *spans) for spans in ([(0, 2), (2, 5)], [(0, 1), (1, 2)], [(0, 1), (4, 5)], [])),
    ]
    rows = pack(documents, seq_len=8, chosen=[*range(len(documents)), 4, 7], pack=several)
    batch = rows.batch(range(len(rows)))
    assert rows.anchors.tolist() == may_be_anchor(batch.loss_mask, batch.document_ids).sum(dim=1).tolist()


def texts_in(rows: PackedRows) -> list[list[list[int]]]:
    """By row, the tokens of each document in it."""
    return [[held.input_ids.tolist() for held in rows.row(index)] for index in range(len(rows))]


def test_every_chosen_document_is_there_as_often_as_it_is_chosen():
    documents = unique_documents(chat_lengths(0, 2048).tolist())
    chosen = [*range(0, 2000, 2), 0, 4, 4]
    rows = pack(documents, seq_len=2048, chosen=chosen)
    found = [text for row in texts_in(rows) for text in row]
    assert sorted(found) == sorted(documents[number].input_ids.tolist() for number in chosen)
    assert all(sum(map(len, row)) <= 2048 for row in texts_in(rows))


def test_a_document_longer_than_a_row_is_cut_at_the_end_and_never_split():
    rows = pack([SHORT, document(range(1, 10), (3, 9)), SHORT], seq_len=4)
    batch = rows.batch(range(len(rows)))
    assert batch.input_ids.tolist() == [[1, 2, 3, 4], [21, 22, 21, 22]]
    assert batch.loss_mask.tolist() == [[False, False, False, True], [True, False, True, False]]
    assert rows.filled == 1.0


def test_without_packing_every_document_has_a_row_in_the_order_chosen():
    rows = pack([SHORT, LONG], seq_len=4, chosen=[0, 1, 0], pack=False)
    assert rows.batch([0, 1, 2]).input_ids.tolist() == [[21, 22, PAD, PAD], [11, 12, 13, PAD], [21, 22, PAD, PAD]]


def test_an_index_past_the_end_gives_a_row_of_padding():
    rows = pack([LONG], seq_len=4, pad_id=99)
    batch = rows.batch([1, 0, 7])
    for row in (0, 2):
        assert batch.input_ids[row].tolist() == [99, 99, 99, 99]
        assert batch.position_ids[row].tolist() == [0, 1, 2, 3]
        assert batch.document_ids[row].tolist() == [0, 0, 0, 0]
        assert batch.filled[row] == 0
        assert not batch.loss_mask[row].any()
    assert batch.input_ids[1].tolist() == [11, 12, 13, 99]


def test_a_batch_gives_the_rows_in_the_order_asked_for():
    rows = pack([LONG, SHORT], seq_len=3, pad_id=99)
    assert rows.batch([1, 0, 1]).input_ids.tolist() == [[21, 22, 99], [11, 12, 13], [21, 22, 99]]


# ------------------------------------------------------------------------------------------------ best fit


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """By row, the documents that it holds."""
    row_of = pack_best_fit(np.array(lengths, np.int32), capacity)
    return [np.flatnonzero(row_of == row).tolist() for row in range(row_of.max() + 1)]


def test_the_longest_document_comes_first_and_goes_into_the_fullest_row_that_holds_it():
    # 6 opens row 0, 5 opens row 1, 4 fills row 0, 3 and 2 fill row 1.
    assert best_fit([6, 3, 4, 5, 2], capacity=10) == [[0, 2], [1, 3, 4]]
    # 8 opens row 0, 7 opens row 1, 2 fits both and fills row 0.
    assert best_fit([7, 8, 2], capacity=10) == [[1, 2], [0]]


def test_equal_documents_keep_their_order():
    assert best_fit([3, 3, 3], capacity=6) == [[0, 1], [2]]


def slow_best_fit(lengths: Sequence[int], capacity: int) -> int:
    """How many rows best-fit decreasing takes; looks at every row for every document."""
    free: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [row for row in range(len(free)) if free[row] >= length]
        if not fitting:
            fitting = [len(free)]
            free.append(capacity)
        free[min(fitting, key=free.__getitem__)] -= length
    return len(free)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("capacity", "longest"), [(1, 1), (7, 7), (100, 60), (3072, 3072)])
def test_rows_are_as_few_as_a_slow_reference_needs_and_none_is_overfull(seed, capacity, longest):
    lengths = np.random.default_rng(seed).integers(1, longest, size=300, endpoint=True)
    rows = best_fit(lengths.tolist(), capacity)
    assert len(rows) == slow_best_fit(lengths.tolist(), capacity)
    assert sorted(number for row in rows for number in row) == list(range(300))
    assert all(0 < lengths[row].sum() <= capacity for row in rows)


@pytest.mark.parametrize("seed", range(5))
def test_chat_lengths_fill_at_least_98_percent_of_the_rows(seed):
    lengths = chat_lengths(seed, 3072)
    assert int(lengths.sum()) / ((pack_best_fit(lengths, 3072).max() + 1) * 3072) >= 0.98


def test_the_share_that_is_filled_is_what_is_not_padding():
    rows = pack(unique_documents([4, 3, 2, 9, 1]), seq_len=8)
    assert rows.filled == sum(rows.batch(range(len(rows))).filled) / 24 == 18 / 24


@pytest.mark.parametrize("lengths", [[4], [2, 0], []])
def test_a_document_that_no_row_holds_is_a_bug(lengths):
    with pytest.raises(AssertionError, match="a row holds 1 to 3 tokens"):
        pack_best_fit(np.array(lengths, np.int32), capacity=3)


# ------------------------------------------------------------------------------------------------ fingerprints


def test_the_fingerprint_is_the_same_for_the_same_documents():
    assert pack([LONG, SHORT], 4).fingerprint == pack([LONG, SHORT], 4).fingerprint


@pytest.mark.parametrize(
    "changed",
    [
        pytest.param(pack([LONG, SHORT, SHORT], 5, digests=["other"]), id="what the documents hold"),
        pytest.param(pack([LONG, SHORT, SHORT], 5, digests=["con", "tent"]), id="which source holds it"),
        pytest.param(pack([LONG, SHORT, SHORT], 6), id="the length of rows"),
        pytest.param(pack([LONG, SHORT, SHORT], 4), id="where a row ends"),
        pytest.param(pack([LONG, SHORT, SHORT], 5, pack=False), id="packing"),
        pytest.param(pack([LONG, SHORT, SHORT], 5, chosen=[0, 2, 1]), id="the order"),
        pytest.param(pack([LONG, SHORT, SHORT], 5, chosen=[0, 1]), id="a document less"),
        pytest.param(pack([LONG, SHORT, SHORT], 5, chosen=[0, 1, 1]), id="another document"),
        pytest.param(pack([LONG, SHORT, SHORT], 5, chosen=[0, 1, 2, 2]), id="a document twice"),
    ],
)
def test_the_fingerprint_changes_with(changed):
    assert changed.fingerprint != pack([LONG, SHORT, SHORT], 5).fingerprint


# ------------------------------------------------------------------------------------------------ order of rows


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


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_batches_of_all_ranks_together_are_the_same_for_any_number_of_them(ranks):
    worlds = [World(rank, ranks, torch.device("cpu")) for rank in range(ranks)]
    for step in range(9):
        rows = global_rows(step, 10, 8, seed=0)
        shares = [world.share(rows) for world in worlds]
        assert {len(share) for share in shares} == {8 // ranks}
        assert [row for share in shares for row in share] == rows


def test_a_run_goes_on_with_the_same_rows_after_any_step():
    whole = [global_rows(step, 7, 4, seed=0) for step in range(12)]
    for stopped in range(12):
        _epoch_order.cache_clear()  # a new process
        assert [global_rows(step, 7, 4, seed=0) for step in range(stopped, 12)] == whole[stopped:]


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
    streams = (ROW_ORDER, TRAINING_ANCHORS, VALIDATION_ANCHORS, SOURCE_SHARE)
    drawn = {
        int(random_stream(seed, stream, step, row).integers(2**63))
        for seed in range(4)
        for stream in streams
        for step in range(4)
        for row in range(4)
    }
    assert len(drawn) == 4**4


def test_a_random_stream_repeats_whatever_else_was_drawn():
    first = random_stream(1, TRAINING_ANCHORS, 5, 2).integers(1000, size=8).tolist()
    random_stream(1, TRAINING_ANCHORS, 5, 1).integers(1000, size=99)
    np.random.seed(0)
    assert random_stream(1, TRAINING_ANCHORS, 5, 2).integers(1000, size=8).tolist() == first


def test_a_token_is_counted_in_all_documents_or_in_some_spread_over_all():
    documents = [Document(np.array([7, 5, number, 7], np.int32), []) for number in range(10)]
    rows = PackedRows(Documents.of(documents), np.arange(10), 3, pad_id=7)
    assert rows.count(7) == (11, 30), "not what is cut off"
    assert rows.count(9) == (1, 30)
    assert rows.count(5, most=4) == (4, 12)
