"""The micro-batches of all ranks together."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
import torch

from dflash_dist.batch import Batch
from dflash_dist.config import load_config
from dflash_dist.ranks import World
from dflash_dist.training.sampler import Sampler
from tests.steps import packed_rows

CONFIG = str(Path(__file__).parents[2] / "configs/debug.yaml")
STEPS = 4  # of 8 rows: three passes over 11 rows, which end inside a batch


def micro_batches(ranks: int, micro: int) -> list[list[Batch]]:
    """Of every step, those of all ranks in order, and those held out last."""
    knobs = ["loss.anchors=12", "train.global_batch_size=8", f"train.micro_batch_size={micro}"]
    config = load_config(CONFIG, knobs)
    rows, held_out = packed_rows(11), packed_rows(8)
    samplers = [Sampler(config, World(rank, ranks, torch.device("cpu")), rows, held_out) for rank in range(ranks)]
    steps = [[few for sampler in samplers for few in sampler.training(step)] for step in range(STEPS)]
    return [*steps, [few for sampler in samplers for few in sampler.held_out()]]


@pytest.mark.parametrize("micro", [1, 2])
@pytest.mark.parametrize("ranks", [2, 4])
def test_rows_anchors_labels_and_weights_are_those_of_one_rank(ranks: int, micro: int) -> None:
    for one, many in zip(micro_batches(1, 8), micro_batches(ranks, micro), strict=True):
        assert [row for few in many for row in few.place.rows] == one[0].place.rows
        for name in (field.name for field in fields(Batch)):
            [expected], found = ([getattr(few, name) for few in some] for some in (one, many))
            if isinstance(expected, torch.Tensor) and name != "weighted":
                assert torch.equal(torch.cat(found), expected), name
        assert sum(few.count for few in many) == one[0].count


def test_anchors_are_drawn_anew_where_a_row_comes_again() -> None:
    drawn: dict[int, list[torch.Tensor]] = {}
    for few in (few for step in micro_batches(1, 1)[:STEPS] for few in step):
        drawn.setdefault(few.place.rows[0], []).append(few.anchors)
    assert all(len(draws) >= 2 for draws in drawn.values())
    again = [not torch.equal(draws[0], draws[1]) for row, draws in drawn.items() if row]  # row 0 has few
    assert all(again) and len(again) == 10


def test_neighbouring_ranks_may_share_their_rows() -> None:
    config = load_config(CONFIG, ["loss.anchors=12", "train.global_batch_size=8", "train.micro_batch_size=2"])

    def rows_of(rank: int, ranks: int, sharing: int) -> list[list[int]]:
        world = World(rank, ranks, torch.device("cpu"), sharing=sharing)
        sampler = Sampler(config, world, packed_rows(11), packed_rows(8))
        return [few.place.rows for few in [*sampler.training(0), *sampler.held_out()]]

    assert [rows_of(rank, 4, 2) for rank in range(4)] == [rows_of(rank // 2, 2, 1) for rank in range(4)]
