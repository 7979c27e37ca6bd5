from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from dflash_dist.batch import Batch, sample_blocks
from dflash_dist.objective.weights import decay_weights
from tests.reference import MASK, Rows, eligible_anchors, packed_row, random_rows, reference_blocks

BLOCKS = ("anchors", "anchor_documents", "slot_ids", "slot_positions", "labels", "weights")


def build(rows: Rows, anchors: int = 8, block_size: int = 8, gamma: float = 4.0, seed: int = 0) -> Batch:
    return sample_blocks(
        Batch.of_rows(*rows),
        anchors=anchors,
        slot_weights=decay_weights(block_size - 1, gamma),
        mask_token_id=MASK,
        generators=[np.random.default_rng([seed, row]) for row in range(len(rows.input_ids))],
    )


def used_anchors(blocks: Batch) -> list[list[int]]:
    return [index[used].tolist() for index, used in zip(blocks.anchors, blocks.anchor_documents >= 0)]


# ------------------------------------------------------------------------------------------------------------ anchors


@pytest.mark.parametrize("seed", range(20))
def test_anchors_are_eligible_sorted_distinct_and_as_many_as_there_can_be(seed):
    rows = random_rows(seed)
    blocks = build(rows, anchors=8, seed=seed)
    for b, anchors in enumerate(used_anchors(blocks)):
        allowed = eligible_anchors(rows.loss_mask[b], rows.document_ids[b])
        assert set(anchors) <= set(allowed)
        assert anchors == sorted(set(anchors))
        assert len(anchors) == min(8, len(allowed))


def test_a_row_with_no_more_candidates_than_anchors_uses_them_all():
    rows = random_rows(1)
    allowed = [eligible_anchors(mask, ids) for mask, ids in zip(rows.loss_mask, rows.document_ids)]
    assert used_anchors(build(rows, anchors=64)) == allowed
    one = rows.row(0)
    assert used_anchors(build(one, anchors=len(allowed[0]))) == allowed[:1]


def test_every_candidate_is_drawn_about_equally_often():
    rows = packed_row([0, 1, 1, 1, 0, 1, 1], [1, 1, 1], length=12)
    drawn = [anchor for seed in range(600) for anchor in used_anchors(build(rows, anchors=2, seed=seed))[0]]
    counts = {anchor: drawn.count(anchor) for anchor in set(drawn)}
    assert sorted(counts) == [1, 2, 5, 7, 8]
    # 1200 draws over 5 candidates: 240 each, with a standard deviation of 12
    assert all(abs(count - 240) < 60 for count in counts.values())


def test_the_last_supervised_token_before_a_border_is_no_anchor():
    # ends of: a turn (2), a document (5), the row (9); index 6 starts a document that touches a supervised one
    rows = packed_row([1, 1, 1, 0, 1, 1], [1, 1, 1, 1], length=10)
    assert used_anchors(build(rows, anchors=16)) == [[0, 1, 4, 6, 7, 8]]


def test_anchors_depend_on_the_rows_own_generator_only():
    rows = random_rows(5, rows=3)
    together = build(rows, anchors=6)
    for b in range(3):
        alone = sample_blocks(
            Batch.of_rows(*rows.row(b)),
            anchors=6,
            slot_weights=decay_weights(7, 4.0),
            mask_token_id=MASK,
            generators=[np.random.default_rng([0, b])],
        )
        for name in BLOCKS:
            assert torch.equal(getattr(alone, name)[0], getattr(together, name)[b]), name


def test_another_seed_draws_other_anchors():
    rows = random_rows(5)
    assert used_anchors(build(rows, seed=0)) != used_anchors(build(rows, seed=1))


# ------------------------------------------------------------------------------------------------ labels and weights


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("block_size", [2, 8, 16])
def test_every_tensor_equals_the_loop_reference(seed, block_size):
    rows = random_rows(seed)
    blocks = build(rows, anchors=10, block_size=block_size, gamma=5.0, seed=seed)
    expected = reference_blocks(rows, used_anchors(blocks), 10, block_size, gamma=5.0)
    for name in ("anchors", "anchor_documents", "slot_ids", "slot_positions", "weighted", "count"):
        assert torch.equal(torch.as_tensor(getattr(blocks, name)), torch.as_tensor(getattr(expected, name))), name
    counted = expected.weights > 0
    assert torch.equal(blocks.weights > 0, counted)
    assert torch.equal(blocks.labels[counted], expected.labels[counted])
    torch.testing.assert_close(blocks.weights, expected.weights, rtol=2e-7, atol=0)


def test_a_small_row_written_out_by_hand():
    # index      0   1   2   3   4   5   6 | 7   8   9 | 10 11
    # token     10  11  12  13  14  15  16   17  18  19   20 21
    # loss       .   x   x   x   .   x   x    x   x   .    padding
    rows = packed_row([0, 1, 1, 1, 0, 1, 1], [1, 1, 0], length=12)
    blocks = build(rows, anchors=5, block_size=4, gamma=2.0)
    one, two = 1.0, math.exp(-0.5)
    assert blocks.anchors.tolist() == [[1, 2, 5, 7, 0]]
    assert blocks.anchor_documents.tolist() == [[0, 0, 0, 1, -1]]
    assert blocks.slot_ids[0, :4].tolist() == [[11, 3, 3, 3], [12, 3, 3, 3], [15, 3, 3, 3], [17, 3, 3, 3]]
    assert blocks.slot_positions[0, :4].tolist() == [[1, 2, 3, 4], [2, 3, 4, 5], [5, 6, 7, 8], [0, 1, 2, 3]]
    assert blocks.labels[0, :4, 0].tolist() == [12, 13, 16, 18]
    assert blocks.labels[0, 0, 1] == 13
    expected = [[one, two, 0], [one, 0, 0], [one, 0, 0], [one, 0, 0], [0, 0, 0]]
    torch.testing.assert_close(blocks.weights[0], torch.tensor(expected), rtol=2e-7, atol=0)


@pytest.mark.parametrize(
    ("rows", "anchor", "labels"),
    [
        pytest.param(packed_row([1] * 5, [1] * 6, length=12), 2, [13, 14], id="document end"),
        pytest.param(packed_row([1] * 12, length=12), 9, [20, 21], id="row end"),
        # supervision that starts again within the block's reach does not count again
        pytest.param(packed_row([1, 1, 1, 0, 1, 1, 1, 1], length=12), 0, [11, 12], id="unsupervised token"),
        pytest.param(packed_row([1] * 6, length=12), 3, [14, 15], id="padding"),
        pytest.param(packed_row([1] * 12, length=12), 4, [15, 16, 17, 18, 19], id="nothing in the way"),
    ],
)
def test_labels_stop_at_the_first_border(rows, anchor, labels):
    blocks = build(rows, anchors=12, block_size=6)
    a = blocks.anchors[0].tolist().index(anchor)
    counted = blocks.weights[0, a] > 0
    assert counted.tolist() == [True] * len(labels) + [False] * (5 - len(labels))
    assert blocks.labels[0, a][counted].tolist() == labels


def test_slot_zero_is_the_real_token_and_the_others_are_the_mask_token():
    rows = random_rows(2)
    blocks = build(rows)
    assert torch.equal(blocks.slot_ids[..., 0], rows.input_ids.gather(1, blocks.anchors))
    assert (blocks.slot_ids[..., 1:] == MASK).all()
    assert blocks.slots == 8


def test_positions_are_local_to_the_document():
    rows = packed_row([1] * 5, [1] * 5, length=10)
    blocks = build(rows, anchors=10, block_size=4)
    a = blocks.anchors[0].tolist().index(7)  # the third token of the second document
    assert blocks.slot_positions[0, a].tolist() == [2, 3, 4, 5]


@pytest.mark.parametrize(("block_size", "gamma"), [(16, 7.0), (10, 5.0), (8, 4.0), (2, 1.0)])
def test_weights_are_the_papers_exponential_decay(block_size, gamma):
    weights = decay_weights(block_size - 1, gamma)
    expected = torch.tensor([math.exp(-(k - 1) / gamma) for k in range(1, block_size)])
    assert weights.dtype == torch.float32
    assert weights[0] == 1
    torch.testing.assert_close(weights, expected, rtol=1.2e-7, atol=0)  # one unit in the last place
    rows = packed_row([1] * 32, length=32)
    blocks = build(rows, anchors=4, block_size=block_size, gamma=gamma)
    full = blocks.weights[0][blocks.anchors[0] + block_size <= 32]
    assert len(full) > 0
    assert all(torch.equal(block, weights) for block in full)


# ------------------------------------------------------------------------------------------------------ fixed shapes


def test_fewer_candidates_than_anchors_leave_blocks_of_zero_weight_at_the_end():
    rows = packed_row([0, 0, 1, 1, 1], length=9)
    blocks = build(rows, anchors=6, block_size=4)
    assert blocks.anchor_documents.tolist() == [[0, 0, -1, -1, -1, -1]]
    assert (blocks.weights[0, :2, 0] > 0).all()
    assert (blocks.weights[0, 2:] == 0).all()


@pytest.mark.parametrize("mask", [[0] * 9, [0, 1, 0, 1, 0, 0, 0, 1], [0] * 8 + [1]])
def test_a_row_without_a_candidate_has_no_weight_at_all(mask):
    blocks = build(packed_row(mask, length=9), anchors=6, block_size=4)
    assert (blocks.weights == 0).all()
    assert (blocks.anchor_documents == -1).all()


def test_shapes_and_dtypes_do_not_depend_on_what_is_supervised():
    for rows in (random_rows(0, rows=2, length=9), Rows(*(torch.cat([f, f]) for f in packed_row([0] * 9, length=9)))):
        blocks = build(rows, anchors=6, block_size=4)
        assert blocks.anchors.shape == blocks.anchor_documents.shape == (2, 6)
        assert blocks.slot_ids.shape == blocks.slot_positions.shape == (2, 6, 4)
        assert blocks.labels.shape == blocks.weights.shape == (2, 6, 3)
        assert {getattr(blocks, name).dtype for name in BLOCKS} == {torch.int64, torch.float32}
        assert blocks.weights.dtype == torch.float32


def test_labels_without_weight_are_still_tokens_of_the_row():
    # the loss gathers them before the weight makes them vanish
    rows = packed_row([0] * 6 + [1] * 3, length=9)
    blocks = build(rows, anchors=6, block_size=8)
    assert blocks.labels.min() >= 10
    assert blocks.labels.max() <= 18
