"""AdamW on float32 parameters, linear warm-up and cosine decay, and an update that refuses non-finite gradients."""

from __future__ import annotations

import math

import torch
from torch import nn

from dflash_dist.config import TrainConfig


def make_optimizer(model: nn.Module, train: TrainConfig) -> torch.optim.AdamW:
    beta1, beta2 = train.betas
    # fused: one pass over the state, and the only form that can skip an update on the device (`found_inf`)
    return torch.optim.AdamW(
        model.parameters(), lr=train.lr, betas=(beta1, beta2), weight_decay=train.weight_decay, fused=True
    )


def restore_hyperparameters(optimizer: torch.optim.AdamW, train: TrainConfig) -> None:
    """The config's values, where a loaded state brought those of the run that saved it."""
    for group in optimizer.param_groups:
        group.update(betas=tuple(train.betas), weight_decay=train.weight_decay)


def learning_rate(step: int, total_steps: int, train: TrainConfig) -> float:
    """The rate of step `step` (from 0): linear over the first `warmup` share, then a cosine down to `final_lr`."""
    warmup_steps = math.ceil(train.warmup * total_steps)
    if step < warmup_steps:
        return train.lr * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return train.lr * (train.final_lr + (1 - train.final_lr) * cosine)


def apply_update(optimizer: torch.optim.AdamW, lr: float, clip_norm: float) -> torch.Tensor:
    """Clips the global gradient norm and takes one step; clears the gradients.

    A non-finite norm makes the update a no-op, decided on the device: parameters, moments and step count stay as they
    are. DDP gives every rank the same gradients, so every rank decides alike.

    Returns:
        The norm before clipping, a float32 scalar on the device.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = nn.utils.clip_grad_norm_(parameters, clip_norm)
    # torch's fused AdamW reads this attribute, which GradScaler sets otherwise: 1 means leave everything as it is.
    setattr(optimizer, "found_inf", (~norm.isfinite()).float())  # noqa: B010
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    return norm
