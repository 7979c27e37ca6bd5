from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoTokenizer, Qwen3ForCausalLM

from dflash_dist.contract.folder import write_draft
from dflash_dist.decoding.speculative import Decoded, Decoder
from dflash_dist.draft.model import DFlashDraftModel
from dflash_dist.serving.evaluate import before_last_answer, main, summarise
from tests.tiny import lively_target, tiny_shape

QUESTIONS = ["What is 3 plus 4?", "Hi", "Tell me all about the sea."]


@pytest.fixture(scope="module")
def target(tiny_target, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lively") / "target"
    lively_target(tiny_target).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_target).save_pretrained(folder)
    return folder


def prompt_ids(target, question: str) -> list[int]:
    text = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    return AutoTokenizer.from_pretrained(target)(text).input_ids


@pytest.fixture
def export(tmp_path):
    """Writes a random draft that fits the tiny target, but for `changes`."""

    def write(**changes):
        torch.manual_seed(1)
        shape = tiny_shape(block_size=4, **changes)
        write_draft(tmp_path / "draft", shape, DFlashDraftModel(shape).state_dict(), "float32")
        return tmp_path / "draft"

    return write


@pytest.fixture
def evaluate(tmp_path, target, export, write_chats):
    """Evaluates on `QUESTIONS` as on the command line; returns the report that it writes."""

    def run(*options: str) -> dict:
        prompts = write_chats(*[[("user", question), ("assistant", "an answer")] for question in QUESTIONS])
        out = tmp_path / "reports/report.json"
        files = ["--target", str(target), "--draft", str(export()), "--prompts", str(prompts), "--json", str(out)]
        main([*files, "--max-new-tokens", "13", *options])
        return json.loads(out.read_text())

    return run


@pytest.fixture
def two_right(monkeypatch):
    """Replaces the draft by one that is right in two slots of three, as long as the answer lasts, and wrong after."""
    plain = Decoder.plain
    known = {"prompt": 0, "answer": []}

    def remember(self, prompt, max_new_tokens):
        decoded = plain(self, prompt, max_new_tokens)
        known.update(prompt=len(prompt), answer=decoded.tokens)
        return decoded

    def propose(self, anchor, context):
        done = context.length - known["prompt"] + 1
        right = known["answer"][done : done + 2]
        return right + [258] * (3 - len(right))

    monkeypatch.setattr(Decoder, "plain", remember)
    monkeypatch.setattr(Decoder, "_propose", propose)


# ---- end to end ----


def test_a_random_draft_is_lossless(evaluate, tmp_path):
    report = evaluate()
    assert report.keys() == {
        "prompts",
        "tokens",
        "passes",
        "tau",
        "tau_mean_of_prompts",
        "acceptance_by_slot",
        "plain_tokens_per_s",
        "speculative_tokens_per_s",
        "speed_up",
        "lossless",
        "equal_outputs",
        "differences",
        "template_args",
        "dtype",
        "draft",
    }
    assert report["prompts"] == report["equal_outputs"] == len(QUESTIONS)
    assert report["lossless"] is True
    assert report["differences"] == []
    assert report["tokens"] == 3 * 13  # no answer of this target reaches the stop token
    assert (report["dtype"], report["draft"]) == ("float32", str(tmp_path / "draft"))


@pytest.mark.usefixtures("two_right")
def test_the_reported_numbers_agree_with_each_other(evaluate):
    report = evaluate()
    assert report["lossless"] is True and report["equal_outputs"] == 3
    # 12 tokens after the first, three a pass
    assert report["passes"] == 3 * 4
    assert report["tau"] == (report["tokens"] - report["prompts"]) / report["passes"] == 3
    assert report["tau_mean_of_prompts"] == 3
    assert report["acceptance_by_slot"] == [1, 1, 0]
    assert report["speed_up"] == pytest.approx(report["speculative_tokens_per_s"] / report["plain_tokens_per_s"])


def test_the_prompt_is_the_conversation_before_its_last_answer(monkeypatch, evaluate, target):
    asked, plain = [], Decoder.plain
    monkeypatch.setattr(Decoder, "plain", lambda self, *args: (asked.append(args), plain(self, *args))[1])
    evaluate()
    assert asked == [(prompt_ids(target, question), 13) for question in QUESTIONS]


def test_prompts_are_rendered_as_in_training_unless_asked_otherwise(monkeypatch, evaluate, export, target, capsys):
    record = {"chat_template": "{{ mark }}{{ messages[0].content }}", "template_args": {"mark": "+"}}
    folder = export()
    (folder / "training.json").write_text(json.dumps(record | {"drop_reasoning": False}))
    asked, plain = [], Decoder.plain
    monkeypatch.setattr(Decoder, "plain", lambda self, *args: (asked.append(args[0]), plain(self, *args))[1])
    assert evaluate("--limit", "1")["template_args"] == {"mark": "+"}
    assert "trained with" not in capsys.readouterr().out
    assert evaluate("--limit", "1", "--template-args", '{"mark": "-"}')["template_args"] == {"mark": "-"}
    assert 'was trained with the template arguments {"mark": "+"}' in capsys.readouterr().out
    tokenizer = AutoTokenizer.from_pretrained(target)
    assert asked == [tokenizer(mark + QUESTIONS[0]).input_ids for mark in "+-"]


def test_limit_takes_the_first_prompts(evaluate):
    report = evaluate("--limit", "2")
    assert (report["prompts"], report["tokens"]) == (2, 26)


def test_bfloat16_is_decoded_too(evaluate):
    report = evaluate("--dtype", "bfloat16", "--limit", "1")
    assert (report["dtype"], report["prompts"]) == ("bfloat16", 1)
    assert report["passes"] >= 3


@pytest.mark.usefixtures("two_right")
def test_the_report_is_printed(evaluate, capsys):
    evaluate()
    printed = capsys.readouterr().out
    assert "3 prompts, 39 tokens, float32\n" in printed
    assert "3.00 tokens a pass (3.00 mean of prompts)\n" in printed
    assert "1.00  1.00  0.00\n" in printed
    assert "3 of 3\n" in printed


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"hidden_size": 32}, "hidden size 32, not 64"),
        ({"vocab_size": 300}, "vocabulary 300, not 260"),
        ({"num_target_layers": 7}, "number of target layers 7, not 6"),
    ],
)
def test_a_draft_of_another_target_is_refused_by_name(target, export, write_chats, changes, told):
    draft, prompts = export(**changes), write_chats([("user", "Hi")])
    with pytest.raises(ValueError) as refusal:
        main(["--target", str(target), "--draft", str(draft), "--prompts", str(prompts)])
    assert str(refusal.value) == f"{draft} was trained for another target than {target}: {told}"


# ---- differences ----


@pytest.fixture
def forced(monkeypatch, target):
    """Makes the speculative output of the second question differ at token 5."""
    speculative, changed = Decoder.speculative, prompt_ids(target, QUESTIONS[1])

    def decode(self, prompt, max_new_tokens):
        decoded = speculative(self, prompt, max_new_tokens)
        if prompt == changed and len(decoded.tokens) > 5:  # not the short warm-up
            decoded.tokens[5] = (decoded.tokens[5] + 1) % 260
        return decoded

    monkeypatch.setattr(Decoder, "speculative", decode)


@pytest.mark.usefixtures("forced")
def test_a_difference_is_reported_with_its_place_and_gap_and_is_a_loss(evaluate, target, capsys):
    report = evaluate()
    assert report["lossless"] is False
    assert report["equal_outputs"] == 2
    (difference,) = report["differences"]

    # The gap is that of the plain output's own choice at token 5.
    model, ids = Qwen3ForCausalLM.from_pretrained(target), torch.tensor([prompt_ids(target, QUESTIONS[1])])
    tokens = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=5)
    best, second = model(input_ids=tokens).logits[0, -1].topk(2).values.tolist()
    assert difference == {"prompt": 1, "token": 5, "gap": pytest.approx(best - second, abs=1e-4), "tie": False}
    assert difference["gap"] > 1e-3
    assert "prompt 1, token 5: top two logits" in (printed := capsys.readouterr().out)
    assert "apart, NOT a tie\n" in printed


@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize(("gap", "tie"), [(0.0, True), (1e-3, True), (1.1e-3, False)])
def test_a_difference_at_a_tie_is_no_loss_but_is_counted(monkeypatch, evaluate, capsys, gap, tie):
    monkeypatch.setattr(Decoder, "gap", lambda self, prompt, tokens: gap)
    report = evaluate()
    assert report["lossless"] is tie
    assert report["equal_outputs"] == 2
    assert report["differences"] == [{"prompt": 1, "token": 5, "gap": gap, "tie": tie}]
    assert ("NOT a tie" in capsys.readouterr().out) is not tie


def test_an_output_that_ends_early_is_a_difference_at_its_end(monkeypatch, evaluate):
    speculative = Decoder.speculative
    monkeypatch.setattr(Decoder, "speculative", lambda self, prompt, limit: speculative(self, prompt, limit - 3))
    report = evaluate("--limit", "1")
    assert (report["lossless"], report["equal_outputs"]) == (False, 0)
    assert report["differences"][0]["token"] == 10


# ---- pooling ----


def _decoded(tokens: int, seconds: float, emitted: list[int] | None = None) -> Decoded:
    return Decoded([7] * tokens, seconds, emitted or [], [count - 1 for count in emitted or []])


def test_tau_is_pooled_over_passes_and_its_mean_over_prompts():
    long = (_decoded(9, 2.0), _decoded(9, 0.5, [2, 2, 2, 1, 1]), None)  # 8 tokens in 5 passes
    short = (_decoded(5, 1.0), _decoded(5, 0.25, [4]), None)  # 4 tokens in 1 pass
    report = summarise([long, short], block_size=4)
    assert report["tau"] == 12 / 6
    assert report["tau_mean_of_prompts"] == (8 / 5 + 4) / 2
    assert (report["prompts"], report["tokens"], report["passes"]) == (2, 14, 6)
    assert report["plain_tokens_per_s"] == 14 / 3
    assert report["speculative_tokens_per_s"] == 14 / 0.75
    assert report["speed_up"] == pytest.approx(4)


def test_acceptance_of_slot_k_is_the_share_of_passes_that_accepted_k_proposals():
    report = summarise([(_decoded(11, 1.0), _decoded(11, 1.0, [1, 2, 3, 4]), None)], block_size=4)
    assert report["acceptance_by_slot"] == [3 / 4, 2 / 4, 1 / 4]
    # tau is the anchor's certain token and every slot's share
    assert report["tau"] == 1 + sum(report["acceptance_by_slot"])


def test_an_answer_that_ends_with_its_first_token_has_no_passes():
    report = summarise([(_decoded(1, 1.0), _decoded(1, 1.0), None)], block_size=4)
    assert (report["passes"], report["tau"], report["tau_mean_of_prompts"]) == (0, 0, 0)
    assert report["acceptance_by_slot"] == [0, 0, 0]
    # nor does it weigh on the mean of the other prompts
    other = (_decoded(5, 1.0), _decoded(5, 1.0, [2, 2]), None)
    report = summarise([(_decoded(1, 1.0), _decoded(1, 1.0), None), other], block_size=4)
    assert (report["tau"], report["tau_mean_of_prompts"]) == (2, 2)


def test_one_loss_among_ties_is_a_loss():
    same = (_decoded(3, 1.0), _decoded(3, 1.0, [2]), None)
    tie, loss = {"prompt": 0, "token": 1, "gap": 0.0, "tie": True}, {"prompt": 1, "token": 1, "gap": 2.0, "tie": False}
    report = summarise([same, (*same[:2], tie)], block_size=4)
    assert (report["lossless"], report["equal_outputs"], report["differences"]) == (True, 1, [tie])
    report = summarise([(*same[:2], tie), (*same[:2], loss)], block_size=4)
    assert (report["lossless"], report["equal_outputs"], report["differences"]) == (False, 0, [tie, loss])


@pytest.mark.parametrize(
    ("roles", "kept"),
    [
        (["user"], 1),
        (["user", "assistant"], 1),
        (["system", "user", "assistant"], 2),
        (["user", "assistant", "user"], 3),
        (["user", "assistant", "user", "assistant"], 3),
        (["user", "assistant", "tool"], 3),
    ],
)
def test_before_last_answer_leaves_out_only_a_final_answer(roles, kept):
    messages = [{"role": role, "content": str(i)} for i, role in enumerate(roles)]
    assert before_last_answer(messages) == messages[:kept]
    assert len(messages) == len(roles)  # the caller's list stays whole


def test_a_limit_below_one_is_refused(evaluate):
    with pytest.raises(ValueError, match="--limit must be at least 1, found 0"):
        evaluate("--limit", "0")
