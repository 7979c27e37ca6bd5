"""AdamW on float32 parameters, linear warm-up and cosine decay, and an update that refuses non-finite gradients."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dflash_dist.config import FINE_TUNING_WARMUP, Config, TrainConfig

if TYPE_CHECKING:  # its package compiles TorchScript on import, which only a run that shards should wait for
    from torch.distributed.optim import ZeroRedundancyOptimizer

    Optimizer = torch.optim.AdamW | ZeroRedundancyOptimizer


NO_JUMP = 0.01  # share by which the rate may differ from that of the schedule, and nobody would see it


def make_optimizer(model: nn.Module, train: TrainConfig, ranks: int = 1) -> Optimizer:
    """AdamW, whose learning rate is set at each update."""
    options: dict[str, Any] = {"betas": tuple(train.betas), "weight_decay": train.weight_decay}
    # fused: one pass over the state, and the only form that can skip an update on the device (`found_inf`)
    if train.shard_optimizer and ranks > 1:
        from torch.distributed.optim import ZeroRedundancyOptimizer

        optimizer: Optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, fused=True, **options)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), fused=True, **options)
    _allocate_moments(_adamw(optimizer))
    return optimizer


def _allocate_moments(adamw: torch.optim.AdamW) -> None:
    """AdamW allocates its moments in its first update. This one, which it refuses, has it do so now: before activations
    come to lie between them, and while running out of memory costs nothing."""
    parameters = _parameters(adamw)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    if parameters:  # of many ranks some have none to update
        _refuse(adamw, when=torch.ones((), device=parameters[0].device))
        adamw.step()
        delattr(adamw, "found_inf")
    adamw.zero_grad()


def _parameters(optimizer: Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _adamw(optimizer: Optimizer) -> torch.optim.AdamW:
    """The one that updates this rank's share."""
    return optimizer if isinstance(optimizer, torch.optim.AdamW) else optimizer.optim


def _refuse(adamw: torch.optim.AdamW, when: torch.Tensor) -> None:
    """Makes the next updates no-ops if `when` is 1 (else 0, a float32 scalar), decided on the device: parameters,
    moments and step count stay as they are. It is an attribute that GradScaler sets otherwise."""
    setattr(adamw, "found_inf", when)  # noqa: B010


def gather_state(optimizer: Optimizer) -> None:
    """Brings a sharded state to rank 0, whose `state_dict` then has all of it. For all ranks to call together."""
    if not isinstance(optimizer, torch.optim.AdamW):
        optimizer.consolidate_state_dict(to=0)


def restore_hyperparameters(optimizer: Optimizer, train: TrainConfig) -> None:
    """The config's values, where a loaded state brought those of the run that saved it."""
    for group in optimizer.param_groups:
        group.update(betas=tuple(train.betas), weight_decay=train.weight_decay)


def learning_rate(step: int, total_steps: int, config: Config) -> float:
    """The rate of step `step` (from 0): linear over the first `warmup` share, then a cosine down to `final_lr`."""
    train = config.train
    warmup_steps = math.ceil(train.warmup * total_steps)
    if config.draft.begins_trained and train.warmup:
        warmup_steps = min(max(warmup_steps, FINE_TUNING_WARMUP), total_steps)
    if step < warmup_steps:
        return config.lr * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return config.lr * (train.final_lr + (1 - train.final_lr) * cosine)


def describe_jump(done: float, step: int, total_steps: int, config: Config) -> str | None:
    """What to say where a run that goes on after `step` steps meets another schedule than the one that it comes from.

    Args:
        done: the rate of the last step.
    """
    if math.isclose(done, learning_rate(step - 1, total_steps, config), rel_tol=NO_JUMP):
        return None
    following = learning_rate(step, total_steps, config)
    return (
        f"warning: the learning rate jumps from {done:.3g} in step {step} to {following:.3g} in step {step + 1}, where"
        f" the schedule of {total_steps} steps puts it; to go on at the rate of step {step} set"
        f" train.lr={done:.4g} train.warmup=0 train.final_lr=1"
    )


def apply_update(optimizer: Optimizer, lr: float, clip_norm: float) -> torch.Tensor:
    """Clips the global gradient norm and takes one step, or none if the norm is not finite.

    DDP gives every rank the same gradients, so every rank decides alike.

    Returns:
        The norm before clipping, a float32 scalar on the device.
    """
    norm = nn.utils.clip_grad_norm_(_parameters(optimizer), clip_norm)
    _refuse(_adamw(optimizer), when=(~norm.isfinite()).float())
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    return norm
