"""Distances to what the target foresees: loss and gradient as autograd has them through full logits, at the token that
the target foresees each label from, online and from stored features."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from dflash_dist.kernels.cross_entropy import ChunkedCrossEntropy, Distance
from dflash_dist.objective.objective import Objective, foreseen_by_target
from dflash_dist.prepare.capture import capture
from dflash_dist.ranks import World
from dflash_dist.training.trainer import Trainer
from tests.reference import packed_row, reference_blocks

N, V, H = 70, 300, 32
EACH = {
    "ce": Distance(ce=1.0),
    "kl": Distance(kl=1.0),
    "tv": Distance(tv=1.0),
    "lk": Distance(lk=1.0),
    "DSpark's": Distance(ce=0.1, tv=0.9),
    "all": Distance(0.2, 0.3, 0.4, 0.5),
    "warm": Distance(0.2, 0.3, 0.4, 0.5, temperature=1.7),
    "cold": Distance(0.2, 0.3, 0.4, 0.5, temperature=0.6),
}


def slow(logits: torch.Tensor, theirs: torch.Tensor, labels: torch.Tensor, of: Distance) -> torch.Tensor:
    """[N]: as the formulas have it."""
    p, q = ((of_both / of.temperature).softmax(-1) for of_both in (theirs, logits))
    kl = of.temperature**2 * (p * (p.log() - q.log())).sum(-1)
    tv = 1 - torch.minimum(p, q).sum(-1)
    share = torch.exp(-3 * torch.minimum(p, q).sum(-1)).detach()
    ce = F.cross_entropy(logits, labels, reduction="none")
    return of.ce * ce + of.kl * kl + of.tv * tv + of.lk * (share * kl + (1 - share) * tv)


@pytest.mark.parametrize("name", EACH)
@pytest.mark.parametrize("chunk", [16, 256])
def test_loss_and_gradient_are_those_of_full_logits(name: str, chunk: int) -> None:
    distance, generator = EACH[name], torch.Generator().manual_seed(0)
    hidden, theirs = torch.randn(2, N, H, generator=generator)
    head, weights = 0.3 * torch.randn(V, H, generator=generator), torch.rand(N, generator=generator)
    theirs = hidden + 0.7 * theirs  # they overlap, more or less
    labels = torch.randint(V, (N,), generator=generator)
    expected_of, of = (hidden.clone().requires_grad_() for _ in range(2))
    expected = slow(expected_of @ head.T, theirs @ head.T, labels, distance)
    given = theirs if distance.needs_target else None
    loss, nll, correct, *_ = ChunkedCrossEntropy.apply(of, head, labels, chunk, 0, distance, given)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    logits = hidden @ head.T
    torch.testing.assert_close(nll, F.cross_entropy(logits, labels, reduction="none"), rtol=1e-5, atol=1e-5)
    assert torch.equal(correct, (logits.argmax(-1) == labels).float())
    (weights * expected).sum().backward()
    (weights * loss).sum().backward()
    torch.testing.assert_close(of.grad, expected_of.grad, rtol=1e-4, atol=1e-6)


def test_the_distance_to_oneself_is_nothing() -> None:
    hidden, head = torch.randn(N, H, requires_grad=True), torch.randn(V, H)
    for name in ("kl", "tv", "lk"):
        loss, *_ = ChunkedCrossEntropy.apply(hidden, head, torch.zeros(N).long(), 64, 0, EACH[name], hidden.detach())
        assert loss.detach().abs().max() < 1e-5
        (gradient,) = torch.autograd.grad(loss.sum(), hidden)
        assert gradient.abs().max() < 1e-5


def test_in_bfloat16_it_is_off_by_rounding_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, theirs = torch.randn(2, N, H, generator=generator).bfloat16()
    head = (0.3 * torch.randn(V, H, generator=generator)).bfloat16()
    labels = torch.zeros(N).long()
    loss, *_ = ChunkedCrossEntropy.apply(hidden, head, labels, 32, 0, EACH["all"], theirs)
    expected = slow((hidden @ head.T).float(), (theirs @ head.T).float(), labels, EACH["all"])
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-3)


def test_the_target_is_asked_at_the_token_before_each_label() -> None:
    row = packed_row([0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 1], length=16)
    blocks = reference_blocks(row, [[2, 4, 8]], slots=4, block_size=4, gamma=4.0)
    final = torch.arange(16.0)[None, :, None].expand(1, 16, 2)  # says where it stands
    place = foreseen_by_target(final, blocks)[: blocks.count, 0].tolist()
    labels = blocks.labels.flatten()[blocks.weighted][: blocks.count].tolist()
    assert [int(row.input_ids[0, int(at) + 1]) for at in place] == labels
    assert len(place) == 3 + 3 + 2


@pytest.fixture
def step_losses(debug_config, tmp_path):
    """The losses and the gradients' norms of two steps."""

    def run(*knobs: str) -> tuple[list[float], list[float]]:
        trainer = Trainer(
            debug_config("train.max_steps=2", "validate.every=0", *knobs), World(0, 1, torch.device("cpu"))
        )
        results = [trainer.training.run(step) for step in range(2)]
        sums = [float(result.sums.vector[0]) for result in results if result]
        return sums, [float(result.grad_norm) for result in results if result]

    return run


def test_stored_features_hold_the_final_state_where_it_is_asked_for(step_losses, debug_config, tmp_path) -> None:
    kl, features = "loss.distance={ce: 0.5, kl: 0.5}", tmp_path / "features"
    capture(debug_config(kl), features, World(0, 1, torch.device("cpu")))
    online, stored = step_losses(kl), step_losses(kl, f"target.features={features}")
    assert online == stored, "bitwise"
    plain = step_losses("target.full_depth=true")
    assert plain == step_losses(f"target.features={features}"), "the layers alone are there as well"
    assert plain != online
    capture(debug_config(), tmp_path / "plain", World(0, 1, torch.device("cpu")))
    with pytest.raises(ValueError, match=r"final state: None -> True"):
        step_losses(kl, f"target.features={tmp_path / 'plain'}")


def test_a_run_that_needs_it_loads_the_target_whole(debug_config) -> None:
    assert not debug_config().target.full_depth
    config = debug_config("loss.distance=kl", "eval.every=5")  # which needs the whole target, too
    assert config.needs_final and config.target.full_depth
    assert debug_config("loss.distance={tv: 0.9, ce: 0.1}").distances == {"tv": 0.9, "ce": 0.1}
    with pytest.raises(ValueError, match=r"loss.distance names nothing to learn from"):
        debug_config("loss.distance={}")
    with pytest.raises(ValueError, match=r"loss\.distance"):
        debug_config("loss.distance=nll")
    assert Objective() == dataclasses.replace(Objective(), distance=Distance(ce=1.0))
