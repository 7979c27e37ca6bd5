"""One training step, from rows to an update, as every rank runs it (docs/design.md, section "One step")."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dflash_dist.config import Config
from dflash_dist.draft.attention import training_attention
from dflash_dist.draft.model import DFlashDraftModel
from dflash_dist.draft.objective import Statistics, block_loss
from dflash_dist.ranks import World
from dflash_dist.training.context import ContextSource
from dflash_dist.training.optim import apply_update, learning_rate, make_optimizer
from dflash_dist.training.sampling import MicroBatch, Sampler


@dataclass(frozen=True)
class StepResult:
    """What a step left on the device."""

    step: int  # optimiser steps done, this one included
    statistics: torch.Tensor  # this rank's, see `Statistics`
    grad_norm: torch.Tensor
    lr: float
    at: float  # when the host had issued it [s of time.perf_counter]; read late, it still tells the step's own time


class TrainingStep:
    """The draft with its optimiser, what it learns from, and the way from one to the other.

    Args:
        sampler: gives this rank its rows.
        draft: on the device, float32.
        context: gives the target's features.
        embedding: [V, H], frozen, on the device.
        head: [V, H], frozen, on the device; the same tensor as `embedding` where the target ties them.
        total_steps: length of the learning rate's schedule.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        sampler: Sampler,
        draft: DFlashDraftModel,
        context: ContextSource,
        embedding: torch.Tensor,
        head: torch.Tensor,
        total_steps: int,
    ):
        self.config, self.world, self.sampler = config, world, sampler
        self.draft, self.context, self.total_steps = draft, context, total_steps
        self.compute_dtype = getattr(torch, config.train.precision)
        self.embedding = embedding.to(self.compute_dtype)
        self.head = self.embedding if head is embedding else head.to(self.compute_dtype)
        if config.train.compile:
            draft.compile_layers()
        self.optimizer = make_optimizer(draft, config.train, world.size)
        # One rank has nobody to average with: nothing is wrapped.
        self.ddp = DistributedDataParallel(draft, gradient_as_bucket_view=True) if world.size > 1 else draft

    def run(self, step: int, stop: bool = False) -> StepResult | None:
        """Step `step` (from 0). Does nothing and returns None where any rank wants to `stop`."""
        micro_batches = self.sample(step)
        weight = sum(micro.weight for micro in micro_batches)
        total_weight, stops = self.world.sum_numbers(weight, stop)
        if stops:
            return None
        statistics = []
        for micro in micro_batches:
            self.world.tick()
            with self.gradients_stay_local(unless=micro is micro_batches[-1]):
                on_device = micro.to(self.world.device)
                context = self.capture(on_device)
                loss, shown = self.loss(self.propose(self.ddp, on_device, context), on_device)
                # DDP averages over ranks; the loss is a mean over all ranks' weights, so undo the former.
                self.backward(loss * self.world.size / max(total_weight, 1e-30))
            statistics.append(shown)
        lr = learning_rate(step, self.total_steps, self.config.train)
        grad_norm = self.update(lr)
        return StepResult(step + 1, torch.stack(statistics).sum(0), grad_norm, lr, time.perf_counter())

    def sample(self, step: int) -> list[MicroBatch]:
        """This rank's micro-batches of a step, on the host."""
        return self._announced(self.sampler.training(step))

    def _announced(self, micro_batches: list[MicroBatch]) -> list[MicroBatch]:
        self.context.expect(micro.place for micro in micro_batches)
        return micro_batches

    # ------------------------------------------------------------- on the device, without waiting for it anywhere

    def capture(self, micro: MicroBatch) -> torch.Tensor:
        """The target's features [B, S, L * H]."""
        return self.context.of(micro.place, micro.batch)

    def propose(self, draft: nn.Module, micro: MicroBatch, context: torch.Tensor) -> torch.Tensor:
        """The hidden states [B, A * K, H] of all slots."""
        batch, blocks = micro.batch, micro.blocks
        attend = training_attention(blocks, batch.document_ids, self.compute_dtype, self.draft.mask)
        slots = F.embedding(blocks.input_ids.flatten(1), self.embedding)
        positions = blocks.position_ids.flatten(1)
        bf16 = self.compute_dtype == torch.bfloat16
        with torch.autocast(self.world.device.type, dtype=torch.bfloat16, enabled=bf16):
            return draft(slots, positions, context.to(self.compute_dtype), batch.position_ids, attend)

    def loss(self, hidden: torch.Tensor, micro: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss sum and statistics of a micro-batch."""
        loss = self.config.loss
        alpha = loss.alpha if loss.objective == "dpace" else None
        return block_loss(hidden, self.head, micro.blocks, micro.slots, loss.chunk, alpha)

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def update(self, lr: float) -> torch.Tensor:
        """Applies the gradients and clears them; returns their norm."""
        norm = apply_update(self.optimizer, lr, self.config.train.clip_norm)
        # Those of DDP are its buckets, and stay where they are; without, they need no memory until there are new ones.
        self.optimizer.zero_grad(set_to_none=self.ddp is self.draft)
        return norm

    def gradients_stay_local(self, unless: bool) -> contextlib.AbstractContextManager:
        if unless or not isinstance(self.ddp, DistributedDataParallel):
            return contextlib.nullcontext()
        return self.ddp.no_sync()

    # ------------------------------------------------------------------------------------------------ held-out rows

    @torch.no_grad()
    def validate(self) -> Statistics:
        """Statistics on the held-out rows."""
        self.draft.eval()
        shown = []
        for micro in self._announced(self.sampler.held_out()):
            self.world.tick()
            on_device = micro.to(self.world.device)
            hidden = self.propose(self.draft, on_device, self.capture(on_device))
            shown.append(self.loss(hidden, on_device)[1])
        self.draft.train()
        return Statistics.read(self.world.sum_tensor(torch.stack(shown).sum(0)))
