"""What one rank sends to the others in a training step, in bytes and from shapes alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dflash_dist.cost.memory import FLOAT32, RankStep, draft_parameters

DDP_BUCKET = 25 * 2**20  # bytes of gradients that DDP reduces at once


@dataclass(frozen=True)
class Traffic:
    """Collectives of one kind in a step, all calls together."""

    ranks: int = 1  # that take part in one
    handed: int = 0  # bytes that a rank hands over
    received: float = 0.0  # bytes that reach a rank, around a ring; as many leave it
    hops: int = 0  # times that something waits for a neighbour, however little is carried


def target_gathers(step: RankStep) -> Traffic:
    """FSDP gathers the target's layers and its embedding for every micro-batch, forward only and in the target's
    dtype: a ring brings the share of every other rank."""
    if not step.depth or step.shards == 1:
        return Traffic()
    shape, others = step.target, step.shards - 1
    sharded = step.depth * shape.layer_parameters + shape.vocab * shape.hidden
    handed = step.micro_batches * math.ceil(step.target_bytes * sharded / step.shards)
    return Traffic(step.shards, handed, handed * others, step.micro_batches * (step.depth + 1) * others)


def weight_shares(step: RankStep) -> Traffic:
    """With a sharded optimiser every rank sends the weights that it has updated to all others, one tensor after the
    other."""
    if step.optimizer_shards == 1:
        return Traffic()
    handed = FLOAT32 * draft_parameters(step.draft)
    return Traffic(step.ranks, handed, handed, 11 * step.draft.num_layers + 3)


def gradient_sums(step: RankStep) -> Traffic:
    """DDP sums the draft's gradients once a step, in float32: around a ring they pass twice, but for the rank's own
    share; NCCL goes up and down a tree where that is sooner."""
    if step.ranks == 1:
        return Traffic()
    handed = FLOAT32 * draft_parameters(step.draft)
    calls, depth = math.ceil(handed / DDP_BUCKET), math.ceil(math.log2(step.ranks))
    return Traffic(step.ranks, handed, 2 * handed * (step.ranks - 1) / step.ranks, calls * 2 * depth)
