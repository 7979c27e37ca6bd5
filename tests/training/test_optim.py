from __future__ import annotations

import itertools
import math

import pytest
import torch

from dflash_dist.config import TrainConfig
from dflash_dist.training.optim import apply_update, learning_rate, make_optimizer


def test_the_rate_rises_linearly_and_falls_as_a_cosine() -> None:
    train = TrainConfig(lr=1.0, warmup=0.04, final_lr=0.1)
    rates = [learning_rate(step, 100, train) for step in range(100)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0] and rates[4] == 1.0
    assert rates[52] == pytest.approx(0.55)  # half-way down from 1.0 to 0.1
    assert learning_rate(100, 100, train) == pytest.approx(0.1)
    assert all(a >= b for a, b in itertools.pairwise(rates[4:]))


def test_one_step_and_no_warmup_use_the_peak() -> None:
    assert learning_rate(0, 1, TrainConfig(lr=2.0, warmup=0.0)) == 2.0


def test_an_update_clips_the_global_norm() -> None:
    model = torch.nn.Linear(2, 1, bias=False)
    optimizer = make_optimizer(model, TrainConfig(betas=[0.0, 0.0]))
    model.weight.grad = torch.tensor([[3.0, 4.0]])
    norm = apply_update(optimizer, 0.0, clip_norm=1.0)
    assert norm == 5.0
    first_moment = optimizer.state[model.weight]["exp_avg"]
    assert torch.allclose(first_moment, torch.tensor([[0.6, 0.8]]), atol=1e-6)
    assert not model.weight.grad.any()


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(poison: float) -> None:
    model = torch.nn.Linear(3, 2, bias=False)
    optimizer = make_optimizer(model, TrainConfig(lr=0.1, weight_decay=0.1))
    model.weight.grad = torch.ones(2, 3)
    apply_update(optimizer, 0.1, 1.0)
    before = [model.weight.detach().clone(), *(value.clone() for value in optimizer.state[model.weight].values())]
    model.weight.grad = torch.tensor([[1.0, poison, 1.0], [1.0, 1.0, 1.0]])
    assert not apply_update(optimizer, 0.1, 1.0).isfinite()
    after = [model.weight.detach(), *optimizer.state[model.weight].values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after)), "moments and step count too"
    model.weight.grad = torch.ones(2, 3)
    apply_update(optimizer, 0.1, 1.0)
    assert not torch.equal(model.weight, before[0]), "the next finite gradient applies"
