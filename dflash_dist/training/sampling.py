"""Which rows a rank works on, with the blocks sampled from them. All on the host, before any forward."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from dflash_dist.config import Config
from dflash_dist.data.packing import (
    TRAINING_ANCHORS,
    VALIDATION_ANCHORS,
    PackedBatch,
    PackedRows,
    global_rows,
    random_stream,
)
from dflash_dist.draft.blocks import Blocks, build_blocks
from dflash_dist.draft.objective import WeightedSlots
from dflash_dist.ranks import World
from dflash_dist.training.context import HELD_OUT, TRAIN, Place


@dataclass(frozen=True)
class MicroBatch:
    """Rows that one rank runs at once, with the blocks sampled from them; on the host until `to`."""

    place: Place  # where the rows come from
    batch: PackedBatch
    blocks: Blocks
    slots: WeightedSlots

    @property
    def weight(self) -> float:
        return self.blocks.weights.sum(dtype=torch.float64).item()

    def to(self, device: torch.device) -> MicroBatch:
        return MicroBatch(self.place, self.batch.to(device), self.blocks.to(device), self.slots.to(device))


class Sampler:
    """Gives a rank its micro-batches, whatever the number of ranks: a row's anchors depend on the step and on the row's
    place in the global batch.

    Args:
        rows: packed rows to train on.
        held_out: packed rows to validate on, if any.
    """

    def __init__(self, config: Config, world: World, rows: PackedRows, held_out: PackedRows | None):
        self.config, self.world, self.rows, self.held_out_rows = config, world, rows, held_out

    def training(self, step: int) -> list[MicroBatch]:
        """Of a step (from 0), with anchors drawn anew."""
        train = self.config.train
        rows = global_rows(step, len(self.rows), train.global_batch_size, train.seed)
        return self._micro_batches(TRAIN, self.rows, rows, TRAINING_ANCHORS, step)

    def held_out(self) -> list[MicroBatch]:
        """All held-out rows, always with the same anchors. Rows past the end are padding: every rank runs as many."""
        assert self.held_out_rows is not None
        each = self.world.size * self.config.train.micro_batch_size
        count = math.ceil(len(self.held_out_rows) / each) * each
        return self._micro_batches(HELD_OUT, self.held_out_rows, list(range(count)), VALIDATION_ANCHORS, 0)

    def _micro_batches(
        self, part: str, source: PackedRows, rows: list[int], stream: int, step: int
    ) -> list[MicroBatch]:
        micro_batches = []
        numbered = self.world.share(list(enumerate(rows)))
        size = self.config.train.micro_batch_size
        for few in (numbered[i : i + size] for i in range(0, len(numbered), size)):
            place = part, [row for _, row in few]
            batch = source.batch(place[1])
            blocks = build_blocks(
                batch.input_ids,
                batch.loss_mask,
                batch.document_ids,
                batch.position_ids,
                anchors=self.config.loss.anchors,
                block_size=self.config.draft.block_size,
                mask_token_id=self.config.mask_token_id,
                gamma=self.config.gamma,
                generators=[random_stream(self.config.train.seed, stream, step, number) for number, _ in few],
            )
            micro_batches.append(MicroBatch(place, batch, blocks, WeightedSlots.of(blocks)))
        return micro_batches
