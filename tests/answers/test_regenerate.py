from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, Qwen3ForCausalLM

from dflash_dist.answers import local
from dflash_dist.answers.options import RegenerateOptions
from dflash_dist.answers.parts import Parts
from dflash_dist.answers.regenerate import main, regenerate
from dflash_dist.answers.turns import answer_turns, split_reasoning
from dflash_dist.data import template
from dflash_dist.data.account import BadRow
from dflash_dist.data.chat import ChatEncoder
from dflash_dist.data.conversations import Conversation, Message, read_row
from dflash_dist.ranks import World
from dflash_dist.target.tiny import CHATML
from tests.data.files import make_encoder
from tests.ranks import run_ranks
from tests.tiny import lively_target

STOPS = [2, 192, 50]  # the turn's end, and two tokens that this random target often writes
LIMIT = 12

# Of very different lengths, so that the prompts of a batch are padded.
QUESTIONS = ["Hi", "What is 3 plus 4?", "Tell me all about the sea, and leave nothing out, please.", "Why?", "GG?", "!"]


@pytest.fixture(scope="module")
def target(tiny_target, tmp_path_factory):
    """With stop tokens that end some of its short answers."""
    folder = tmp_path_factory.mktemp("lively") / "target"
    model = lively_target(tiny_target)
    model.generation_config.eos_token_id = STOPS
    model.generation_config.repetition_penalty = 1.5  # of chatting; the draft is to foretell the plain model
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(tiny_target)
    tokenizer.chat_template = "{{ style }}" + CHATML
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def ask(target):
    """The target's greedy answer to messages, alone and with transformers' own means, and why it ended."""
    tokenizer, model = AutoTokenizer.from_pretrained(target), Qwen3ForCausalLM.from_pretrained(target)

    def answer(messages: list[dict], limit: int = LIMIT, **template_args: str) -> tuple[str, str]:
        prompt = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True, return_tensors="pt", **template_args
        )
        output = model.generate(
            **prompt,
            do_sample=False,
            max_new_tokens=limit,
            eos_token_id=STOPS,
            pad_token_id=0,
            repetition_penalty=1.0,
        )
        ids = output[0, prompt["input_ids"].shape[1] :].tolist()
        ended = ids[-1] in STOPS
        return tokenizer.decode(ids[:-1] if ended else ids), "stop" if ended else "length"

    return answer


@pytest.fixture
def arguments(tmp_path, target, write_chats):
    """The settings of a greedy run over `QUESTIONS`, with changes."""

    def make(**changes) -> RegenerateOptions:
        prompts = write_chats(*[[("user", question), ("assistant", "an old answer")] for question in QUESTIONS])
        settings = {
            "target": str(target),
            "prompts": str(prompts),
            "out": tmp_path / "answers.jsonl",
            "batch_size": 4,
            "max_new_tokens": LIMIT,
            "dtype": "float32",
        }
        return RegenerateOptions(**{**settings, **changes})

    return make


@pytest.fixture
def answer(arguments, alone):
    """Regenerates on one rank; returns the rows."""

    def run(**changes) -> list[dict]:
        args = arguments(**changes)
        for path in args.out.parent.glob(f"{args.out.name}*"):
            path.unlink()  # each time from the start
        regenerate(args, alone)
        return _read(args.out)

    return run


@pytest.fixture
def interrupted(arguments, alone, monkeypatch) -> RegenerateOptions:
    """The settings of a run that died after its first batch, rows 1 and 2."""
    args = arguments(batch_size=2)
    write_answers, batches = local.write_answers, []

    def write_once(*given):
        batches.append(given)
        if len(batches) > 1:
            raise KeyboardInterrupt
        return write_answers(*given)

    with monkeypatch.context() as patch:
        patch.setattr(local, "write_answers", write_once)
        with pytest.raises(KeyboardInterrupt):
            regenerate(args, alone)
    assert [json.loads(line)["row"] for line in _part(args).read_text().splitlines()] == [1, 2]
    return args


def _part(args: RegenerateOptions, rank: int = 0) -> Path:
    return Path(f"{args.out}.parts/rank-{rank:05d}.jsonl")


def _read(path: str) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_bytes().split(b"\n") if line]


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _regenerate(world: World, args: RegenerateOptions) -> list[str]:
    """Regenerates as one of many ranks; returns the questions that this one answered."""
    asked, write_answers = [], local.write_answers

    def watched(model, encoder, conversations, *rest):
        asked.extend(conversation.messages[0]["content"] for conversation in conversations)
        return write_answers(model, encoder, conversations, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local, "write_answers", watched)
        regenerate(args, world)
    return asked


# ---- what is written ----


def test_every_row_is_answered_in_order_and_keeps_its_question(answer, tmp_path):
    rows = answer()
    assert [row["row"] for row in rows] == list(range(1, len(QUESTIONS) + 1))
    for row, question in zip(rows, QUESTIONS):
        assert row.keys() == {"messages", "row", "finish_reason"}
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
        assert row["messages"][0]["content"] == question
        assert row["messages"][1]["content"] != "an old answer"
    # The parts are gone; the settings stay and tell how the answers were written.
    assert {path.name for path in tmp_path.iterdir()} == {"answers.jsonl", "answers.jsonl.settings.json", "chats.jsonl"}


@pytest.mark.parametrize("batch_size", [1, 4])
def test_answers_are_those_of_transformers_one_prompt_at_a_time(answer, ask, batch_size):
    found = [(row["messages"][1]["content"], row["finish_reason"]) for row in answer(batch_size=batch_size)]
    assert found == [ask([_user(question)]) for question in QUESTIONS]
    assert len(set(found)) == len(QUESTIONS)
    assert {reason for _, reason in found} == {"stop", "length"}
    assert any("<|im_start|>" in text for text, _ in found)  # a special token is text like any other: it was foretold


def test_a_pad_token_in_a_prompt_is_read_as_text(answer, ask, write_chats):
    question = "<pad><pad>Hi<pad>?"
    prompts = write_chats([("user", question)], [("user", QUESTIONS[2])], name="padded.jsonl")
    assert (
        answer(prompts=str(prompts))[0]["messages"][1]["content"] == ask([_user(question)])[0] != ask([_user("Hi?")])[0]
    )


def test_turns_are_answered_one_by_one_each_after_the_new_answer_before(answer, ask, write_chats):
    old = ("assistant", "an old answer")
    turns = [("system", "Be brief."), ("user", "Go on."), old, ("user", "More"), old, ("user", "Why?"), old]
    prompts = write_chats(turns, [("user", "Why?"), old], name="turns.jsonl")
    row = answer(prompts=str(prompts))[0]

    expected = [{"role": "system", "content": "Be brief."}]
    for question in ("Go on.", "More", "Why?"):
        expected.append(_user(question))
        text, reason = ask(expected)
        expected.append({"role": "assistant", "content": text})
        assert reason == "stop", "choose questions that this target answers to the end"
    assert row == {"messages": expected, "row": 1, "finish_reason": "stop"}


def test_a_final_question_is_answered_and_answers_without_a_question_are_left_out(answer, ask, write_chats):
    prompts = write_chats([("assistant", "Welcome."), ("user", "Hi")], name="open.jsonl")
    text, reason = ask([_user("Hi")])
    assert answer(prompts=str(prompts)) == [
        {"messages": [_user("Hi"), {"role": "assistant", "content": text}], "row": 1, "finish_reason": reason}
    ]


def test_nothing_follows_an_answer_that_was_cut(answer, ask, write_chats):
    text, reason = ask([_user("What is 3 plus 4?")])
    assert reason == "length"
    turns = [("user", "What is 3 plus 4?"), ("assistant", "7"), ("user", "And?"), ("assistant", "8")]
    prompts = write_chats(turns, [("user", "Hi"), ("assistant", "old"), ("user", "And?")], name="cut.jsonl")
    cut, whole = answer(prompts=str(prompts))
    assert cut["messages"] == [_user("What is 3 plus 4?"), {"role": "assistant", "content": text}]
    assert cut["finish_reason"] == "length"
    assert len(whole["messages"]) == 4  # the other conversation of the batch goes on


def test_the_command_line_generates_in_bfloat16(tmp_path, target, write_chats, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    loaded, load_whole = [], local.load_whole
    monkeypatch.setattr(local, "load_whole", lambda *args: loaded.append(load_whole(*args)) or loaded[-1])
    prompts, out = write_chats([("user", "Hi")], [("user", "Why?")]), tmp_path / "deep/down/out.jsonl"
    main(["--target", str(target), "--prompts", str(prompts), "--out", str(out), "--max-new-tokens", "5"])
    assert [row["messages"][0]["content"] for row in _read(out)] == ["Hi", "Why?"]
    assert [model.dtype for model in loaded] == [torch.bfloat16]


def test_bad_rows_are_left_out_if_they_may_be(arguments, alone, write_chats):
    talk, monologue = [("user", "Hi")], [("assistant", "I talk to myself")]
    args = arguments(prompts=str(write_chats(talk, monologue, [("user", "")], talk, name="bad.jsonl")), max_bad_rows=2)
    regenerate(args, alone)
    assert [row["row"] for row in _read(args.out)] == [1, 4]  # numbered as in the prompts


def test_nothing_is_written_past_the_targets_last_position(arguments, alone, tmp_path, target, ask, capsys):
    """As at a server: an answer that reaches it ends there, and a prompt that leaves no room for one is refused."""
    tokenizer = AutoTokenizer.from_pretrained(target)
    lengths = [len(tokenizer.apply_chat_template([_user(q)], add_generation_prompt=True).input_ids) for q in QUESTIONS]
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    *others, longest = order
    full = lengths[order[-2]] + 3  # the second longest has room for three tokens, the longest for none
    assert lengths[order[-3]] + LIMIT <= full <= lengths[longest]
    small = tmp_path / "small"
    shutil.copytree(target, small)
    config = json.loads((small / "config.json").read_text()) | {"max_position_embeddings": full}
    (small / "config.json").write_text(json.dumps(config))
    args = arguments(target=str(small), batch_size=6)
    regenerate(args, alone)
    rows = {row["row"] - 1: row for row in _read(args.out)}
    assert sorted(rows) == sorted(others)
    for number, row in rows.items():  # all but one have room for all that they write
        expected = ask([_user(QUESTIONS[number])], limit=3 if number == order[-2] else LIMIT)
        assert (row["messages"][1]["content"], row["finish_reason"]) == expected
    assert rows[order[-2]]["finish_reason"] == "length"
    assert (
        f"left out 1 rows, the first: row {longest + 1}: no room for an answer: the prompt's {lengths[longest]} tokens"
        f" fill all {full} positions" in capsys.readouterr().out
    )


def test_prompts_with_a_token_that_has_no_embedding_are_refused_before_loading(
    arguments, alone, tmp_path, target, write_chats, monkeypatch
):
    tokenizer = AutoTokenizer.from_pretrained(target)
    tokenizer.add_tokens(["<tool>"])
    folder = tmp_path / "more"
    shutil.copytree(target, folder)
    tokenizer.save_pretrained(folder)
    prompts = write_chats([("user", "Hi")], [("user", "Hi <tool>")], name="tools.jsonl")
    given = {"target": str(folder), "prompts": str(prompts)}
    with (
        monkeypatch.context() as patched,
        pytest.raises(ValueError, match=r"tools.jsonl, row 2: unknown token: '<tool>'"),
    ):
        patched.setattr(local, "load_whole", _die)
        regenerate(arguments(**given), alone)
    args = arguments(**given, max_bad_rows=1, out=tmp_path / "some.jsonl")
    regenerate(args, alone)
    assert [row["row"] for row in _read(args.out)] == [1]


def test_an_answer_that_says_nothing_is_left_out(arguments, alone, monkeypatch, capsys):
    generate = local._generate
    silent = lambda *given: (("", True) if i == 1 else said for i, said in enumerate(generate(*given)))  # noqa: E731
    monkeypatch.setattr(local, "_generate", silent)
    args = arguments(batch_size=6)
    regenerate(args, alone)
    assert [row["row"] for row in _read(args.out)] == [1, 3, 4, 5, 6]
    assert "left out 1 rows, the first: row 2: unusable answer: empty content" in capsys.readouterr().out


def test_tools_reach_the_prompt_and_the_output(arguments, alone, monkeypatch):
    tools, asked = [{"type": "function", "function": {"name": "weather", "parameters": {}}}], []
    prompt_of = ChatEncoder.prompt_of

    def watched(self, conversation):
        asked.append(conversation.tools)
        return prompt_of(self, conversation)

    monkeypatch.setattr(ChatEncoder, "prompt_of", watched)
    args = arguments()
    Path(args.prompts).write_text(json.dumps({"messages": [_user("Hi")], "tools": tools}) + "\n")
    regenerate(args, alone)
    assert asked == [tools]
    assert _read(args.out)[0]["tools"] == tools


def test_a_row_keeps_what_its_answers_depended_on(arguments, alone, ask, capsys):
    """And those that nothing could keep are named."""
    args = arguments(template_args={"style": "run"})
    function = {"name": "weather", "parameters": {}}
    row = {
        **{"messages": [_user("Hi"), {"role": "assistant", "content": "no", "weight": 0}, _user("Why?")]},
        **{"system": "Be brief.", "functions": [function], "enable_thinking": True, "label": "x"},
        "chat_template_kwargs": {"style": "row"},
    }
    Path(args.prompts).write_text(json.dumps(row) + "\n")
    regenerate(args, alone)
    [written] = _read(args.out)
    messages = [{"role": "system", "content": "Be brief."}, *row["messages"]]
    bare = [{key: value for key, value in message.items() if key != "weight"} for message in messages]
    text, reason = ask(bare, style="row")
    assert written == {
        "messages": [*messages, {"role": "assistant", "content": text}],
        "finish_reason": reason,
        "tools": [{"type": "function", "function": function}],
        "chat_template_kwargs": {"enable_thinking": True, "style": "row"},
        "row": 1,
    }
    assert "keys that nothing reads: label (1 rows)" in capsys.readouterr().out


def test_an_argument_that_the_template_does_not_know_is_refused_before_anything_is_written(arguments, alone):
    args = arguments(template_args={"stlye": "x"})
    with pytest.raises(ValueError, match="knows no argument 'stlye': did you mean 'style'"):
        regenerate(args, alone)
    assert not list(args.out.parent.glob("answers.jsonl*"))


@pytest.fixture
def dated(target, tmp_path) -> str:
    """The target with a template that writes the day."""
    folder = Path(shutil.copytree(target, tmp_path / "dated"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{{ strftime_now('%d %b') }}" + CHATML
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_an_output_is_continued_with_the_day_on_which_it_was_begun(arguments, alone, dated, monkeypatch):
    whole = arguments(target=dated, out=arguments().out.with_name("whole.jsonl"), date="2031-12-31", batch_size=2)
    regenerate(whole, alone)
    args, write = arguments(target=dated, batch_size=2), local.write_answers
    monkeypatch.setattr(template, "today", lambda: "2031-12-31")
    with pytest.raises(KeyboardInterrupt), monkeypatch.context() as patch:
        patch.setattr(local, "write_answers", lambda *given: _die() if _part(args).stat().st_size else write(*given))
        regenerate(args, alone)
    monkeypatch.setattr(template, "today", lambda: "2032-01-01")
    regenerate(args, alone)
    assert args.out.read_bytes() == whole.out.read_bytes()
    other = arguments(target=dated, out=args.out.with_name("other.jsonl"))
    regenerate(other, alone)
    assert Path(other.out).read_bytes() != whole.out.read_bytes(), "the day is in the prompt"
    with pytest.raises(ValueError, match="belongs to a run with other prompts or settings"):
        regenerate(arguments(target=dated, date="2032-01-01"), alone)


def test_a_day_is_given_as_one(arguments, alone):
    with pytest.raises(SystemExit):
        main(["--target", "t", "--prompts", "p", "--out", "o", "--date", "31.12.2031"])
    with pytest.raises(ValueError, match="--date 2031-12-31: a server writes the day that its own clock says"):
        regenerate(arguments(endpoint="http://localhost:1/v1", date="2031-12-31"), alone)


def test_a_prompt_that_the_template_refuses_is_left_out(arguments, alone, monkeypatch, capsys):
    prompt_of = ChatEncoder.prompt_of

    def picky(self, conversation):
        if conversation.messages[0]["content"] == "Why?":
            raise BadRow("refused by the chat template: no questions")
        return prompt_of(self, conversation)

    monkeypatch.setattr(ChatEncoder, "prompt_of", picky)
    regenerate(arguments(), alone)
    assert [row["row"] for row in _read(arguments().out)] == [1, 2, 3, 5, 6]
    assert "row 4: refused by the chat template: no questions" in capsys.readouterr().out


# ---- turns ----


def _turns(log: list[Message], *said: Message) -> list[Message]:
    """The messages after every turn was written anew, as in `said`."""
    turns, given = answer_turns(Conversation(log)), iter(said)
    next(turns)
    with pytest.raises(StopIteration) as end:
        while True:
            turns.send(({"role": "assistant"} | next(given), True))
    assert next(given, None) is None
    return end.value.value["messages"]


def _called(name: str, arguments: Any, **more: str) -> Message:
    call = {"type": "function", "function": {"name": name, "arguments": arguments}, **more}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


RESULT = {"role": "tool", "content": "rain"}


def test_the_results_of_tools_follow_the_same_calls_only():
    log = [_user("Weather?"), _called("weather", {"at": "Ulm", "on": 1}, id="old"), RESULT, _user("Thanks")]
    same, bye = _called("weather", '{"on": 1, "at": "Ulm"}', id="new"), {"role": "assistant", "content": "Bye"}
    assert _turns(log, same, bye) == [log[0], same, RESULT | {"tool_call_id": "new"}, log[3], bye]
    for other in (
        _called("weather", '{"at": "Bonn", "on": 1}', id="new"),
        _called("time", '{"at": "Ulm", "on": 1}', id="new"),
        {"role": "assistant", "content": "Look out of the window"},
    ):
        assert _turns(log, other) == [log[0], other]


def test_results_find_their_calls():
    first, second = (_called("weather", {"at": at}, id=at)["tool_calls"][0] for at in ("Ulm", "Bonn"))
    old = {"role": "assistant", "content": "", "tool_calls": [first, second]}
    new = old | {"tool_calls": [first | {"id": "new 1"}, second | {"id": "new 2"}]}
    results = [RESULT | {"tool_call_id": "Bonn"}, RESULT | {"tool_call_id": "Ulm"}]
    written = _turns([_user("Weather?"), old, *results], new, {"content": "Rain"})
    assert [message["tool_call_id"] for message in written[2:4]] == ["new 2", "new 1"]


def test_an_unforeseen_call_ends_the_conversation():
    call = _called("weather", "{}", id="new")
    assert _turns([_user("Hi"), {"role": "assistant", "content": "Hello"}, _user("Bye")], call) == [_user("Hi"), call]


def test_results_of_calls_that_are_text_follow_the_same_text_only():
    old = {"role": "assistant", "content": "<call>weather</call>"}
    log = [_user("Weather?"), old, RESULT]
    end = {"role": "assistant", "content": "Rain"}
    assert _turns(log, old, end) == [*log, end]
    assert _turns(log, end) == [log[0], end]


def test_an_answer_that_is_context_stays_as_it_is():
    given = {"role": "assistant", "content": "no", "weight": 0}
    old, new = {"role": "assistant", "content": "old"}, {"role": "assistant", "content": "new"}
    assert _turns([_user("a"), given, _user("b"), old], new) == [_user("a"), given, _user("b"), new]
    assert _turns([_user("a"), given, old, _user("b")], new, new) == [_user("a"), given, new, _user("b"), new]
    assert _turns([_user("a"), old, _user("b"), given], new) == [_user("a"), new, _user("b"), given]
    given |= _called("weather", {}, id="its own")
    log = [_user("a"), given | {"weight": 0}, RESULT | {"tool_call_id": "its own"}, old]
    assert _turns(log, new) == [*log[:3], new]
    assert next(answer_turns(Conversation([_user("a"), given | {"weight": 0}])), None) is None


def test_a_system_prompt_alone_is_no_question():
    system, greeting = {"role": "system", "content": "Greet"}, {"role": "assistant", "content": "Hi"}
    reply = {"role": "assistant", "content": "new"}
    assert _turns([system, greeting, _user("Hello")], reply) == [system, _user("Hello"), reply]


THOUGHT = {"content": "", "reasoning_content": "hm"}
CALL = {"id": "call_0", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
ANALYSIS = "<|channel|>analysis<|message|>hm<|end|><|start|>assistant"


@pytest.mark.parametrize(
    ("text", "finished", "opened", "message"),
    [
        ("plain", True, False, {"content": "plain"}),
        ("plain", False, False, {"content": "plain"}),
        ("<think>\nhm\n</think>\n\nyes", True, False, {"content": "<think>\nhm\n</think>\n\nyes"}),
        ("<think>\nhm\n</think>\n\nye", False, False, {"content": "<think>\nhm\n</think>\n\nye"}),
        ("<think>\nhm", False, False, THOUGHT),
        ("\n<think>hm", False, False, THOUGHT),
        ("hm", False, True, THOUGHT),
        ("hm\n</think>\n\nyes", True, True, {"content": "<think>\nhm\n</think>\n\nyes"}),
        ("hm\n</think>\n\nyes", True, False, {"content": "<think>\nhm\n</think>\n\nyes"}),
        (ANALYSIS + "<|channel|>final<|message|>yes", True, False, {"content": "yes", "reasoning_content": "hm"}),
        (ANALYSIS + "<|channel|>final<|message|>ye", False, False, {"content": "ye", "reasoning_content": "hm"}),
        ("<|channel|>final<|message|>yes", True, False, {"content": "yes"}),
        ("<|channel|>analysis<|message|>hm", False, False, THOUGHT),
        (ANALYSIS + "<|channel|>fin", False, False, THOUGHT),
        ("<|channel|>ana", False, False, {"content": ""}),
        (
            ANALYSIS + ' to=functions.f<|channel|>commentary <|constrain|>json<|message|>{"x": 1}',
            True,
            False,
            THOUGHT | {"tool_calls": [CALL]},
        ),
        (
            ANALYSIS + '<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"x": 1}',
            True,
            False,
            THOUGHT | {"tool_calls": [CALL]},
        ),
        (ANALYSIS + '<|channel|>commentary to=functions.f json<|message|>{"x"', False, False, THOUGHT),
    ],
)
def test_reasoning_is_told_from_raw_text(text, finished, opened, message):
    assert split_reasoning(text, finished, opened) == message


@pytest.mark.parametrize("text", ["<think>\nhm, le", "hm, le"])
def test_an_answer_that_was_cut_while_thinking_is_trained_up_to_there(text):
    template = (
        "{% for m in messages %}[{{ m.role }}]"
        "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"
        "{{ m.content }}<|im_end|>{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    written = {"role": "assistant"} | split_reasoning(text, finished=False, opened=not text.startswith("<think>"))
    row = read_row({"messages": [_user("Hi"), written], "finish_reason": "length"})
    (rendered,) = make_encoder(chat_template=template).texts(row)
    assert rendered.text == "[user]Hi<|im_end|>[assistant]<think>\nhm, le"


def test_a_prompt_that_opens_the_thinking_gets_its_tag_back(arguments, alone, target, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(target)
    folder = tmp_path / "thinker"
    shutil.copytree(target, folder)
    tokenizer.chat_template += "{% if add_generation_prompt %}{{ '<think>\n' }}{% endif %}"
    tokenizer.save_pretrained(folder)
    regenerate(arguments(target=str(folder)), alone)
    rows = _read(arguments().out)
    assert {row["finish_reason"] for row in rows} == {"stop", "length"}
    for row in rows:
        if row["finish_reason"] == "length":
            assert not row["messages"][1]["content"]
            assert row["messages"][1]["reasoning_content"]
        else:
            assert row["messages"][1]["content"].startswith("<think>\n")


# ---- sampling ----


def test_sampled_answers_depend_on_the_seed_alone(answer):
    greedy, first = answer(), answer(temperature=1.0, seed=1)
    torch.rand(17)  # whatever else has drawn numbers
    assert answer(temperature=1.0, seed=1) == first
    assert answer(temperature=1.0, seed=2) != first
    assert greedy != first


def test_a_tiny_nucleus_or_temperature_is_greedy(answer):
    assert answer(temperature=1.0, top_p=1e-6) == answer(temperature=1e-4) == answer()


# ---- interruptions ----


@pytest.mark.parametrize(
    "torn",
    [b"", b'{"messages": [{"role": "us', '{"messages": [{"role": "user", "content": "Grüß'.encode()[:-1]],
    ids=["no line", "half a line", "half a character"],
)
def test_an_interrupted_run_continues_where_it_stopped(interrupted, alone, arguments, torn):
    with _part(interrupted).open("ab") as part:
        part.write(torn)
    assert _regenerate(alone, interrupted) == QUESTIONS[2:]

    whole = arguments(out=interrupted.out.with_name("whole.jsonl"), batch_size=2)
    regenerate(whole, alone)
    assert interrupted.out.read_bytes() == whole.out.read_bytes()
    assert not _part(interrupted).parent.exists()


def test_a_run_that_is_interrupted_twice_continues_too(interrupted, alone, monkeypatch, ask):
    """The line that the first interruption cut short must not swallow what the second run writes."""
    with _part(interrupted).open("ab") as part:
        part.write(b'{"messages": [{"ro')
    with monkeypatch.context() as patch:
        patch.setattr(Parts, "merge", _die)
        with pytest.raises(KeyboardInterrupt):
            regenerate(interrupted, alone)
    with monkeypatch.context() as patch:
        patch.setattr(local, "write_answers", _die)  # nothing is left to write
        regenerate(interrupted, alone)
    assert [row["messages"][1]["content"] for row in _read(interrupted.out)] == [ask([_user(q)])[0] for q in QUESTIONS]


def _die(*args):
    raise KeyboardInterrupt


def test_left_over_parts_of_other_settings_are_refused(interrupted, arguments, alone):
    before = _part(interrupted).read_bytes()
    changes = [{"max_new_tokens": 5}, {"temperature": 0.5}, {"top_p": 0.9}, {"seed": 1}, {"dtype": "bfloat16"}]
    changes += [{"top_k": 5}, {"endpoint": "http://localhost:1/v1", "extra_body": {}}]
    changes += [{"template_args": {"style": "brief"}}, {"target": f"{interrupted.target}/."}]
    for change in changes:
        with pytest.raises(ValueError, match=f"{interrupted.out}.settings.json belongs to a run with other") as refusal:
            regenerate(arguments(batch_size=2, **change), alone)
        assert re.search(rf"Changed: (.*; )?{[*change][-1]}: .* -> .*\. Restore these, or choose", str(refusal.value))
    assert _part(interrupted).read_bytes() == before
    assert not interrupted.out.exists()


def test_left_over_parts_of_other_prompts_are_refused(interrupted, write_chats, alone):
    # the same file, but for one letter
    write_chats(*[[("user", question.replace("Why", "Who")), ("assistant", "an old answer")] for question in QUESTIONS])
    told = r"Changed: prompts: '\w+' -> '\w+' \(what is asked: other files, other rows in them, or another number of"
    with pytest.raises(ValueError, match=told):
        regenerate(interrupted, alone)


def test_a_start_that_wrote_no_row_blocks_no_other(arguments, alone, monkeypatch):
    args = arguments(max_new_tokens=5)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(local, "load_whole", _die)
        regenerate(args, alone)
    assert [path.name for path in args.out.parent.glob("answers*")] == ["answers.jsonl.parts"]
    regenerate(arguments(), alone)
    assert len(_read(args.out)) == len(QUESTIONS)


def test_a_target_that_cannot_be_loaded_is_refused_before_the_prompts_are_read(arguments, alone, target, tmp_path):
    shutil.copytree(target, tmp_path / "cut")
    (tmp_path / "cut/model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"cut/model\.safetensors is empty"):
        regenerate(arguments(target=str(tmp_path / "cut"), prompts="nowhere.jsonl"), alone)


def test_a_run_may_continue_with_another_batch_size(interrupted, arguments, alone, ask):
    regenerate(arguments(batch_size=3), alone)
    assert [row["messages"][1]["content"] for row in _read(interrupted.out)] == [ask([_user(q)])[0] for q in QUESTIONS]


def test_finished_rows_are_read_once_to_continue_and_once_to_merge(interrupted, alone, monkeypatch):
    # not once for each conversation: a run over 100,000 of them would spend hours on reading
    reads, index = [], Parts.index
    monkeypatch.setattr(Parts, "index", lambda self: reads.append(self) or index(self))
    regenerate(interrupted, alone)
    assert len(reads) == 2


def test_unicode_line_separators_in_a_conversation_do_not_break_its_line(answer, write_chats):
    # JSON leaves them as they are, and Python's str.splitlines() breaks lines there
    texts = ["line\u2028separator", "a paragraph\u2029separator", "next\u0085line", "plain"]
    rows = answer(prompts=str(write_chats(*[[("user", text)] for text in texts], name="separators.jsonl")))
    assert [row["messages"][0]["content"] for row in rows] == texts


def test_a_finished_run_started_again_writes_nothing(answer, arguments, alone, monkeypatch, capsys):
    rows = answer()
    monkeypatch.setattr(local, "load_whole", _die)
    regenerate(arguments(), alone)
    assert "is finished already" in capsys.readouterr().out
    assert _read(arguments().out) == rows


def test_a_file_that_this_command_did_not_write_is_not_taken_for_its_output(arguments, alone):
    Path(arguments().out).write_text("precious\n")
    with pytest.raises(ValueError, match="was not written by this command"):
        regenerate(arguments(), alone)
    assert Path(arguments().out).read_text() == "precious\n"


# ---- ranks ----


def test_two_ranks_write_the_file_of_one(arguments, alone):
    one, two = arguments(), arguments(out=arguments().out.with_name("two.jsonl"), batch_size=2)
    regenerate(one, alone)
    assert run_ranks(_regenerate, 2, two) == [QUESTIONS[0::2], QUESTIONS[1::2]]
    assert Path(two.out).read_bytes() == Path(one.out).read_bytes()
    assert not _part(two).parent.exists()


def test_more_ranks_than_rows_are_no_trouble(arguments, write_chats, ask):
    args = arguments(prompts=str(write_chats([("user", "Hi")], name="one.jsonl")))
    assert run_ranks(_regenerate, 2, args) == [["Hi"], []]
    assert [row["messages"][1]["content"] for row in _read(args.out)] == [ask([_user("Hi")])[0]]


def test_an_interrupted_run_continues_on_another_number_of_ranks(interrupted, arguments, alone):
    first, second = run_ranks(_regenerate, 2, interrupted)
    assert sorted(first + second) == sorted(QUESTIONS[2:])
    whole = arguments(out=interrupted.out.with_name("whole.jsonl"))
    regenerate(whole, alone)
    assert interrupted.out.read_bytes() == whole.out.read_bytes()


def test_a_conversation_with_nothing_to_answer_is_refused(arguments, alone, write_chats):
    prompts = str(write_chats([("user", "Hi")], [("assistant", "I talk to myself")], name="monologue.jsonl"))
    with pytest.raises(ValueError, match=r"monologue\.jsonl, row 2: nothing to answer"):
        regenerate(arguments(prompts=prompts), alone)


def test_what_was_assumed_of_nulls_is_said(arguments, alone, capsys):
    calls = [{"function": {"name": "weather", "arguments": {"city": "Oslo", "unit": unit}}} for unit in (None, "C")]
    turns = [[_user("Hi"), {"role": "assistant", "tool_calls": [call]}] for call in calls]
    args = arguments()
    Path(args.prompts).write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in turns))
    regenerate(args, alone)
    place = "messages[].tool_calls[].function.arguments.unit"
    expected = f"1 x null left out as padding, since other rows have a value there: {place}\n"
    assert capsys.readouterr().out.startswith(expected)
