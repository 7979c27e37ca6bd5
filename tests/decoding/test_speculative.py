from __future__ import annotations

import pytest
import torch

from dflash_dist.decoding.speculative import Decoder, first_difference, leading_run
from dflash_dist.draft.kinds.dflash import DFlashDraftModel
from dflash_dist.kernels.attention import OneBlockAttention
from dflash_dist.target.capture import HFDFlashTargetModel
from tests.tiny import lively_target, tiny_shape

PROMPTS = {
    "one token": [5],
    "two tokens": [200, 7],
    "with pad tokens inside": [17, 0, 41, 0, 0, 99],
    "fifty tokens": list(range(10, 60)),
}
PROMPT = PROMPTS["with pad tokens inside"]


@pytest.fixture(scope="module")
def target(tiny_target):
    return lively_target(tiny_target)


@pytest.fixture
def make_decoder(target):
    def make(block_size: int = 8, stop_ids: tuple[int, ...] = ()) -> Decoder:
        torch.manual_seed(1)
        draft = DFlashDraftModel(tiny_shape(block_size=block_size)).eval().requires_grad_(False)
        for parameter in draft.parameters():
            # so that the proposals, too, depend on context and slot: large weights, sharp attention
            parameter.normal_(std=0.3) if parameter.ndim == 2 else parameter.uniform_(1, 3)
        return Decoder(target, draft, stop_ids)

    return make


def test_the_answers_of_these_tests_have_no_ties_and_vary(target, make_decoder):
    for prompt in PROMPTS.values():
        tokens = make_decoder().plain(prompt, 60).tokens
        assert len(set(tokens)) >= 20
        best, second = target(input_ids=torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 :].topk(2).values.T
        assert float((best - second).min()) > 1e-3


# ---- plain ----


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
def test_plain_is_what_transformers_generates_greedily(target, make_decoder, prompt):
    generated = _generate(target, prompt, 24, stop_ids=None)
    assert make_decoder().plain(prompt, 24).tokens == generated


def test_plain_stops_where_transformers_stops(target, make_decoder):
    stop = make_decoder().plain(PROMPT, 20).tokens[12]
    generated = _generate(target, PROMPT, 20, stop_ids=[stop])
    assert generated[-1] == stop and len(generated) < 20
    assert make_decoder(stop_ids=(stop,)).plain(PROMPT, 20).tokens == generated


def test_gap_is_the_distance_of_the_two_largest_logits_after_prompt_and_tokens(target, make_decoder):
    tokens = [44, 239, 27]
    logits = target(input_ids=torch.tensor([PROMPT + tokens])).logits[0, -1].sort(descending=True).values
    assert make_decoder().gap(PROMPT, tokens) == pytest.approx(float(logits[0] - logits[1]), abs=1e-4)


# ---- speculative output is plain output ----


@pytest.mark.parametrize("block_size", [2, 4, 8])
@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
def test_a_random_draft_does_not_change_the_output(make_decoder, prompt, block_size):
    decoder = make_decoder(block_size)
    fast = decoder.speculative(prompt, 32)
    assert fast.tokens == decoder.plain(prompt, 32).tokens
    assert sum(fast.emitted) == 31  # all but the first token, which the prefill gives


@pytest.mark.parametrize("limit", [1, 2, 7, 16])
def test_speculative_keeps_the_token_limit(monkeypatch, make_decoder, limit):
    decoder = make_decoder(4)
    answer = decoder.plain(PROMPT, 40).tokens
    _foretell(monkeypatch, decoder, answer, right=[3])
    fast = decoder.speculative(PROMPT, limit)
    assert fast.tokens == answer[:limit] == decoder.plain(PROMPT, limit).tokens
    assert fast.passes == -(-(limit - 1) // 4)


@pytest.mark.parametrize("end", [0, 1, 5, 13])
def test_a_random_draft_stops_at_the_stop_token(make_decoder, end):
    answer = make_decoder().plain(PROMPT, 30).tokens
    stop = answer[end]
    decoder = make_decoder(stop_ids=(stop, 259))
    expected = answer[: answer.index(stop) + 1]
    assert decoder.plain(PROMPT, 30).tokens == expected
    assert decoder.speculative(PROMPT, 30).tokens == expected


def test_no_token_is_written_past_the_targets_last_position(make_decoder):
    decoder = make_decoder(4)
    answer = decoder.plain(PROMPT, 40).tokens
    decoder.positions = len(PROMPT) + 7
    assert decoder.plain(PROMPT, 40).tokens == decoder.speculative(PROMPT, 40).tokens == answer[:7]


@pytest.mark.parametrize("decode", ["plain", "speculative"])
@pytest.mark.parametrize(
    ("prompt", "limit", "message"),
    [
        ([], 5, "1 to 2047 tokens, found 0"),
        ([5] * 2048, 5, "found 2048"),
        ([5], 0, "max_new_tokens must be at least 1, found 0"),
    ],
    ids=["empty", "long", "nothing to write"],
)
def test_what_cannot_be_answered_is_refused(make_decoder, decode, prompt, limit, message):
    with pytest.raises(ValueError, match=message):
        getattr(make_decoder(), decode)(prompt, limit)


def test_a_stop_token_that_the_prefill_gives_ends_the_answer_without_a_pass(make_decoder):
    first = make_decoder().plain(PROMPT, 1).tokens
    fast = make_decoder(stop_ids=tuple(first)).speculative(PROMPT, 30)
    assert (fast.tokens, fast.passes) == (first, 0)


# The answer's tokens by pass: 0 | 1 2 3 4 | 5 6 7 8 | ...
@pytest.mark.parametrize(
    ("end", "emitted"), [(5, [4, 1]), (6, [4, 2]), (7, [4, 3]), (8, [4, 4]), (9, [4, 4, 1])], ids=str
)
def test_a_stop_token_in_an_accepted_run_cuts_the_run(monkeypatch, make_decoder, end, emitted):
    answer = make_decoder().plain(PROMPT, 40).tokens
    stop = answer[end]
    assert answer.index(stop) == end
    decoder = make_decoder(4, stop_ids=(stop,))
    _foretell(monkeypatch, decoder, answer, right=[3])
    fast = decoder.speculative(PROMPT, 30)
    assert fast.tokens == answer[: end + 1]
    assert fast.emitted == emitted
    # Of a pass that was cut, no more were accepted than were emitted.
    assert fast.accepted == [min(count, 3) for count in emitted]


# ---- acceptance ----


@pytest.mark.parametrize("block_size", [2, 4, 8])
def test_a_perfect_draft_gives_a_whole_block_a_pass(monkeypatch, make_decoder, block_size):
    decoder = make_decoder(block_size)
    answer = decoder.plain(PROMPT, 50).tokens
    _foretell(monkeypatch, decoder, answer, right=[block_size - 1])
    fast = decoder.speculative(PROMPT, 1 + 3 * block_size + 1)
    assert fast.tokens == answer[: 2 + 3 * block_size]
    assert fast.emitted == [block_size] * 3 + [1]  # the last pass is cut by the limit


@pytest.mark.parametrize("right", range(8))
def test_a_draft_that_is_right_in_the_first_n_slots_gives_n_plus_one_tokens_a_pass(monkeypatch, make_decoder, right):
    decoder = make_decoder(8)
    answer = decoder.plain(PROMPT, 50).tokens
    _foretell(monkeypatch, decoder, answer, right=[right])
    fast = decoder.speculative(PROMPT, 1 + 4 * (right + 1))
    assert fast.tokens == answer[: 1 + 4 * (right + 1)]
    assert fast.emitted == [right + 1] * 4


def test_a_right_slot_behind_a_wrong_one_is_not_accepted(monkeypatch, make_decoder):
    decoder = make_decoder(4)
    answer = decoder.plain(PROMPT, 40).tokens

    def propose(anchor, context):
        done = context.length - len(PROMPT) + 1
        return [_other(answer[done]), *answer[done + 1 : done + 3]]

    monkeypatch.setattr(decoder, "_propose", propose)
    fast = decoder.speculative(PROMPT, 12)
    assert fast.tokens == answer[:12]
    assert fast.emitted == [1] * 11


# ---- rollback ----


@pytest.mark.parametrize("wrong_by", [1, 2, 100])
def test_wrong_proposals_leave_no_trace_in_the_output(monkeypatch, make_decoder, wrong_by):
    decoder = make_decoder(8)
    answer = decoder.plain(PROMPT, 60).tokens
    _foretell(monkeypatch, decoder, answer, right=[2, 0, 7, 6, 1], wrong_by=wrong_by)
    fast = decoder.speculative(PROMPT, 41)
    assert fast.tokens == answer[:41]
    assert fast.emitted == [3, 1, 8, 7, 2, 3, 1, 8, 7]


def test_the_targets_cache_holds_the_accepted_tokens_and_nothing_else(monkeypatch, target, make_decoder):
    decoder = make_decoder(8)
    answer = decoder.plain(PROMPT, 40).tokens
    caches = _watch(monkeypatch, decoder, "_verify", lambda tokens, cache: cache)
    lengths = []
    foretell = _foretell(monkeypatch, decoder, answer, right=[2, 0, 7, 5])

    def propose(anchor, context):
        lengths.append((caches[-1].get_seq_length(), context.length))
        return foretell(anchor, context)

    monkeypatch.setattr(decoder, "_propose", propose)
    fast = decoder.speculative(PROMPT, 19)
    assert fast.emitted == [3, 1, 8, 6]
    # Before each round both caches end just before the anchor: prompt, then what the passes so far emitted.
    assert lengths == [(len(PROMPT) + done,) * 2 for done in (0, 3, 4, 12)]

    assert len({id(cache) for cache in caches}) == 1
    clean = target(input_ids=torch.tensor([PROMPT + fast.tokens[:-1]]), use_cache=True).past_key_values
    assert caches[-1].get_seq_length() == clean.get_seq_length() == len(PROMPT) + 18
    for ours, theirs in zip(caches[-1].layers, clean.layers):
        torch.testing.assert_close(ours.keys, theirs.keys, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours.values, theirs.values, rtol=1e-4, atol=1e-4)


# ---- the draft's context ----


@pytest.mark.parametrize("right", [[0], [3], [2, 0, 7, 6, 1]], ids=str)
def test_the_draft_reads_the_features_of_the_accepted_tokens_in_order(monkeypatch, target, make_decoder, right):
    decoder = make_decoder(8)
    answer = decoder.plain(PROMPT, 60).tokens
    pieces = _watch(monkeypatch, decoder.draft, "extend", lambda cache, features: features)
    _foretell(monkeypatch, decoder, answer, right)
    fast = decoder.speculative(PROMPT, 1 + sum(n + 1 for n in right))  # the last pass is not cut

    assert [piece.shape[1] for piece in pieces] == [len(PROMPT), *fast.emitted]
    whole = torch.tensor([PROMPT + fast.tokens[:-1]])  # the last token is the next anchor: not in the context yet
    captured = HFDFlashTargetModel(target, decoder.draft.shape.target_layer_ids).generate_batch(whole, None, None)
    torch.testing.assert_close(torch.cat(pieces, dim=1), captured.hidden_states, rtol=1e-4, atol=1e-4)


def test_proposals_are_those_of_the_training_forward_on_the_same_anchor(monkeypatch, target, make_decoder):
    """Slot 0 holds the anchor at the position after its context, the others the mask token, and slot k's hidden state
    gives proposal k through the target's head."""
    decoder = make_decoder(4)
    shape, embed = decoder.draft.shape, target.get_input_embeddings()
    answer = decoder.plain(PROMPT, 40).tokens
    capture = HFDFlashTargetModel(target, shape.target_layer_ids)
    propose, seen = decoder._propose, []

    def compare(anchor, context):
        proposals = propose(anchor, context)
        length = context.length
        features = capture.generate_batch(torch.tensor([(PROMPT + answer)[:length]]), None, None).hidden_states
        hidden = decoder.draft.through_layers(
            embed(torch.tensor([[anchor, 3, 3, 3]])),
            torch.arange(length, length + 4)[None],
            features,
            torch.arange(length)[None],
            lambda mask, length=length: OneBlockAttention(length, 4, mask, torch.device("cpu")),
        )
        assert proposals == target.lm_head(hidden)[0, 1:].argmax(-1).tolist()
        seen.append(tuple(proposals))
        return proposals

    monkeypatch.setattr(decoder, "_propose", compare)
    decoder.speculative(PROMPT, 12)
    assert len(set(seen)) > 5  # the proposals do vary, so they could have differed


# ---- comparing runs ----


@pytest.mark.parametrize(
    ("proposals", "choices", "accepted"),
    [
        ([], [9], 0),
        ([1], [1, 9], 1),
        ([1], [2, 9], 0),
        ([1, 2, 3], [1, 2, 3, 9], 3),
        ([1, 2, 3], [1, 2, 4, 9], 2),
        ([1, 2, 3], [1, 5, 3, 9], 1),
        ([1, 2, 3], [0, 2, 3, 9], 0),
    ],
)
def test_leading_run_counts_proposals_before_the_first_difference(proposals, choices, accepted):
    assert leading_run(proposals, choices) == accepted


@pytest.mark.parametrize(
    ("left", "right", "index"),
    [
        ([], [], None),
        ([1, 2], [1, 2], None),
        ([1, 2], (1, 2), None),
        ([1, 2, 3], [1, 5, 3], 1),
        ([4, 2], [1, 2], 0),
        ([1, 2], [1, 2, 3], 2),
        ([1, 2, 3], [1, 2], 2),
        ([], [7], 0),
    ],
)
def test_first_difference_is_the_first_index_at_which_outputs_part(left, right, index):
    assert first_difference(left, right) == index


# ---- helpers ----


def _generate(target, prompt: list[int], limit: int, stop_ids: list[int] | None) -> list[int]:
    output = target.generate(
        input_ids=torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),  # else guessed from pad tokens in the prompt
        do_sample=False,
        max_new_tokens=limit,
        eos_token_id=stop_ids if stop_ids else -1,
        pad_token_id=0,
    )
    return output[0, len(prompt) :].tolist()


def _other(token: int, by: int = 1) -> int:
    return (token + by) % 260


def _foretell(monkeypatch, decoder: Decoder, answer: list[int], right: list[int], wrong_by: int = 1):
    """Replaces the draft by one that knows the `answer` to `PROMPT` and is right in the first `right[i]` slots of pass
    i (taken in turn), wrong in all others."""
    slots, passes = decoder.draft.shape.block_size - 1, iter(range(10**6))

    def propose(anchor, context):
        done = context.length - len(PROMPT) + 1
        assert anchor == answer[done - 1], "context and anchor do not fit together"
        correct, following = right[next(passes) % len(right)], answer[done : done + slots]
        assert len(following) == slots, "the test's answer is too short"
        return following[:correct] + [_other(token, wrong_by) for token in following[correct:]]

    monkeypatch.setattr(decoder, "_propose", propose)
    return propose


def _watch(monkeypatch, owner, name: str, pick) -> list:
    """Lets calls of a method through and collects what `pick` takes of their arguments."""
    method, seen = getattr(owner, name), []

    def watched(*args, **options):
        seen.append(pick(*args))
        return method(*args, **options)

    monkeypatch.setattr(owner, name, watched)
    return seen
