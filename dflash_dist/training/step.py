"""One training step, from rows to an update, as every rank runs it (docs/design.md, section "One step")."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dflash_dist.batch import Batch
from dflash_dist.config import Config
from dflash_dist.draft.base import Draft
from dflash_dist.kernels.cross_entropy import Distance
from dflash_dist.objective.objective import Objective, Terms
from dflash_dist.objective.statistics import Statistics, Sums
from dflash_dist.ranks import World
from dflash_dist.target.run import Output, Target
from dflash_dist.training.optim import apply_update, learning_rate, make_optimizer
from dflash_dist.training.sampler import Sampler


@dataclass(frozen=True)
class StepResult:
    """What a step left on the device."""

    step: int  # optimiser steps done, this one included
    sums: Sums  # this rank's, see `Statistics`
    grad_norm: torch.Tensor
    lr: float
    waited: float  # of the host for rows and stored features [s], also while the device was busy
    at: float  # when the host had issued it [s of time.perf_counter]; read late, it still tells the step's own time


class TrainingStep:
    """The draft with its optimiser, what it learns from, and the way from one to the other.

    Args:
        sampler: gives this rank its rows.
        draft: on the device, float32.
        target: gives its features.
        embedding: [V, H], the target's, frozen, on the device.
        head: [V, H], frozen, on the device; the same tensor as `embedding` where the target ties them.
        total_steps: length of the learning rate's schedule.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        sampler: Sampler,
        draft: Draft,
        target: Target,
        embedding: torch.Tensor,
        head: torch.Tensor,
        total_steps: int,
    ):
        self.config, self.world, self.sampler = config, world, sampler
        self.draft, self.target, self.total_steps = draft, target, total_steps
        loss = config.loss
        self.objective = Objective(
            loss.alpha if loss.objective == "dpace" else None,
            loss.chunk,
            Distance(**config.distances, temperature=loss.temperature),
            draft,
            loss.head_weight,
        )
        self.progress = 0.0  # the step's share of the run
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
        waited, batches, self.progress = self.waited, self.sample(step), step / max(self.total_steps, 1)
        total_weight, stops = self.world.sum_numbers(sum(batch.weight for batch in batches), stop)
        if stops:
            return None
        sums = []
        for batch in batches:
            self.world.tick()
            with self.gradients_stay_local(unless=batch is batches[-1]):
                on_device = batch.to(self.world.device)
                output = self.capture(on_device)
                terms = self.loss(self.propose(self.ddp, on_device, output), on_device, output)
                # DDP averages over ranks; the loss is a mean over all ranks' weights, so undo the former.
                self.backward(terms.loss * self.world.size / max(total_weight, 1e-30))
            sums.append(terms.sums)
        lr = learning_rate(step, self.total_steps, self.config)
        norm = self.update(lr)
        return StepResult(step + 1, Sums.add_up(sums), norm, lr, self.waited - waited, time.perf_counter())

    @property
    def waited(self) -> float:
        return self.sampler.seconds + self.target.waited

    def sample(self, step: int) -> list[Batch]:
        """This rank's micro-batches of a step, on the host."""
        return self._announced(self.sampler.training(step))

    def _announced(self, batches: list[Batch]) -> list[Batch]:
        self.target.expect(batches)
        return batches

    # ------------------------------------------------------------- on the device, without waiting for it anywhere

    def capture(self, batch: Batch) -> Output:
        """What the target gives."""
        return self.target.run(batch, self.objective.distance.needs_target)

    def propose(self, draft: nn.Module, batch: Batch, output: Output) -> torch.Tensor:
        """The hidden states [B, A * K, H] of all slots."""
        bf16 = self.compute_dtype == torch.bfloat16
        with torch.autocast(self.world.device.type, dtype=torch.bfloat16, enabled=bf16):
            return draft(batch, output.features, self.embedding)

    def loss(self, hidden: torch.Tensor, batch: Batch, output: Output) -> Terms:
        """Loss sum and statistics of a micro-batch."""
        return self.objective(hidden, self.head, batch, output.final, output.features, self.embedding, self.progress)

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
        sums = []
        for batch in self._announced(self.sampler.held_out()):
            self.world.tick()
            on_device = batch.to(self.world.device)
            output = self.capture(on_device)
            sums.append(self.loss(self.propose(self.draft, on_device, output), on_device, output).sums)
        self.draft.train()
        return Statistics.read(Sums.add_up(sums).reduced(self.world.sum_tensor))
