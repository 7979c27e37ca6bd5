"""How much a step is said to compute, against what is counted as it runs."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from dflash_dist.cost.rank import one_rank
from dflash_dist.cost.shapes import PUBLISHED
from dflash_dist.draft.kinds.dflash import DFlashDraftModel
from dflash_dist.draft.kinds.dspark import DSparkDraftModel
from dflash_dist.kernels.mask import FULL, Mask
from dflash_dist.training.workload import Workload, draft_flops, label_flops, mean_context, mean_pairs, target_flops
from tests.steps import SEQ_LEN, packed_rows, step_config
from tests.tiny import tiny_shape


def test_a_step_computes_what_is_counted_as_it_runs() -> None:
    """Of a mixture of experts on a thousand tokens, where attention is a good part; each of its parts."""
    config, anchors, block = step_config("bfloat16", micro_batches=1), 256, 16
    config = dataclasses.replace(
        config,
        target=dataclasses.replace(config.target, layer_ids=[1, 2]),
        data=dataclasses.replace(config.data, seq_len=1024),
        draft=dataclasses.replace(config.draft, block_size=block),
        loss=dataclasses.replace(config.loss, anchors=anchors),
    )
    with one_rank(config, PUBLISHED["Qwen/Qwen3-30B-A3B"](), 1) as rank:
        counted = {stage: of.flops for stage, of in rank.step().work.items()}
        rows, count = rank.rows(config), config.train.global_batch_size
        with torch.device("meta"):
            draft = DFlashDraftModel(rank.shape)
        work = Workload.of(config, rows, draft, rank.target)
    assert count * target_flops(rank.target, rows) == pytest.approx(counted["capture"], rel=0.02)
    of_draft = counted["propose"] + counted["backward"]
    assert count * draft_flops(draft, rows, anchors) == pytest.approx(of_draft, rel=0.02)
    labels = count * anchors * (block - 1)
    assert work.flops(labels) == pytest.approx(sum(counted.values()), rel=0.02)
    assert count * work.flops_a_row + labels * work.flops_a_label == work.flops(labels)


def test_what_a_kind_and_a_teacher_compute_over_the_vocabulary_is_counted_too() -> None:
    plain = step_config("bfloat16", micro_batches=1)
    config = dataclasses.replace(
        plain,
        target=dataclasses.replace(plain.target, full_depth=True),
        draft=dataclasses.replace(plain.draft, kind="dspark"),
        loss=dataclasses.replace(plain.loss, objective="decay", distance={"ce": 0.1, "tv": 1.8}),
    )
    with one_rank(config, PUBLISHED["Qwen/Qwen3-0.6B"](), 1) as rank:
        counted = rank.step().work["loss"].flops
        with torch.device("meta"):
            draft = DSparkDraftModel(rank.shape)
    with one_rank(plain, PUBLISHED["Qwen/Qwen3-0.6B"](), 1) as rank:
        of_plain = rank.step().work["loss"].flops
        with torch.device("meta"):
            plain_draft = DFlashDraftModel(rank.shape)
    assert label_flops(plain_draft, has_teacher=False) == 2 * 151_936 * 2 * 1024
    assert label_flops(draft, has_teacher=True) == 2 * 151_936 * (3 * 1024 + 3 * 256)
    assert counted / of_plain == pytest.approx((3 * 1024 + 3 * 256) / (2 * 1024), rel=1e-4)  # and confidence


def test_rows_are_counted_as_they_are_filled() -> None:
    rows, config = packed_rows(3), step_config(max_steps=6)
    lengths = np.array([96, 50, 30, 14, 50, 30, 14])
    assert mean_context(rows) == pytest.approx(sum(n * (n - 1) / 2 for n in lengths) / lengths.sum())
    assert mean_pairs(FULL, 8, rows) == pytest.approx(8 * (mean_context(rows) + 8), rel=0.05)
    assert mean_pairs(Mask(window=1, causal=True), 8, rows) == 8 * 9 / 2
    work = Workload.of(config, rows, DFlashDraftModel(tiny_shape()), None)
    assert (work.steps, work.rows, work.rows_a_step, work.tokens) == (6, 3, 4, lengths.sum())
    assert work.epochs(3) == 4 and work.tokens_seen(3) == 4 * lengths.sum() < 12 * SEQ_LEN
