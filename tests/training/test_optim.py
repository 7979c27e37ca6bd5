from __future__ import annotations

import itertools
import math

import pytest
import torch

from dflash_dist.config import Config, DraftConfig, TrainConfig
from dflash_dist.ranks import World
from dflash_dist.training.optim import apply_update, gather_state, learning_rate, make_optimizer
from tests.ranks import run_ranks
from tests.reference import lively_draft
from tests.steps import make_step, packed_rows, step_config
from tests.tiny import lively_target, tiny_shape


def test_the_rate_rises_linearly_and_falls_as_a_cosine() -> None:
    config = Config(train=TrainConfig(lr=1.0, warmup=0.04, final_lr=0.1))
    rates = [learning_rate(step, 100, config) for step in range(100)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0] and rates[4] == 1.0
    assert rates[52] == pytest.approx(0.55)  # half-way down from 1.0 to 0.1
    assert learning_rate(100, 100, config) == pytest.approx(0.1)
    assert all(a >= b for a, b in itertools.pairwise(rates[4:]))


def test_one_step_and_no_warmup_use_the_peak() -> None:
    assert learning_rate(0, 1, Config(train=TrainConfig(lr=2.0, warmup=0.0))) == 2.0


def test_a_draft_that_goes_on_training_begins_gently() -> None:
    """Unless the config says otherwise: its knowledge is there, AdamW's moments are not."""
    trained = Config(draft=DraftConfig(init="some/draft"))
    assert [learning_rate(step, 100, trained) for step in (0, 19, 20)] == pytest.approx([6e-5 / 20, 6e-5, 6e-5])
    assert learning_rate(38, 1000, trained) == pytest.approx(6e-5 * 39 / 40), "4 % are more than 20 steps"
    assert learning_rate(9, 10, trained) == pytest.approx(6e-5), "a run of fewer steps is all warm-up"
    stated = Config(draft=DraftConfig(init="some/draft"), train=TrainConfig(lr=2.0, warmup=0.0))
    assert learning_rate(0, 100, stated) == 2.0
    assert learning_rate(3, 100, Config()) == 6e-4


def test_an_update_clips_the_global_norm() -> None:
    model = torch.nn.Linear(2, 1, bias=False)
    optimizer = make_optimizer(model, TrainConfig(betas=[0.0, 0.0]))
    model.weight.grad = torch.tensor([[3.0, 4.0]])
    norm = apply_update(optimizer, 0.0, clip_norm=1.0)
    assert norm == 5.0
    first_moment = optimizer.state[model.weight]["exp_avg"]
    assert torch.allclose(first_moment, torch.tensor([[0.6, 0.8]]), atol=1e-6)


def test_the_moments_are_there_from_the_start_and_the_first_update_is_as_without() -> None:
    torch.manual_seed(0)
    model, plain = (torch.nn.Linear(3, 2, bias=False) for _ in range(2))
    plain.load_state_dict(model.state_dict())
    train = TrainConfig(weight_decay=0.1)
    optimizer = make_optimizer(model, train)
    assert torch.equal(model.weight, plain.weight) and model.weight.grad is None
    assert optimizer.state[model.weight].keys() == {"step", "exp_avg", "exp_avg_sq"}
    assert not any(value.any() for value in optimizer.state[model.weight].values())
    adamw = torch.optim.AdamW(plain.parameters(), lr=0.1, betas=tuple(train.betas), weight_decay=0.1, fused=True)
    model.weight.grad = torch.full((2, 3), 0.1)
    plain.weight.grad = torch.full((2, 3), 0.1)
    apply_update(optimizer, 0.1, clip_norm=1.0)
    adamw.step()
    assert torch.equal(model.weight, plain.weight)
    assert all(
        torch.equal(optimizer.state[model.weight][name], value) for name, value in adamw.state[plain.weight].items()
    )


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


# ------------------------------------------------------------------------------------------------ in a training step


def test_a_step_updates_as_adamw_written_out_with_its_clipping_and_its_rate(alone, tiny_target) -> None:
    """In float64, from gradients of the step's own loss; every setting is unlike its default."""
    lr, betas, decay, clip = 3e-3, (0.6, 0.8), 0.2, 0.05
    config = step_config(lr=lr, betas=list(betas), weight_decay=decay, clip_norm=clip, warmup=0.4, final_lr=0.3)
    rates = [lr / 2, lr, lr]  # of five steps, two rise; the third begins the cosine
    target, draft = lively_target(tiny_target), lively_draft(tiny_shape())
    ends = target.model.embed_tokens.weight, target.lm_head.weight
    training = make_step(config, alone, packed_rows(4), draft, target.model, *ends, total_steps=5)
    parameters = list(draft.parameters())
    expected = [parameter.detach().double() for parameter in parameters]
    first, second = ([torch.zeros_like(weights) for weights in expected] for _ in range(2))
    for step, rate in enumerate(rates):
        micro_batches = training.sample(step)
        losses = [
            training.loss(training.propose(draft, m, output := training.capture(m)), m, output)[0]
            for m in micro_batches
        ]
        total = sum(micro.weight for micro in micro_batches)
        gradients = [g.double() for g in torch.autograd.grad(torch.stack(losses).sum() / total, parameters)]
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients))
        result = training.run(step)
        assert result is not None and result.lr == pytest.approx(rate, rel=1e-9)
        assert float(result.grad_norm) == pytest.approx(norm, rel=1e-5) and norm > 2 * clip
        for k, gradient in enumerate(gradients):
            clipped = gradient * clip / norm
            first[k] = betas[0] * first[k] + (1 - betas[0]) * clipped
            second[k] = betas[1] * second[k] + (1 - betas[1]) * clipped**2
            mean, square = first[k] / (1 - betas[0] ** (step + 1)), second[k] / (1 - betas[1] ** (step + 1))
            moved = rate * (mean / (square.sqrt() + 1e-8) + decay * expected[k])
            expected[k] = expected[k] - moved
            assert (parameters[k] - expected[k]).norm() <= 1e-3 * moved.norm(), f"step {step}, parameter {k}"


# ----------------------------------------------------------------------------------------------- a sharded optimiser


def two_layers() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 3))


def update(model: torch.nn.Module, optimizer, step: int) -> None:
    """With gradients that only the step determines, as DDP leaves them; the second ones are not finite."""
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator) * (math.nan if step == 1 else 1.0)
    apply_update(optimizer, 0.1, 1.0)


def weights(model: torch.nn.Module) -> list[torch.Tensor]:
    return [parameter.detach() for parameter in model.parameters()]


def train_sharded(world: World, state: dict | None) -> tuple[list[torch.Tensor], int, dict | None]:
    """Four updates, or one from `state`; the weights, the moments kept on this rank and, on rank 0, the whole state."""
    model = two_layers()
    optimizer = make_optimizer(model, TrainConfig(shard_optimizer=True), world.size)
    if state is not None:
        optimizer.load_state_dict(state)
    for step in range(4) if state is None else [4]:
        update(model, optimizer, step)
    kept = sum(of["exp_avg"].numel() for of in optimizer.optim.state.values())  # type: ignore[union-attr]
    gather_state(optimizer)
    return weights(model), kept, optimizer.state_dict() if world.is_main else None


def test_a_sharded_optimiser_updates_as_a_whole_one_and_their_states_are_one_anothers() -> None:
    model = two_layers()
    whole = make_optimizer(model, TrainConfig())
    for step in range(4):
        update(model, whole, step)
    ranks = run_ranks(train_sharded, 2, None)
    for sharded, _, _ in ranks:
        assert all(torch.equal(a, b) for a, b in zip(sharded, weights(model), strict=True))
    shares = [kept for _, kept, _ in ranks]
    assert min(shares) > 0 and sum(shares) == sum(weight.numel() for weight in weights(model))

    state, fresh = whole.state_dict(), two_layers()
    resumed = make_optimizer(fresh, TrainConfig())
    resumed.load_state_dict(ranks[0][2])
    update(fresh, resumed, 4)
    for sharded, _, _ in run_ranks(train_sharded, 2, state):
        assert all(torch.equal(a, b) for a, b in zip(sharded, weights(fresh), strict=True))
