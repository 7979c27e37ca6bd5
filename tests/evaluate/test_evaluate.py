from __future__ import annotations

import dataclasses
import itertools
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, Qwen3ForCausalLM

from dflash_dist.contract.folder import TRAINING, write_draft
from dflash_dist.data import template
from dflash_dist.data.conversations import Conversation
from dflash_dist.decoding.speculative import Decoded, Decoder
from dflash_dist.draft.kinds.dflash import DFlashDraftModel
from dflash_dist.evaluate import evaluate as program
from dflash_dist.evaluate.evaluate import main
from dflash_dist.ranks import World
from dflash_dist.target.load import digest_weights, read_info
from dflash_dist.target.tiny import CHATML
from tests.data.files import chat, chats, write_rows
from tests.ranks import run_ranks
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
        write_draft(tmp_path / "draft", DFlashDraftModel, shape, DFlashDraftModel(shape).state_dict(), "float32")
        return tmp_path / "draft"

    return write


@pytest.fixture
def arguments(tmp_path, target, export, write_chats):
    """A command line that evaluates on `QUESTIONS`, and where its report goes: to another file each time."""
    prompts = write_chats(*[[("user", question), ("assistant", "an answer")] for question in QUESTIONS])
    files = ["--target", str(target), "--draft", str(export()), "--prompts", str(prompts)]
    reports = (tmp_path / f"reports/{n}.json" for n in itertools.count())

    def make(*options: str) -> tuple[list[str], Path]:
        report = next(reports)
        return [*files, "--json", str(report), "--max-new-tokens", "13", *options], report

    return make


@pytest.fixture
def evaluate(arguments):
    """Evaluates as on the command line; returns the report that it writes."""

    def run(*options: str) -> dict:
        argv, report = arguments(*options)
        main(argv)
        return json.loads(report.read_text())

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
    assert report["prompts"] == report["equal_outputs"] == len(QUESTIONS)
    assert report["lossless"] is True
    assert report["differences"] == []
    assert report["tokens"] == 3 * 13  # no answer of this target reaches the stop token
    assert (report["dtype"], report["draft"]) == ("float32", str(tmp_path / "draft"))


def test_a_head_that_is_not_the_targets_own_is_refused(evaluate, monkeypatch):
    load_ends = program.load_ends
    monkeypatch.setattr(
        program,
        "load_ends",
        lambda *given: (lambda ends: dataclasses.replace(ends, head=ends.embedding))(load_ends(*given)),
    )
    with pytest.raises(ValueError, match="are not what its LM head's matrix gives"):
        evaluate()


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


def test_rejection_sampling_claims_no_equality(evaluate, capsys):
    sampled = ("--temperature", "1", "--top-k", "50")
    agreeing, rejecting = evaluate(*sampled), evaluate(*sampled, "--rejection")
    assert (agreeing["rejection"], agreeing["lossless"]) == (False, True)
    assert rejecting["rejection"] is True
    assert [rejecting[name] for name in ("lossless", "lossless_share", "equal_outputs")] == [None] * 3
    assert rejecting["differences"] == []
    assert re.search(r"^equal outputs +-$", capsys.readouterr().out, re.MULTILINE)
    with pytest.raises(ValueError, match="--rejection is a way to sample: give a --temperature above 0"):
        evaluate("--rejection")


def test_the_prompt_is_the_conversation_before_its_last_answer(monkeypatch, evaluate, target):
    asked, plain = [], Decoder.plain
    monkeypatch.setattr(Decoder, "plain", lambda self, *args: (asked.append(args), plain(self, *args))[1])
    evaluate()
    assert asked == [(prompt_ids(target, question), 13) for question in QUESTIONS]


def test_prompts_are_rendered_as_in_training_unless_asked_otherwise(monkeypatch, evaluate, export, target, capsys):
    record = {"chat_template": "{{ mark }}{{ messages[0].content }}", "template_args": {"mark": "+"}}
    record |= {"drop_reasoning": True, "step": 7}
    folder = export()
    (folder / "training.json").write_text(json.dumps(record))
    drawn: list[tuple] = []
    monkeypatch.setattr(program, "to_tensorboard", lambda report, *place: drawn.append(place))
    asked, plain = [], Decoder.plain
    monkeypatch.setattr(Decoder, "plain", lambda self, *args: (asked.append(args[0]), plain(self, *args))[1])
    assert evaluate("--limit", "1", "--tensorboard", "board")["template_args"] == {"mark": "+"}
    assert drawn == [(Path("board"), 7)]  # the step that the draft was exported from
    assert "trained with" not in capsys.readouterr().out
    assert evaluate("--limit", "1", "--template-args", '{"mark": "-"}')["template_args"] == {"mark": "-"}
    assert 'was trained with the template arguments {"mark": "+"}' in capsys.readouterr().out
    tokenizer = AutoTokenizer.from_pretrained(target)
    assert asked == [tokenizer(mark + QUESTIONS[0]).input_ids for mark in "+-"]
    thought = Conversation([{"role": "assistant", "content": "<think>\nHm.\n</think>\n\nYes."}])
    encoder = program.make_encoder(read_info(str(target)), record, None)
    assert encoder.prompt_of(thought) == tokenizer("+Yes.").input_ids


def test_prompts_have_the_day_of_the_training_or_of_the_evaluations_beginning(monkeypatch, arguments, export, target):
    record = {"chat_template": "{{ strftime_now('%Y') }}{{ messages[0].content }}", "drop_reasoning": False}
    record |= {"template_args": {}}
    asked, plain = [], Decoder.plain
    monkeypatch.setattr(Decoder, "plain", lambda self, *args: (asked.append(args[0]), plain(self, *args))[1])
    folder, tokenizer = export(), AutoTokenizer.from_pretrained(target)
    for trained, expected in (({"date": "2030-01-01"}, "2030"), ({}, "2031")):
        (folder / "training.json").write_text(json.dumps(record | trained))
        argv, report = arguments("--limit", "1")
        for day in ("2031-12-31", "2032-01-01"):
            monkeypatch.setattr(template, "today", lambda day=day: day)
            main(argv)
        assert asked == [tokenizer(expected + QUESTIONS[0]).input_ids], "once: the second one was finished already"
        assert json.loads(report.with_suffix(".answers.jsonl.settings.json").read_text())["date"][:4] == expected
        asked.clear()


def test_a_prompt_has_the_template_arguments_of_its_row(monkeypatch, arguments, export, target, tmp_path):
    record = {"chat_template": "{{ mark }}{{ messages[0].content }}", "template_args": {"mark": "+"}}
    (export() / "training.json").write_text(json.dumps(record | {"drop_reasoning": False}))
    asked, plain = [], Decoder.plain
    monkeypatch.setattr(Decoder, "plain", lambda self, *args: (asked.append(args[0]), plain(self, *args))[1])
    rows = [chat("q", "a"), chat("q", "a", chat_template_kwargs={"mark": "row"})]
    argv, report = arguments("--diagnose")
    argv[argv.index("--prompts") + 1] = str(write_rows(tmp_path / "rows.jsonl", rows))
    main(argv)
    tokenizer = AutoTokenizer.from_pretrained(target)
    assert asked == [tokenizer("+q").input_ids, tokenizer("rowq").input_ids]
    [verdict] = [v for v in json.loads(report.read_text())["diagnosis"] if v["cause"] == "template"]
    assert verdict["numbers"]["rendered_otherwise"] == 0


def test_limit_takes_the_first_prompts(evaluate):
    report = evaluate("--limit", "2")
    assert (report["prompts"], report["tokens"]) == (2, 26)


def test_bfloat16_is_decoded_too(evaluate):
    report = evaluate("--dtype", "bfloat16", "--limit", "1")
    assert (report["dtype"], report["prompts"]) == ("bfloat16", 1)
    assert report["passes"] >= 3


@pytest.mark.usefixtures("two_right")
def test_the_report_is_printed(evaluate, capsys):
    shown = evaluate()["examples"]
    assert [example["question"] for example in shown] == QUESTIONS
    assert [block["accepted"] for block in shown[0]["blocks"]] == [0, 2, 2, 2, 2]
    printed = capsys.readouterr().out
    assert "float32 on cpu\n" in printed
    lines = {line[:22].rstrip(): line[22:].split() for line in printed.splitlines()}
    assert lines[""] == ["chats"]  # the suite is called by its file
    assert (lines["prompts"], lines["tokens"], lines["acceptance length"]) == (["3"], ["39"], ["3.00"])
    assert re.search(r"\naccepted up to slot +1 +2 +3\n  chats +100% +100% +0%\n", printed)
    assert re.search(r"\npasses that accept +0 +1 +2 +3\n  chats +0% +0% +100% +0%\nin short: ", printed)
    assert lines["equal outputs"] == ["3", "of", "3"]


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
    place = {"suite": "chats", "prompt": 1, "turn": 0, "token": 5}
    assert difference == place | {"gap": pytest.approx(best - second, abs=1e-4), "tie": False}
    assert difference["gap"] > 1e-3
    assert "chats, prompt 1, turn 0, token 5: top two logits" in (printed := capsys.readouterr().out)
    assert "apart, NOT a tie\n" in printed


@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize(("gap", "tie"), [(0.0, True), (1e-3, True), (1.1e-3, False)])
def test_a_difference_at_a_tie_is_no_loss_but_is_counted(monkeypatch, evaluate, capsys, gap, tie):
    monkeypatch.setattr(Decoder, "gap", lambda self, prompt, tokens: gap)
    report = evaluate()
    assert report["lossless"] is tie
    assert report["equal_outputs"] == 2
    (difference,) = report["differences"]
    assert (difference["gap"], difference["tie"]) == (gap, tie)
    assert ("NOT a tie" in capsys.readouterr().out) is not tie


def test_an_output_that_ends_early_is_a_difference_at_its_end(monkeypatch, evaluate):
    speculative = Decoder.speculative
    monkeypatch.setattr(Decoder, "speculative", lambda self, prompt, limit: speculative(self, prompt, limit - 3))
    report = evaluate("--limit", "1")
    assert (report["lossless"], report["equal_outputs"]) == (False, 0)
    assert report["differences"][0]["token"] == 10


# ---- suites of several turns ----


def test_a_later_question_follows_the_targets_own_answer(monkeypatch, evaluate, target, tmp_path):
    turns = ["Tell me more.", "Say it again."]
    (tmp_path / "question.jsonl").write_text(json.dumps({"turns": turns}) + "\n")
    asked, plain = [], Decoder.plain
    monkeypatch.setattr(Decoder, "plain", lambda self, *args: (asked.append(args[0]), plain(self, *args))[1])
    report = evaluate("--suite", f"mtbench={tmp_path / 'question.jsonl'}")
    assert {suite: numbers["answers"] for suite, numbers in report["suites"].items()} == {"mtbench": 2, "chats": 3}
    assert (report["suites"]["mtbench"]["prompts"], report["prompts"]) == (1, 4)

    tokenizer = AutoTokenizer.from_pretrained(target)
    model, ids = Qwen3ForCausalLM.from_pretrained(target), torch.tensor([prompt_ids(target, turns[0])])
    whole = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=13)
    answer = tokenizer.decode(whole[0, ids.shape[1] :])
    messages = [
        {"role": "user", "content": turns[0]},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": turns[1]},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert asked[1] == tokenizer(text).input_ids


def test_an_answer_goes_on_without_its_stop_token(monkeypatch, evaluate, target, tmp_path):
    tokenizer, asked = AutoTokenizer.from_pretrained(target), []
    yes = Decoded([*tokenizer("Yes.").input_ids, tokenizer.eos_token_id], 1.0)
    decoder = SimpleNamespace(
        stop_ids={tokenizer.eos_token_id},
        plain=lambda ids, limit: (asked.append(ids), yes)[1],
        speculative=lambda ids, limit: yes,
    )
    monkeypatch.setattr(program.Evaluation, "load", lambda self, _: setattr(self, "decoder", decoder))
    monkeypatch.setattr(program.Evaluation, "examiner", None, raising=False)
    (tmp_path / "question.jsonl").write_text(json.dumps({"turns": ["Hi", "Sure?"]}) + "\n")
    evaluate("--suite", f"mtbench={tmp_path / 'question.jsonl'}", "--limit", "1")
    turns = [("user", "Hi"), ("assistant", "Yes."), ("user", "Sure?")]
    text = "".join(f"<|im_start|>{role}\n{said}<|im_end|>\n" for role, said in turns) + "<|im_start|>assistant\n"
    assert asked[1] == tokenizer(text).input_ids


def test_one_question_asked_twice_is_answered_with_other_noise(arguments, write_chats):
    twice = write_chats([("user", "Hi")], [("user", "Hi")], name="twice.jsonl")
    argv, report = arguments("--temperature", "1", "--prompts", str(twice))
    main(argv)
    rows = [json.loads(row) for row in report.with_suffix(".answers.jsonl").read_text().splitlines()]
    one, other = (row["answers"][0]["plain"]["tokens"] for row in rows)
    assert one != other


# ---- ranks and interruptions ----


def _run(argv: list[str], world: World) -> None:
    program.evaluate(program.parse(program.EvaluateOptions, "evaluate", None, argv), world)


def _evaluate(world: World, argv: list[str]) -> int:
    """As one of many ranks; returns how many prompts this one decoded."""
    decoded, decode = [], program.Evaluation.decode
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program.Evaluation, "decode", lambda self, *args: (decoded.append(args), decode(self, *args))[1])
        _run(argv, world)
    return len(decoded)


def without_times(report: Path) -> dict:
    def strip(numbers: dict) -> dict:
        return {name: value for name, value in numbers.items() if not name.endswith(("_per_s", "speed_up"))}

    numbers = strip(json.loads(report.read_text()))
    return numbers | {"suites": {suite: strip(of_suite) for suite, of_suite in numbers["suites"].items()}}


def test_two_ranks_report_what_one_does(arguments):
    argv, one = arguments("--diagnose")
    main(argv)
    argv, two = arguments("--diagnose")
    assert run_ranks(_evaluate, 2, argv) == [2, 1]
    assert without_times(two) == without_times(one)


def test_sampled_answers_depend_on_the_seed_and_not_on_the_ranks(arguments):
    def answers(report: Path) -> list[list[int]]:
        rows = report.with_suffix(".answers.jsonl").read_text().splitlines()
        return [json.loads(row)["answers"][0]["plain"]["tokens"] for row in rows]

    sampled = ["--temperature", "1", "--top-k", "50"]
    reports = []
    for ranks, seed in ((1, "0"), (2, "0"), (1, "1")):
        argv, report = arguments(*sampled, "--seed", seed)
        main(argv) if ranks == 1 else run_ranks(_evaluate, ranks, argv)
        reports.append(report)
    one, two, other = map(answers, reports)
    assert one == two
    assert all(ours != theirs for ours, theirs in zip(one, other))
    assert json.loads(reports[0].read_text())["lossless"] is True


def test_an_interrupted_evaluation_decodes_only_what_is_missing(monkeypatch, arguments, alone):
    argv, whole = arguments()
    main(argv)
    argv, report = arguments()
    decode, calls = program.Evaluation.decode, itertools.count()

    def dies(self, *prompt):
        if next(calls) == 2:
            raise KeyboardInterrupt
        return decode(self, *prompt)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(program.Evaluation, "decode", dies)
        main(argv)
    assert not report.is_file()
    assert _evaluate(alone, argv) == 1
    assert without_times(report) == without_times(whole)
    assert _evaluate(alone, argv) == 0  # and then it only reports
    with pytest.raises(ValueError, match="belongs to a run with other prompts or settings"):
        _evaluate(alone, [*argv, "--limit", "2"])


def test_an_evaluation_continues_only_under_the_same_settings(monkeypatch, arguments, target, tmp_path):
    def begun(*options: str) -> list[str]:
        argv, _ = arguments("--limit", "1", *options)
        main(argv)
        return argv

    def assert_refused(argv: list[str]) -> None:
        with pytest.raises(ValueError, match=r"\.settings\.json belongs to a run with other prompts or settings"):
            main(argv)

    monkeypatch.setattr(program.Evaluation, "load", lambda *_: None)  # what is decoded does not matter here
    decoded = {"tokens": [7], "seconds": 1.0, "emitted": [], "accepted": []}
    answer = {"suite": "chats", "prompt": 0, "turn": 0, "plain": decoded, "fast": decoded, "difference": None}
    monkeypatch.setattr(program.Evaluation, "decode", lambda *_: {"answers": [answer], "evidence": {}})
    argv = begun("--temperature", "1")
    main(argv)  # nothing changed
    file, config = tmp_path / "draft/model.safetensors", tmp_path / "draft/config.json"
    written = file.read_bytes()
    save_file(load_file(file), file, metadata={"exported": "by another version"})
    main(argv)  # the same weights, in another file
    settings = Path(argv[argv.index("--json") + 1]).with_suffix(".answers.jsonl.settings.json")
    stated = settings.read_text()
    settings.write_text(json.dumps(json.loads(stated) | {"draft": digest_weights(file.parent)}))
    main(argv)  # as older versions named a draft
    file.write_bytes(written)
    assert_refused(argv)
    settings.write_text(stated)
    changes = ["--dtype bfloat16", "--seed 1", "--temperature 0.5", "--top-p 0.9", "--top-k 5", "--max-new-tokens 12"]
    for change in [*changes, "--rejection", "--limit 2"]:
        assert_refused([*argv, *change.split()])
    assert_refused([*argv[:-2], "--temperature", "0", "--diagnose"])
    other = tmp_path / "other"
    shutil.copytree(target, other)
    weights = load_file(other / "model.safetensors")
    name = next(iter(weights))
    save_file({**weights, name: weights[name] + 1}, other / "model.safetensors", metadata={"format": "pt"})
    assert_refused([*argv, "--target", str(other)])
    content, text = file.read_bytes(), config.read_text()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert_refused(argv)
    file.write_bytes(content)
    config.write_text(text.replace('"mask_token_id": 3', '"mask_token_id": 4'))  # the same weights, served otherwise
    assert_refused(argv)
    config.write_text(text)
    main(argv)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("x" * 2048, r"its 2\d+ tokens leave no room for an answer in the 2048 positions of "),
        ("no", "refused by the chat template: never no"),
    ],
)
def test_a_prompt_that_cannot_be_used_is_named_before_the_first_is_decoded(
    monkeypatch, tmp_path, arguments, export, content, reason
):
    draft = export()
    refusing = "{% if messages[-1].content == 'no' %}{{ raise_exception('never no') }}{% endif %}" + CHATML
    (draft / TRAINING).write_text(json.dumps({"chat_template": refusing, "template_args": {}}))
    (tmp_path / "asked").mkdir()
    write_rows(tmp_path / "asked/a.jsonl", [*chats(3), ""])
    write_rows(tmp_path / "asked/b.jsonl", [*chats(2), chat(content, "a")])
    argv, _ = arguments("--prompts", str(tmp_path / "asked"))
    monkeypatch.setattr(program.Evaluation, "load", None)
    with pytest.raises(ValueError, match=rf"asked/b\.jsonl, row 3: {reason}"):
        main(argv)
    with pytest.raises(TypeError, match="not callable"):  # the first five are loaded for
        main([*argv, "--limit", "5"])


def test_several_ranks_need_a_place_to_meet(arguments):
    argv, _ = arguments()
    at = argv.index("--json")
    with pytest.raises(ValueError, match="--json is needed where several ranks evaluate"):
        program.evaluate(
            program.parse(program.EvaluateOptions, "evaluate", None, argv[:at] + argv[at + 2 :]),
            World(0, 2, torch.device("cpu")),
        )


def test_without_json_the_report_is_only_printed(arguments, capsys):
    argv, report = arguments("--limit", "1")
    at = argv.index("--json")
    main(argv[:at] + argv[at + 2 :])
    assert "1 of 1" in capsys.readouterr().out
    assert not report.parent.exists()


# ---- what is refused ----


def test_a_diagnosis_of_sampled_answers_is_refused(evaluate):
    with pytest.raises(ValueError, match="--diagnose compares likeliest tokens: leave --temperature out"):
        evaluate("--diagnose", "--temperature", "1")


def test_no_prompts_at_all_are_refused(target, export):
    with pytest.raises(ValueError, match="there is nothing to decode: name a --suite or --prompts"):
        main(["--target", str(target), "--draft", str(export())])


def test_a_draft_that_is_neither_here_nor_on_the_hub_is_refused(monkeypatch, arguments):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    argv, _ = arguments("--draft", "nobody/nothing")
    with pytest.raises(
        ValueError, match="draft nobody/nothing could not be read, neither as a folder nor from the hub"
    ):
        main(argv)


def test_a_limit_below_one_is_refused(evaluate):
    with pytest.raises(ValueError, match="--limit must be at least 1, found 0"):
        evaluate("--limit", "0")
