from __future__ import annotations

import math
from dataclasses import asdict, replace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dflash_dist.batch import PADDING, Batch, weighted_slots
from dflash_dist.kernels.cross_entropy import GROUP
from dflash_dist.objective.objective import Objective
from dflash_dist.objective.statistics import Statistics, Sums
from dflash_dist.objective.weights import dpace_weights
from tests.reference import (
    eligible_anchors,
    naive_loss,
    naive_statistics,
    packed_row,
    random_rows,
    reference_blocks,
    reweighted,
)

A, K, H, V = 6, 8, 16, 260


def random_blocks(seed: int = 0, rows: int = 3) -> Batch:
    """Some blocks full, some cut short, some unused; the first slot of all carries weight in some seeds only."""
    packed = random_rows(seed, rows=rows)
    allowed = [eligible_anchors(mask, ids) for mask, ids in zip(packed.loss_mask, packed.document_ids)]
    allowed[-1] = allowed[-1][:2]
    return reference_blocks(packed, [each[::2][:A] for each in allowed], A, K, gamma=4.0)


def random_hidden(blocks: Batch, seed: int = 0, size: int = H) -> torch.Tensor:
    shape = (len(blocks.anchors), blocks.slot_ids[0].numel(), size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def random_head(seed: int = 1, size: int = H, vocabulary: int = V) -> torch.Tensor:
    return torch.randn(vocabulary, size, generator=torch.Generator().manual_seed(seed))


def fused_loss(hidden: torch.Tensor, head: torch.Tensor, blocks: Batch, chunk: int = 16) -> torch.Tensor:
    return Objective(chunk=chunk)(hidden, head, blocks)[0]


def relative_error(value: torch.Tensor, exact: torch.Tensor) -> float:
    return float((value - exact).norm() / exact.norm())


# ---------------------------------------------------------------------------------------------------------- the loss


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("chunk", [1, 7, 16, 1000])
def test_fused_loss_and_gradient_equal_the_naive_ones(chunk, seed):
    blocks, head = random_blocks(seed), random_head()
    hidden = random_hidden(blocks, seed)
    loss, expected = fused_loss(hidden, head, blocks, chunk), naive_loss(hidden, head, blocks)
    assert loss.dtype == torch.float32
    assert loss.shape == ()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    # the trainer divides by the step's total weight, so backward must scale
    (gradient,) = torch.autograd.grad(loss * 0.37, hidden)
    (expected_gradient,) = torch.autograd.grad(expected * 0.37, hidden)
    assert expected_gradient.norm() > 1
    assert relative_error(gradient, expected_gradient) < 1e-6


def test_the_chunk_size_does_not_change_the_result():
    blocks, head = random_blocks(), random_head()
    count = len(blocks.weighted)  # the sizes below divide it, or do not
    results = []
    for chunk in (count, count // 2, 5, 6, count - 1, count + 1, None):
        hidden = random_hidden(blocks)
        loss, statistics = Objective(chunk=chunk)(hidden, head, blocks)
        loss.backward()
        results.append((loss.item(), hidden.grad, statistics))
    for loss, gradient, statistics in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-6)
        assert relative_error(gradient, results[0][1]) < 1e-6
        torch.testing.assert_close(statistics.vector, results[0][2].vector, rtol=1e-6, atol=0)


def test_weighted_slots_are_exactly_those_with_weight_padded_to_a_multiple():
    weights = random_blocks().weights
    index, count = weighted_slots(weights)
    assert index[:count].tolist() == [i for i, weight in enumerate(weights.flatten().tolist()) if weight > 0]
    assert len(index) % PADDING == 0
    assert 0 <= len(index) - count < PADDING
    assert index.max() < weights.numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [GROUP, 3 * GROUP, GROUP + 4])  # found by groups, or not
def test_of_equal_logits_the_first_is_the_most_likely_as_in_decoding(vocabulary, dtype):
    blocks = random_blocks()
    head = random_head(vocabulary=vocabulary).to(dtype)
    head[vocabulary // 2 :] = head[: vocabulary - vocabulary // 2]  # every token of the first half has a twin
    hidden = random_hidden(blocks).detach()
    logits = hidden.to(dtype) @ head.T
    blocks.labels[:] = logits.argmax(-1).unflatten(1, (A, K))[:, :, 1:]
    first = Statistics.read(Objective()(hidden, head, blocks)[1])
    assert first.slot_accuracy == [1] * (K - 1)
    blocks.labels[:] += vocabulary // 2  # the twins
    second = Statistics.read(Objective()(hidden, head, blocks)[1])
    assert second.slot_accuracy == [0] * (K - 1)
    assert second.loss == first.loss


def test_large_logits_neither_overflow_nor_lose_the_loss():
    blocks = random_blocks()
    hidden, head = random_hidden(blocks), random_head() * 1e4
    loss, expected = fused_loss(hidden, head, blocks), naive_loss(hidden, head, blocks)
    assert expected.item() > 1e5
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    (gradient,) = torch.autograd.grad(loss, hidden)
    assert gradient.isfinite().all()


def test_a_bfloat16_head_stays_within_one_percent():
    blocks, head = random_blocks(), random_head()
    rough, exact = random_hidden(blocks), random_hidden(blocks)
    loss, expected = fused_loss(rough, head.bfloat16(), blocks), fused_loss(exact, head, blocks)
    loss.backward()
    expected.backward()
    assert loss.dtype == torch.float32
    assert loss != expected  # or the head was not used in bfloat16
    assert loss.item() == pytest.approx(expected.item(), rel=1e-2)
    assert rough.grad.dtype == torch.float32
    assert relative_error(rough.grad, exact.grad) < 2e-2


def test_a_bfloat16_head_rounds_the_products_and_nothing_else():
    # logits are what the head's dtype leaves of them; the log-sum-exp is in float32
    blocks, head = random_blocks(), random_head().bfloat16()
    hidden = random_hidden(blocks).detach()
    states = hidden.unflatten(1, (A, K))[:, :, 1:].bfloat16()
    nll = F.cross_entropy((states @ head.T).float().flatten(0, 2), blocks.labels.flatten(), reduction="none")
    expected = (nll * blocks.weights.flatten()).sum().item()
    assert fused_loss(hidden, head, blocks).item() == pytest.approx(expected, rel=1e-6)


def test_autocast_around_the_loss_changes_nothing():
    # the head's dtype alone decides about the products
    blocks, head = random_blocks(), random_head()
    plain = fused_loss(random_hidden(blocks), head, blocks)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = fused_loss(random_hidden(blocks), head, blocks)
    assert torch.equal(inside, plain)


# ------------------------------------------------------------------------------------------------------------- D-PACE


def accepted_length(probabilities: list[float], alpha: float) -> float:
    """The surrogate whose gradient D-PACE follows: Σ_j Π_{k≤j} ((1 - α) p_k + α)."""
    return sum(math.prod((1 - alpha) * p + alpha for p in probabilities[: j + 1]) for j in range(len(probabilities)))


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_dpace_weights_are_the_derivative_of_the_accepted_length(alpha):
    probabilities = torch.rand(5, K - 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = [K - 1, 1, 3, 0, 5]  # that count, from the first on
    counts = torch.tensor([[float(slot < count) for slot in range(K - 1)] for count in labels], dtype=torch.float64)
    weights = dpace_weights(probabilities, counts, alpha)
    for row, count in enumerate(labels):
        p = probabilities[row, :count].tolist()
        for slot in range(K - 1):
            if slot >= count:
                assert weights[row, slot] == 0
                continue
            # by log s, where s = (1 - α) p + α: a factor of s itself, so double it and halve the difference made
            doubled = [*p[:slot], None, *p[slot + 1 :]]
            s = [
                (1 - alpha) * each + alpha if each is not None else 2 * ((1 - alpha) * p[slot] + alpha)
                for each in doubled
            ]
            twice = sum(math.prod(s[: j + 1]) for j in range(count))
            assert weights[row, slot].item() == pytest.approx(twice - accepted_length(p, alpha), abs=1e-12)


@pytest.mark.parametrize("chunk", [5, 16, 1000])  # blocks fall into two chunks, or do not
def test_dpace_trains_with_its_weights_and_shows_the_decayed_loss(chunk):
    blocks, head, hidden = random_blocks(), random_head() * 0.5, random_hidden(random_blocks())
    loss, statistics = Objective(0.5, chunk)(hidden, head, blocks)

    logits = F.linear(hidden, head).unflatten(1, (A, K))[:, :, 1:]
    nll = -logits.log_softmax(-1).gather(-1, blocks.labels[..., None])[..., 0]
    counts = (blocks.weights > 0).float().flatten(0, 1)
    weights = dpace_weights((-nll).exp().flatten(0, 1), counts, 0.5).detach()
    assert weights.std() > 0.1
    expected = (weights * nll.flatten(0, 1)).sum()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    gradients = [torch.autograd.grad(each, hidden)[0] for each in (loss, expected)]
    assert relative_error(*gradients) < 1e-5
    assert torch.equal(statistics.vector, Objective(chunk=chunk)(hidden, head, blocks).sums.vector)


# ------------------------------------------------------------------------------------------------- what has no weight


@pytest.mark.parametrize("first_slot", ["weighted", "without weight"])
def test_only_slots_with_weight_reach_the_loss(first_slot):
    # padding repeats index 0, so it must work both where that slot counts and where it does not
    blocks, head = random_blocks(), random_head()
    if first_slot == "without weight":
        blocks.weights[0, 0] = 0
        blocks = reweighted(blocks)
    weightless = torch.ones(3, A, K, dtype=torch.bool)  # the anchor slot never has weight
    weightless[:, :, 1:] = blocks.weights == 0
    weightless = weightless.flatten(1)
    clean = random_hidden(blocks)
    poisoned = torch.where(weightless[..., None], 1e4, clean.detach()).requires_grad_()
    assert blocks.count % PADDING != 0
    (loss, statistics), (expected, expected_statistics) = (Objective()(h, head, blocks) for h in (poisoned, clean))
    assert torch.equal(loss, expected)
    assert torch.equal(statistics.vector, expected_statistics.vector)
    loss.backward()
    expected.backward()
    assert torch.equal(poisoned.grad, clean.grad)
    assert (poisoned.grad[weightless] == 0).all()
    assert (poisoned.grad[~weightless].abs().amax(dim=-1) > 0).all()


def test_without_any_weight_the_loss_is_zero_and_so_is_the_gradient():
    rows = packed_row([0] * 20, length=20)
    blocks = reference_blocks(rows, [[]], A, K, gamma=4.0)
    hidden = random_hidden(blocks)
    loss, statistics = Objective(chunk=16)(hidden, random_head(), blocks)
    loss.backward()
    assert loss == 0
    assert hidden.grad is not None
    assert (hidden.grad == 0).all()
    assert (statistics.vector == 0).all()
    read = Statistics.read(statistics)
    assert (read.loss, read.tau, read.slot_accuracy) == (0, None, [None] * (K - 1))


# ------------------------------------------------------------------------------------------------------------- memory


class Watch(TorchDispatchMode):
    """Remembers the size of the largest tensor that an operation returned, and the dtypes that were multiplied."""

    def __init__(self):
        super().__init__()
        self.largest = 0
        self.multiplied: set[torch.dtype] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.largest = max([self.largest, *sizes])
        if func in (torch.ops.aten.mm.default, torch.ops.aten.mm.out):
            self.multiplied |= {operand.dtype for operand in args}
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_is_larger_than_the_logits_of_one_chunk_and_products_have_the_heads_dtype(dtype):
    # sizes at which hidden states and a view of the head stay below the limit, and full logits far above
    chunk, size, vocabulary = 8, 8, 2000
    blocks = random_blocks()
    hidden, head = random_hidden(blocks, size=size), random_head(size=size, vocabulary=vocabulary).to(dtype)
    assert hidden.numel() < chunk * vocabulary
    assert (blocks.weights > 0).sum() > 5 * chunk
    with Watch() as seen:
        loss, _ = Objective(chunk=chunk)(hidden, head, blocks)
        loss.backward()
    assert seen.largest == chunk * vocabulary
    assert seen.multiplied == {dtype}


# --------------------------------------------------------------------------------------------------------- statistics


def hidden_for(guesses: list[list[int]], vocabulary: int) -> torch.Tensor:
    """[1, A*K, V] for a head that is the identity: slot k's most likely token is guesses[a][k]."""
    return F.one_hot(torch.tensor(guesses).flatten(), vocabulary)[None] * 5.0


def test_statistics_on_an_example_written_out_by_hand():
    # tokens 10..19 are the indices 0..9; the document ends at 8, so the block at 5 has one label missing of three
    rows = packed_row([1] * 8, length=10)
    blocks = reference_blocks(rows, [[0, 1, 3, 4, 5]], 6, 4, gamma=2.0)
    assert blocks.weights[0, :, 2].gt(0).tolist() == [True, True, True, True, False, False]
    hidden = hidden_for(
        [
            [0, 11, 12, 13],  # all right: 1 + 3
            [0, 12, 13, 0],  # 1 + 2
            [0, 0, 15, 16],  # wrong at once, right later: 1 + 0
            [0, 15, 0, 17],  # 1 + 1: what is right after an error is not accepted
            [0, 16, 17, 18],  # all right, but not a full set of labels: no part of tau
            [0, 10, 10, 10],  # unused
        ],
        vocabulary=20,
    )
    _, sums = Objective(chunk=4)(hidden, torch.eye(20), blocks)
    assert sums.vector.dtype == torch.float64
    read = Statistics.read(sums)
    assert read.full_blocks == 4
    assert read.accepted == 4 + 3 + 1 + 2
    assert read.tau == 10 / 4
    assert read.slot_count == [5, 5, 4]
    assert read.slot_correct == [4, 4, 3]
    assert read.slot_accuracy == [0.8, 0.8, 0.75]
    decay = [1, math.exp(-0.5), math.exp(-1)]
    right, wrong = math.log(math.exp(5) + 19) - 5, math.log(math.exp(5) + 19)  # nll of one peak among 20 logits
    weight_sum = 5 * decay[0] + 5 * decay[1] + 4 * decay[2]
    loss_sum = right * (4 * decay[0] + 4 * decay[1] + 3 * decay[2]) + wrong * sum(decay)
    assert read.weight_sum == pytest.approx(weight_sum, rel=1e-6)
    assert read.loss_sum == pytest.approx(loss_sum, rel=1e-6)
    assert read.loss == pytest.approx(loss_sum / weight_sum, rel=1e-6)


@pytest.mark.parametrize("chunk", [5, 16])
@pytest.mark.parametrize("seed", range(4))
def test_statistics_equal_the_naive_count(seed, chunk):
    blocks, head = random_blocks(seed), random_head()
    # most slots guess right, so that runs of several lengths appear
    guesses = torch.randint(10, V, blocks.slot_ids.shape, generator=torch.Generator().manual_seed(seed))
    lucky = torch.rand(blocks.labels.shape, generator=torch.Generator().manual_seed(seed)) < 0.7
    guesses[..., 1:] = torch.where(lucky, blocks.labels, guesses[..., 1:])
    hidden = torch.linalg.pinv(head).T[guesses.flatten(1)] * 30
    _, sums = Objective(chunk=chunk)(hidden, head, blocks)
    expected = naive_statistics(hidden, head, blocks)
    assert 1 < expected["accepted"] / expected["full_blocks"] < K
    for name, value in asdict(Statistics.read(sums)).items():
        assert value == pytest.approx(expected[name], rel=1e-6), name


def test_sums_of_micro_batches_read_like_the_whole():
    blocks, head = random_blocks(), random_head()
    hidden = random_hidden(blocks).detach()

    def sums(rows: slice) -> Sums:
        part = {name: getattr(blocks, name)[rows] for name in ("slot_ids", "labels", "weights")}
        return Objective(chunk=16)(hidden[rows], head, reweighted(replace(blocks, **part))).sums

    whole = Statistics.read(sums(slice(0, 3)))
    parts = Statistics.read(Sums.add_up([sums(slice(0, 1)), sums(slice(1, 3))]))
    for name, value in asdict(whole).items():
        assert asdict(parts)[name] == pytest.approx(value, rel=1e-6), name
    assert parts.loss == pytest.approx(whole.loss, rel=1e-6)
    assert parts.tau == whole.tau
    assert parts.slot_accuracy == whole.slot_accuracy


def test_statistics_carry_no_gradient():
    blocks = random_blocks()
    _, sums = Objective(chunk=16)(random_hidden(blocks), random_head(), blocks)
    assert not sums.vector.requires_grad


def test_validation_runs_without_gradient():
    blocks, head = random_blocks(), random_head()
    expected, statistics = Objective(chunk=16)(random_hidden(blocks), head, blocks)
    with torch.no_grad():
        loss, same = Objective(chunk=16)(random_hidden(blocks), head, blocks)
    assert torch.equal(loss, expected.detach())
    assert torch.equal(same.vector, statistics.vector)
