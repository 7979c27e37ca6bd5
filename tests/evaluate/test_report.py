from __future__ import annotations

import itertools

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dflash_dist.decoding.speculative import Decoded
from dflash_dist.evaluate.report import Answer, in_short, summarise, table, tau_interval, to_tensorboard


def answer(tokens: int, plain_seconds: float, seconds: float, emitted: list[int], **changes) -> Answer:
    fast = Decoded([7] * tokens, seconds, emitted, [count - 1 for count in emitted])
    place = {"suite": "s", "prompt": 0, "turn": 0, "difference": None}
    return Answer(**place | changes, plain=Decoded([7] * tokens, plain_seconds), fast=fast)


# ---- numbers ----


def test_tau_is_pooled_over_passes_and_its_mean_over_prompts():
    long = answer(9, 2.0, 0.5, [2, 2, 2, 1, 1])  # 8 tokens in 5 passes
    short = answer(5, 1.0, 0.25, [4], prompt=1)  # 4 tokens in 1 pass
    report = summarise([long, short], proposals=3)
    assert report["tau"] == 12 / 6
    assert report["tau_mean_of_prompts"] == (8 / 5 + 4) / 2
    assert (report["prompts"], report["tokens"], report["passes"]) == (2, 14, 6)
    assert report["plain_tokens_per_s"] == 14 / 3
    assert report["speculative_tokens_per_s"] == 14 / 0.75
    assert report["speed_up"] == pytest.approx(4)


def test_acceptance_of_slot_k_is_the_share_of_passes_that_accepted_k_proposals():
    report = summarise([answer(13, 1.0, 1.0, [1, 2, 3, 4, 2])], proposals=3)
    assert report["passes_by_accepted"] == [1, 2, 1, 1]
    assert report["acceptance_by_slot"] == [4 / 5, 2 / 5, 1 / 5]
    # tau is the anchor's certain token and every slot's share
    assert report["tau"] == pytest.approx(1 + sum(report["acceptance_by_slot"]))


def test_an_answer_that_ends_with_its_first_token_has_no_passes():
    short, other = answer(1, 1.0, 1.0, []), answer(5, 1.0, 1.0, [2, 2], prompt=1)
    report = summarise([short], proposals=3)
    assert (report["passes"], report["tau"], report["tau_mean_of_prompts"]) == (0, None, None)
    assert report["acceptance_by_slot"] == [None, None, None] and report["tau_interval"] is None
    shown = {line[:22].strip(): line[22:].split() for line in table(report)}
    assert [shown[name] for name in ("acceptance length", "mean of prompts")] == [["-"]] * 2
    assert table(report)[-1].split() == ["s", "-", "-", "-", "-"] and table(report)[-3].split() == ["s", "-", "-", "-"]
    assert in_short(report).startswith("in short: every answer ended with its first token")
    # nor does it weigh on the mean of the other prompts
    report = summarise([short, other], proposals=3)
    assert (report["tau"], report["tau_mean_of_prompts"]) == (2, 2)
    assert report["tau_interval"] == [2, 2], "a draw of prompts without a pass has no tau"


def test_one_loss_among_ties_is_a_loss():
    tie, loss = {"token": 1, "gap": 0.0, "tie": True}, {"token": 1, "gap": 2.0, "tie": False}
    same, tied, lost = (
        answer(3, 1.0, 1.0, [2], prompt=n, difference=difference) for n, difference in enumerate((None, tie, loss))
    )
    report = summarise([same, tied], proposals=3)
    assert (report["lossless"], report["lossless_share"], report["equal_outputs"]) == (True, 1, 1)
    assert report["differences"] == [{"suite": "s", "prompt": 1, "turn": 0, **tie}]
    report = summarise([same, tied, lost], proposals=3)
    assert (report["lossless"], report["lossless_share"], report["equal_outputs"]) == (False, pytest.approx(2 / 3), 1)


def test_turns_of_a_conversation_are_answers_of_one_prompt():
    turns = [answer(5, 1.0, 1.0, [4]), answer(9, 1.0, 1.0, [2, 2, 2, 2], turn=1)]
    report = summarise(turns, proposals=3)
    assert (report["prompts"], report["answers"], report["equal_outputs"]) == (1, 2, 2)
    assert report["tau"] == report["tau_mean_of_prompts"] == 12 / 5


def test_suites_have_their_own_numbers_and_one_prompt_may_have_anothers_number():
    one, other = answer(5, 1.0, 1.0, [4]), answer(5, 1.0, 1.0, [2, 2], suite="t")
    report = summarise([one, other], proposals=3)
    assert {name: numbers["tau"] for name, numbers in report["suites"].items()} == {"s": 4, "t": 2}
    assert (report["prompts"], report["tau"]) == (2, 8 / 3)


def test_the_interval_is_that_of_all_ways_to_draw_the_prompts_anew():
    emitted, passes = np.array([30, 44, 50, 90]), np.array([20, 20, 30, 30])
    draws = np.array(list(itertools.product(range(4), repeat=4)))
    exact = np.quantile(emitted[draws].sum(1) / passes[draws].sum(1), [0.025, 0.975], method="inverted_cdf")
    interval = tau_interval(emitted, passes)
    assert interval == pytest.approx(exact, abs=0.02)
    assert interval == tau_interval(emitted, passes)
    assert interval[0] < 214 / 100 < interval[1]
    assert tau_interval(emitted[:1], passes[:1]) is None


def test_the_table_has_a_column_for_each_suite_and_one_for_all():
    one, other = answer(5, 1.0, 0.5, [4]), answer(5, 1.0, 0.5, [1, 3], suite="t")
    report = summarise([one, other], proposals=3)
    *above, head, s, t, both = table(report)
    assert head.split() == ["passes", "that", "accept", "0", "1", "2", "3"]
    assert [row.split() for row in (s, t, both)] == [
        ["s", "0%", "0%", "0%", "100%"],
        ["t", "50%", "0%", "50%", "0%"],
        ["all", "33%", "0%", "33%", "33%"],
    ]
    *above, head, s, t, both = above
    assert head.split() == ["accepted", "up", "to", "slot", "1", "2", "3"] and both.split() == [
        "all",
        "67%",
        "67%",
        "33%",
    ]
    lines = {line[:22].rstrip(): line[22:].split() for line in above}
    assert lines[""] == ["s", "t", "all"]
    assert lines["acceptance length"] == ["4.00", "2.00", "2.67"]
    assert lines["tokens/s plain"] == ["5.0", "5.0", "5.0"]
    assert lines["tokens/s speculative"] == ["10.0", "10.0", "10.0"]
    assert lines["speed-up"] == ["2.00x"] * 3
    assert in_short(report) == (
        "in short: a pass of the target emits 2.67 tokens, its own one and 1.67 of 3 proposed, which is 2.00 times as"
        " fast as plain decoding here, and up to 2.67 times where a pass over 4 tokens costs no more than one over 1"
    )


# ---- TensorBoard ----


def test_tensorboard_shows_the_slots_and_how_many_were_accepted(tmp_path):
    to_tensorboard(summarise([answer(11, 1.0, 1.0, [1, 2, 3, 4])], proposals=3), tmp_path, step=7)
    board = EventAccumulator(str(tmp_path)).Reload()
    assert board.Tags()["images"] == ["evaluate/slots"]
    (scalar,), (histogram,) = board.Scalars("evaluate/tau/s"), board.Histograms("evaluate/accepted/s")
    assert (scalar.step, scalar.value) == (7, 2.5)
    assert (histogram.histogram_value.num, histogram.histogram_value.sum) == (4, 0 + 1 + 2 + 3)
