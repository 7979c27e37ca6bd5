"""The plain implementation is an oracle for the whole step: what it and `TrainingStep` compute is the same."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from dflash_dist.cost.reference import ReferenceStep
from dflash_dist.draft.kinds.dflash import DFlashDraftModel
from dflash_dist.objective.statistics import Statistics
from dflash_dist.ranks import World
from dflash_dist.training.step import TrainingStep
from tests.reference import lively_draft
from tests.steps import ANCHORS, LAYER_IDS, MICRO_BATCH, make_step, packed_rows, step_config
from tests.tiny import lively_target, tiny_shape

ROWS = 2 * MICRO_BATCH  # as many as a step takes, so that the one with few anchors is in every step


def both(tiny_target: Path, world: World, precision: str) -> tuple[TrainingStep, ReferenceStep]:
    """Both ways with the same weights, at a constant learning rate: the reference knows no other."""
    config = step_config(precision, warmup=0.0, final_lr=1.0, lr=1e-3)
    target, draft = lively_target(tiny_target), lively_draft(tiny_shape())
    shallow = copy.deepcopy(target.model).to(getattr(torch, precision))
    shallow.layers = shallow.layers[: max(LAYER_IDS) + 1]
    ends = target.model.embed_tokens.weight, target.lm_head.weight
    training = make_step(config, world, packed_rows(ROWS), copy.deepcopy(draft), shallow, *ends)
    return training, ReferenceStep(target, draft, training.sampler, config.lr)


def weights_of(draft: DFlashDraftModel) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in draft.parameters()]


def test_losses_and_weights_are_those_of_the_plain_implementation(alone, tiny_target) -> None:
    training, reference = both(tiny_target, alone, "float32")
    for micro in training.sample(0):
        assert micro.document_ids.max() == 3  # three documents and padding
    used = [int((row >= 0).sum()) for micro in training.sample(0) for row in micro.anchor_documents]
    assert min(used) == 5 < ANCHORS == max(used)
    weights = [micro.weight for micro in training.sample(0)]
    assert weights[0] != pytest.approx(weights[1], rel=0.1)  # a mean of the micro-batches' means would be another loss

    before = weights_of(training.draft)
    for step in range(3):
        result = training.run(step)
        assert result is not None and result.grad_norm > training.config.train.clip_norm
        assert Statistics.read(result.sums).loss == pytest.approx(reference.run(step), rel=1e-6)
        # Adam divides a gradient by its size. The few weights whose gradient is nothing but rounding thus move as far
        # as all others, and differently here and there. What weights have moved, about a hundredth of their size,
        # differs by less than a thousandth of it: by 1e-5 of their size.
        for start, ours, theirs in zip(before, training.draft.parameters(), reference.draft.parameters(), strict=True):
            assert (ours - theirs).norm() <= 1e-3 * (theirs - start).norm() <= 1e-4 * theirs.norm()


def test_bf16_stays_within_a_hundredth_of_the_float32_loss(alone, tiny_target) -> None:
    training, reference = both(tiny_target, alone, "bfloat16")
    result = training.run(0)
    assert result is not None
    assert Statistics.read(result.sums).loss == pytest.approx(reference.run(0), rel=0.01)
