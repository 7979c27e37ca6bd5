"""A training step of tiny models on rows whose documents the tests know."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from dflash_dist.config import Config, DataConfig, DraftConfig, LossConfig, TargetConfig, TrainConfig
from dflash_dist.data.chat import Document
from dflash_dist.data.documents import Documents
from dflash_dist.data.packing import PackedRows
from dflash_dist.draft.kinds.dflash import DFlashDraftModel
from dflash_dist.ranks import World
from dflash_dist.target.capture import HFDFlashTargetModel
from dflash_dist.target.run import LiveTarget
from dflash_dist.training.sampler import Sampler
from dflash_dist.training.step import TrainingStep

SEQ_LEN, ANCHORS, MICRO_BATCH = 96, 12, 2
LAYER_IDS = [1, 2, 4]  # of the tiny target's six


def step_config(precision: str = "float32", micro_batches: int = 2, **train: Any) -> Config:
    """Fits the tiny target, `tests.tiny.tiny_shape` and `packed_rows`."""
    return Config(
        target=TargetConfig(layer_ids=LAYER_IDS, dtype=precision),  # type: ignore[arg-type]
        data=DataConfig(seq_len=SEQ_LEN),
        draft=DraftConfig(mask_token_id=3, block_size=8, num_layers=2),
        loss=LossConfig(anchors=ANCHORS, objective="decay"),
        train=TrainConfig(
            global_batch_size=micro_batches * MICRO_BATCH,
            micro_batch_size=MICRO_BATCH,
            precision=precision,  # type: ignore[arg-type]
            **train,
        ),
    )


def packed_rows(count: int, vocabulary: int = 260) -> PackedRows:
    """`count` rows: one of a single document with 5 anchors, fewer than `ANCHORS`; the others of three documents, each
    supervised in two places, and padding."""
    rng = np.random.default_rng(0)

    def document(length: int, *supervised: tuple[int, int]) -> Document:
        return Document(rng.integers(10, vocabulary, length, np.int32), list(supervised))

    documents = [document(SEQ_LEN, (40, 44), (70, 73))]
    for _ in range(count - 1):
        documents += [document(50, (3, 12), (30, 50)), document(30, (9, 15), (20, 28)), document(14, (1, 4), (6, 14))]
    rows = PackedRows(Documents.of(documents), np.arange(len(documents)), SEQ_LEN, pad_id=0)
    assert [len(list(rows.row(i))) for i in range(count)] == [1] + [3] * (count - 1)
    return rows


def make_step(
    config: Config,
    world: World,
    rows: PackedRows,
    draft: DFlashDraftModel,
    decoder: Any,
    embedding: torch.Tensor,
    head: torch.Tensor,
    total_steps: int = 1000,
) -> TrainingStep:
    return TrainingStep(
        config,
        world,
        Sampler(config, world, rows, None),
        draft,
        LiveTarget(HFDFlashTargetModel(decoder, config.target.layer_ids)),
        embedding,
        head,
        total_steps,
    )
