"""Sampled answers have the target's distribution; by agreement, they are the tokens of plain sampling."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from transformers import LogitsProcessorList, Qwen3Config, Qwen3ForCausalLM
from transformers.generation import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from dflash_dist.decoding.sampling import CHOICE, PROPOSAL, Sampling
from dflash_dist.decoding.speculative import Decoder
from dflash_dist.draft.kinds.dflash import DFlashDraftModel
from tests.tiny import enliven, tiny_shape

VOCABULARY, PROMPT = 6, [4]
BOTH = pytest.mark.parametrize("rejection", [False, True], ids=["agreement", "rejection"])


def p_value(counts: torch.Tensor, expected: torch.Tensor) -> float:
    """Of Pearson's chi-square test; cells that expect fewer than five are taken together."""
    few = expected < 5
    counts, expected = counts.double(), expected.double()
    counts, expected = (torch.cat([each[~few], each[few].sum()[None]]) for each in (counts, expected))
    counts, expected = counts[expected > 0], expected[expected > 0]
    statistic = ((counts - expected) ** 2 / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((len(counts) - 1) / 2).double(), statistic / 2))


def rows(seed: int, count: int, width: int = 40) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) * 2


# ---- one token ----


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(0.7),
        Sampling(1.3, top_k=5),
        Sampling(1.0, top_k=1000),
        Sampling(1.0, top_p=0.9),
        Sampling(0.6, top_p=0.95, top_k=20),
        Sampling(1.0, top_p=1e-6),
    ],
    ids=str,
)
def test_probabilities_are_those_that_transformers_samples_from(sampling):
    warpers = [TemperatureLogitsWarper(sampling.temperature)]
    warpers += [TopKLogitsWarper(sampling.top_k)] if sampling.top_k else []
    warpers += [TopPLogitsWarper(sampling.top_p)] if sampling.top_p < 1 else []
    logits = rows(0, 50)
    expected = LogitsProcessorList(warpers)(torch.zeros(50, 1, dtype=torch.long), logits.clone()).softmax(-1)
    torch.testing.assert_close(sampling.probabilities(logits), expected, rtol=1e-5, atol=1e-7)
    assert torch.equal(sampling.probabilities(logits) > 0, expected > 0)


def test_a_nucleus_ends_with_the_token_that_reaches_its_probability():
    quarters = torch.zeros(1, 4)
    for top_p, kept in ((0.25, 1), (0.5, 2), (0.51, 3), (1.0, 4)):
        expected = torch.tensor([[1 / kept] * kept + [0.0] * (4 - kept)])
        assert torch.equal(Sampling(1.0, top_p=top_p).probabilities(quarters), expected)


def test_choices_have_the_probabilities(count=40_000):
    sampling = Sampling(0.8, top_p=0.9, top_k=10)
    logits = rows(1, 1, 12)
    expected = sampling.probabilities(logits)[0] * count
    choices = sampling.scores(logits.expand(count, -1), 0).argmax(-1)
    assert p_value(choices.bincount(minlength=12), expected) > 1e-3
    # The same position under many seeds is as random as many positions under one seed.
    choices = torch.tensor([replace(sampling, seed=s).scores(logits, 7).argmax() for s in range(8000)])
    assert p_value(choices.bincount(minlength=12), expected / 5) > 1e-3
    assert p_value(choices.bincount(minlength=12), Sampling(1.0, 0.9, 10).probabilities(logits)[0] * 8000) < 1e-6


def test_noise_belongs_to_the_position_and_the_use():
    probabilities, sampling = rows(2, 30).softmax(-1), Sampling(1.0, seed=3)
    drawn = sampling.draw(probabilities, 100, CHOICE)
    assert drawn[4:] == sampling.draw(probabilities[4:], 104, CHOICE)
    assert drawn != sampling.draw(probabilities, 101, CHOICE)
    assert drawn != sampling.draw(probabilities, 100, PROPOSAL)
    assert drawn != replace(sampling, seed=4).draw(probabilities, 100, CHOICE)


def test_agreement_and_rejection_accept_as_often_as_theory_says(count=20_000):
    """Agreement: sum over x of 1 / sum over y of max(p_y / p_x, q_y / q_x). Rejection: 1 - total variation distance."""
    sampling = Sampling(1.0)
    p, q = rows(3, 2, 8).softmax(-1)
    distance = float((p - q).abs().sum() / 2)
    agreement = float((1 / torch.maximum(p[None] / p[:, None], q[None] / q[:, None]).sum(1)).sum())
    assert 0.2 < (1 - distance) / (1 + distance) < agreement < 1 - distance

    theirs = sampling.draw(p.expand(count, -1), 0, CHOICE)
    ours = sampling.draw(q.expand(count, -1), 0, CHOICE)
    same = sum(a == b for a, b in zip(ours, theirs)) / count
    assert same == pytest.approx(agreement, abs=4 * (0.25 / count) ** 0.5)

    few = 4000
    proposals = sampling.draw(q.expand(few, -1), 0, PROPOSAL)
    accepted = [len(sampling.accept([x], q[None], p.expand(2, -1), at)) - 1 for at, x in enumerate(proposals)]
    assert sum(accepted) / few == pytest.approx(1 - distance, abs=4 * (0.25 / few) ** 0.5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": -1.0}, "temperature must not be negative"),
        ({"top_p": 0.0}, "top_p must be above 0"),
        ({"top_p": 1.1}, "at most 1"),
        ({"top_k": -1}, "top_k must be at least 1, or 0"),
    ],
)
def test_numbers_out_of_range_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**fields)


def test_greedy_decoding_rejects_nothing():
    assert Sampling(1.0, rejection=True).rejects
    assert not Sampling(0.0, rejection=True).rejects and not Sampling(1.0).rejects


def test_what_follows_accepted_proposals_is_drawn_from_what_the_draft_left_over():
    # The draft foretells token 0 of every slot. The target wants it in the first `right` slots, then half of the time.
    sampling, foreseen = Sampling(1.0), torch.tensor([[1.0, 0.0, 0.0]] * 3)
    for right in range(4):
        probabilities = torch.tensor([[1.0, 0.0, 0.0]] * right + [[0.5, 0.5, 0.0]] * (4 - right))
        drawn = [tuple(sampling.accept([0, 0, 0], foreseen, probabilities, at)) for at in range(0, 1600, 8)]
        assert all(tokens[:right] == (0,) * right and 2 not in tokens for tokens in drawn)
        assert sum(tokens[right] for tokens in drawn) == pytest.approx(100, abs=30)
        # Behind a refused proposal comes what the draft did not foresee; behind all three, nothing was foreseen.
        assert all(tokens[-1] == 1 for tokens in drawn if len(tokens) < 4)


# ---- answers ----


def tiny_decoder(block_size: int = 4) -> Decoder:
    """A target and a draft that both depend on what came before, with a vocabulary of six."""
    torch.manual_seed(2)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        initializer_range=0.6,
        tie_word_embeddings=False,
    )
    shape = tiny_shape(
        hidden_size=16,
        num_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        intermediate_size=16,
        vocab_size=VOCABULARY,
        target_layer_ids=[0],
        block_size=block_size,
    )
    draft = DFlashDraftModel(shape)
    for parameter in draft.parameters():
        parameter.data.normal_(std=0.5) if parameter.ndim == 2 else parameter.data.uniform_(0.5, 1)
    return Decoder(enliven(Qwen3ForCausalLM(config)).eval(), draft, stop_ids=[])


@pytest.mark.parametrize("block_size", [2, 4, 8])
@pytest.mark.parametrize("sampling", [Sampling(0.7), Sampling(1.5, top_k=4), Sampling(1.0, top_p=0.8)], ids=str)
def test_by_agreement_the_speculative_answer_is_the_plain_one(sampling, block_size):
    decoder, answers, lengths = tiny_decoder(block_size), set(), set()
    for seed in range(4):
        decoder.sampling = replace(sampling, seed=seed)
        fast = decoder.speculative(PROMPT, 30)
        assert fast.tokens == decoder.plain(PROMPT, 30).tokens
        answers.add(tuple(fast.tokens))
        lengths.update(fast.accepted)
    assert len(answers) == 4 and len(lengths) > 1  # seeds matter, and the draft is sometimes right


@BOTH
def test_a_stop_token_ends_a_sampled_answer(rejection):
    decoder = tiny_decoder()
    decoder.sampling = Sampling(1.0, rejection=rejection)
    answer = decoder.speculative(PROMPT, 30).tokens
    decoder.stop_ids = frozenset([answer[9]])
    assert decoder.speculative(PROMPT, 30).tokens == answer[: answer.index(answer[9]) + 1]


@BOTH
def test_a_draft_that_foresees_the_target_is_accepted_whole(rejection, monkeypatch):
    """Its logits for a slot are what the target gives after the right tokens before it."""
    decoder = tiny_decoder()
    decoder.sampling = Sampling(1.0, rejection=rejection)
    monkeypatch.setattr(decoder.draft, "scores", lambda *_: torch.zeros(3, VOCABULARY))
    decoder.head = decoder.target.lm_head.weight.data.zero_()  # a target that chooses evenly
    assert decoder.speculative(PROMPT, 1 + 4 * 5).emitted == [4] * 5


@BOTH
def test_sampled_answers_have_the_targets_distribution(rejection, count=800):
    """The first three tokens, the second and third of them from proposals, against all 216 answers that there are."""
    decoder = tiny_decoder()
    sampling = Sampling(1.5, top_k=5, rejection=rejection)
    counts, accepted = torch.zeros(VOCABULARY**3), 0
    for seed in range(count):
        decoder.sampling = replace(sampling, seed=seed)
        decoded = decoder.speculative(PROMPT, 3)
        first, second, third = decoded.tokens
        counts[(first * VOCABULARY + second) * VOCABULARY + third] += 1
        accepted += sum(decoded.accepted)
    assert 0.2 < accepted / (2 * count) < 0.8  # proposals are taken and refused
    assert p_value(counts, answer_probabilities(decoder, sampling) * count) > 1e-3
    assert p_value(counts, answer_probabilities(decoder, replace(sampling, temperature=2.0)) * count) < 1e-6


def answer_probabilities(decoder: Decoder, sampling: Sampling) -> torch.Tensor:
    """Of every answer of three tokens, in the order of their digits, without a cache."""
    texts = torch.tensor([PROMPT + list(answer) for answer in itertools.product(range(VOCABULARY), repeat=3)])
    with torch.no_grad():
        following = sampling.probabilities(decoder.target(input_ids=texts).logits[:, :-1])
    of_answer = following.gather(-1, texts[:, 1:, None]).prod(dim=1)[:, 0]
    assert float(of_answer.sum()) == pytest.approx(1, abs=1e-5)
    return of_answer
