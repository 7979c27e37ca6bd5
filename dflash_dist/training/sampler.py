"""Which rows a rank works on, with the blocks sampled from them. All on the host, before any forward."""

from __future__ import annotations

import math
import time

from dflash_dist.batch import Batch, sample_blocks
from dflash_dist.config import Config
from dflash_dist.data.packing import (
    TRAINING_ANCHORS,
    VALIDATION_ANCHORS,
    PackedRows,
    global_rows,
    random_stream,
)
from dflash_dist.objective.weights import decay_weights
from dflash_dist.ranks import World
from dflash_dist.training.context import HELD_OUT, TRAIN


class Sampler:
    """Gives a rank its micro-batches, whatever the number of ranks: a row's anchors depend on the step and on the row's
    place in the global batch.

    Args:
        rows: packed rows to train on.
        held_out: packed rows to validate on, if any.
    """

    def __init__(self, config: Config, world: World, rows: PackedRows, held_out: PackedRows | None):
        self.config, self.world, self.rows, self.held_out_rows = config, world, rows, held_out
        self.seconds = 0.0  # spent in it

    def training(self, step: int) -> list[Batch]:
        """Of a step (from 0), with anchors drawn anew."""
        train = self.config.train
        rows = global_rows(step, len(self.rows), train.global_batch_size, train.seed)
        return self._micro_batches(TRAIN, self.rows, rows, TRAINING_ANCHORS, step)

    def held_out(self) -> list[Batch]:
        """All held-out rows, always with the same anchors. Rows past the end are padding: every rank runs as many."""
        assert self.held_out_rows is not None
        each = self.world.rows_size * self.config.train.micro_batch_size
        count = math.ceil(len(self.held_out_rows) / each) * each
        return self._micro_batches(HELD_OUT, self.held_out_rows, list(range(count)), VALIDATION_ANCHORS, 0)

    def _micro_batches(self, part: str, source: PackedRows, rows: list[int], stream: int, step: int) -> list[Batch]:
        config, batches, begun = self.config, [], time.perf_counter()
        slot_weights = decay_weights(config.draft.proposals, config.gamma)
        numbered = self.world.share(list(enumerate(rows)))
        size = config.train.micro_batch_size
        for few in (numbered[i : i + size] for i in range(0, len(numbered), size)):
            batch = sample_blocks(
                source.batch([row for _, row in few], part),
                anchors=config.loss.anchors,
                slot_weights=slot_weights,
                mask_token_id=config.mask_token_id,
                generators=[random_stream(config.train.seed, stream, step, number) for number, _ in few],
            )
            batches.append(batch)
        self.seconds += time.perf_counter() - begun
        return batches
