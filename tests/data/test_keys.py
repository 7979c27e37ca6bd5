"""Whatever a row holds is read, harmless, a reason to refuse it, or named: nothing is lost in silence."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest

from dflash_dist.config import DataConfig
from dflash_dist.data import documents as module
from dflash_dist.data import sources
from dflash_dist.data.account import BadRow
from dflash_dist.data.conversations import Conversation, Text, is_context, read_row
from dflash_dist.data.documents import open_documents
from dflash_dist.data.keys import LABELS
from dflash_dist.data.rows import load_data
from dflash_dist.data.sources import FileSource
from dflash_dist.target.tiny import CHATML
from tests.data.files import chat, make_encoder, write_rows

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
SYSTEM = {"role": "system", "content": "s"}
FUNCTION = {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}
TOOL = {"type": "function", "function": FUNCTION}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"x": 1}}}


def read(row: dict[str, Any]) -> Conversation:
    found = read_row(row)
    assert isinstance(found, Conversation)
    return found


def rows_of(*turns: dict[str, Any], **beside: Any) -> list[dict[str, Any]]:
    """The same row in every shape that has turns of its own."""
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    sharegpt = [
        {"from": names[turn["role"]], "value": turn.get("content")}
        | {key: value for key, value in turn.items() if key not in ("role", "content")}
        for turn in turns
    ]
    shapes = {"messages": list(turns), "conversations": sharegpt}
    return [{shape: given, **beside} for shape, given in shapes.items()]


# ------------------------------------------------------------------------------------------------ what is read


@pytest.mark.parametrize("key", ["system", "system_prompt", "system_message"])
def test_a_system_prompt_beside_the_turns_is_read_in_every_shape(key):
    shapes = [*rows_of(USER, ANSWER), {"prompt": "q", "response": "a"}]
    assert [read({**row, key: "s"}).messages for row in shapes] == [[SYSTEM, USER, ANSWER]] * 3
    assert [read({**row, key: ""}).messages for row in shapes] == [[USER, ANSWER]] * 3


def test_a_system_prompt_that_the_turns_begin_with_is_there_once():
    for row in rows_of(SYSTEM, USER, ANSWER, system=" s\n", system_prompt="s"):
        assert read(row).messages == [SYSTEM, USER, ANSWER]


@pytest.mark.parametrize("beside", [{"system": "t"}, {"system": "s", "system_prompt": "t"}])
def test_two_system_prompts_are_refused(beside):
    for row in rows_of(SYSTEM, USER, ANSWER, **beside):
        with pytest.raises(BadRow, match="two system prompts"):
            read_row(row)


@pytest.mark.parametrize("content", [None, "I look."])
def test_the_older_function_call_is_a_tool_call_and_its_result_a_tools(content):
    older = {"role": "assistant", "content": content, "function_call": {"name": "add", "arguments": '{"x": 1}'}}
    result = {"role": "function", "name": "add", "content": "3"}
    assert read({"messages": [USER, older, result, ANSWER]}).messages == [
        USER,
        {"role": "assistant", "content": content or "", "tool_calls": [CALL]},
        {"role": "tool", "name": "add", "content": "3"},
        ANSWER,
    ]
    with pytest.raises(BadRow, match="both 'tool_calls' and 'function_call'"):
        read({"messages": [USER, older | {"tool_calls": [CALL]}]})


def test_flat_tools_are_wrapped_as_an_engine_gets_them():
    others = [{"type": "web_search"}, {"type": "custom", "name": "shell"}]
    flat = [FUNCTION, {"type": "function", **FUNCTION}, json.dumps(FUNCTION), TOOL, *others]
    for tools in (flat, json.dumps(flat)):
        assert read(chat("q", "a", tools=tools)).tools == [TOOL] * 4 + others


def test_openais_older_functions_are_tools():
    assert read(chat("q", "a", functions=[FUNCTION])).tools == [TOOL]
    assert read(chat("q", "a", functions=[FUNCTION], tools=[TOOL])).tools == [TOOL]
    with pytest.raises(BadRow, match="wrong tools: 'tools' and 'functions' describe different ones"):
        read(chat("q", "a", functions=[FUNCTION | {"name": "sub"}], tools=[TOOL]))


@pytest.mark.parametrize("key", ["weight", "train", "training", "trainable", "loss", "loss_weight"])
def test_an_answer_of_no_weight_is_context(key):
    for off, on in ((0, 1), (False, True), (0.0, 1.0)):
        for row in rows_of(USER, ANSWER | {key: off}, USER, ANSWER | {key: on}, USER, ANSWER | {key: None}):
            messages = read(row).messages
            assert [is_context(message) for message in messages] == [False, True] + [False] * 4
            assert [message for message in messages if not is_context(message)] == [USER, USER, ANSWER, USER, ANSWER]
    for row in rows_of(USER | {key: 0}, ANSWER):
        assert read(row) == Conversation([USER, ANSWER])
    for wrong in (0.5, 2, "0", [0]):
        with pytest.raises(BadRow, match=f"wrong {key}: .* 1 or 0, found"):
            read_row({"messages": [USER, ANSWER | {key: wrong}]})


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_thinking_beside_a_response_belongs_to_it(key):
    expected = ANSWER | {"reasoning_content": "hm", "thinking": "hm"}
    assert read({"prompt": "q", "response": "a", key: "hm"}).messages == [USER, expected]


def test_a_turn_of_sharegpt_keeps_what_a_message_has():
    turn = {"from": "gpt", "value": "a", "reasoning": "hm", "tool_calls": [CALL], "name": "me"}
    thinking = {"reasoning_content": "hm", "thinking": "hm"}
    assert read({"conversations": [{"from": "human", "value": "q"}, turn]}).messages == [
        USER,
        ANSWER | thinking | {"tool_calls": [CALL], "name": "me"},
    ]


def test_template_arguments_of_a_row_are_read():
    row = chat("q", "a", chat_template_kwargs={"enable_thinking": True, "style": None, "n": 1}, thinking=False)
    assert read(row) == Conversation([USER, ANSWER], template_args={"enable_thinking": True, "n": 1, "thinking": False})
    assert read(chat("q", "a", chat_template_kwargs='{"n": 1}')).template_args == {"n": 1}
    assert read(chat("q", "a", enable_thinking=False)).template_args == {"enable_thinking": False}
    with pytest.raises(BadRow, match="wrong chat_template_kwargs"):
        read_row(chat("q", "a", chat_template_kwargs=[1]))


# ------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("documents", [{"title": "t", "text": "x"}]),
        ("images", ["a.png"]),
        ("image", "a.png"),
        ("audio", {"path": "a.wav"}),
        ("videos", ["a.mp4"]),
        ("history", [["q", "a"]]),
    ],
)
def test_a_key_that_changed_the_prompt_and_cannot_be_rendered_is_refused(key, value):
    for row in [*rows_of(USER, ANSWER), {"prompt": "q", "response": "a"}, {"text": "qa", "prompt_length": 1}]:
        with pytest.raises(BadRow, match=f"unusable key '{key}': "):
            read_row({**row, key: value})
        for nothing in (None, "", [], {}):
            read_row({**row, key: nothing})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("audio", {"id": "audio_1"}),
        ("images", ["a.png"]),
        ("tools", [TOOL]),
        ("mask", True),
        ("mask", False),
        ("loss_mask", 0),
        ("masked", 1),
        ("train_detail", [{"begin_offset": 0, "end_offset": 1, "train": False}]),
    ],
)
def test_a_message_that_says_something_unreadable_of_prompt_or_supervision_is_refused(key, value):
    for row in rows_of(USER, ANSWER | {key: value}):
        with pytest.raises(BadRow, match=f"unusable key '{key}': "):
            read_row(row)
    assert read({"messages": [USER, ANSWER | {key: None}]}) == Conversation([USER, ANSWER])


@pytest.mark.parametrize("key", ["prefix", "partial"])
def test_an_answer_that_somebody_else_began_is_refused(key):
    with pytest.raises(BadRow, match=f"begun answer: '{key}'"):
        read_row({"messages": [USER, ANSWER | {key: True}]})
    assert read({"messages": [USER, ANSWER | {key: False}]}) == Conversation([USER, ANSWER])


@pytest.mark.parametrize("key", ["parameters", "args", "kwargs", "input"])
def test_arguments_of_a_call_under_another_name_are_refused(key):
    for call in ({"name": "add", key: {"x": 1}}, {"function": {"name": "add", key: {"x": 1}}}):
        with pytest.raises(BadRow, match=f"unusable key '{key}': .*'arguments'"):
            read_row({"messages": [USER, {"role": "assistant", "tool_calls": [call]}]})


# ------------------------------------------------------------------------------------------------ what is named


def test_keys_that_nothing_reads_are_told():
    part = {"type": "text", "text": "q", "cache_control": {}, "bold": True}
    call = CALL | {"index": 0, "signature": "s", "function": CALL["function"] | {"strict": True}}
    row = chat([part], "a", tool_choice="none", prompt="q", label=False, thinking="hm", system="s")
    row["messages"] += [USER | {"tool_calls": [call], "mood": "low"}, ANSWER | {"refusal": "no", "tool_calls": [call]}]
    assert sorted(read(row).unread) == [
        "label",
        "message.content.bold",
        "message.mood",
        "message.refusal",
        "message.tool_calls",
        "message.tool_calls.function.strict",
        "message.tool_calls.signature",
        "prompt",
        "thinking",
        "tool_choice",
    ]
    assert read_row({"text": "qa", "prompt_length": 1, "system": "s", "tools": []}) == Text("qa", [(1, 2)])
    assert read_row({"text": "qa", "prompt_length": 1, "system": "s", "tools": []}).unread == ("system",)


def test_labels_and_what_is_null_or_empty_are_not_told():
    labels = dict.fromkeys(LABELS, "x")
    nothing: dict[str, Any] = {"prompt": None, "chosen": [], "rejected": "", "comment": {}}
    row = chat("q", "a", **labels, **nothing)
    row["messages"] = [message | labels | nothing | {"refusal": None} for message in row["messages"]]
    assert read(row).unread == ()
    assert read(row) == Conversation([USER, ANSWER])


@pytest.mark.parametrize("workers", [1, 2])
def test_the_cache_counts_the_rows_with_each_key_on_any_number_of_processes(tmp_path, monkeypatch, workers):
    monkeypatch.setattr(sources, "CHUNK_ROWS", 2)
    monkeypatch.setattr(module, "CHUNKS_ALONE", 1)
    rows = [chat(f"{k}?", f"{k}!", prompt="p" * (k % 3), id=k) for k in range(9)]
    rows[4]["messages"][0]["mood"] = rows[4]["messages"][1]["mood"] = "low"
    rows[7]["chat_template_kwargs"] = {"style": "brief"}
    path = write_rows(tmp_path / "rows.jsonl", rows)
    expected = Counter({"prompt": 6, "message.mood": 1, "template argument style": 1})
    for _ in range(2):  # made, then read
        summary = open_documents(FileSource(path), make_encoder(), tmp_path / "cache", 0, workers)[1]
        assert summary.unread == expected


def test_a_run_names_them_with_their_counts_over_all_files(tmp_path):
    (tmp_path / "data").mkdir()
    write_rows(tmp_path / "data/a.jsonl", [chat("q", "a", prompt="p"), chat("q", "a", label=True)])
    write_rows(tmp_path / "data/b.jsonl", [chat("q", "a", prompt="p", id=1)])
    config = DataConfig(path=str(tmp_path / "data"), seq_len=64, cache_dir=str(tmp_path / "cache"))
    lines = list(load_data(config, make_encoder(), seed=0, pack=True).describe())
    assert "keys that nothing reads: prompt (2 rows), label (1 rows)" in lines
    config = DataConfig(path=str(write_rows(tmp_path / "c.jsonl", [chat("q", "a", id=1)])), cache_dir=config.cache_dir)
    assert "keys" not in "\n".join(load_data(config, make_encoder(), seed=0, pack=True).describe())


# ------------------------------------------------------------------------------------------------ what they do


def test_arguments_of_a_row_come_before_those_of_the_run():
    encoder = make_encoder(chat_template="{{ style }}{{ tone }}" + CHATML, template_args={"style": "S", "tone": "T"})
    row = chat("q", "a", chat_template_kwargs={"style": "R", "unknown": 1})
    [text] = encoder.texts(read(row))
    assert text.text.startswith("RT<|im_start|>")
    assert encoder.prompt_of(read(row)) == encoder.tokenizer("RT" + CHAT_PROMPT).input_ids
    assert encoder.texts(read(chat("q", "a")))[0].text.startswith("ST<|im_start|>")
    assert encoder.unread(read(row)) == ["template argument unknown"]


CHAT_PROMPT = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n<|im_start|>assistant\n"
