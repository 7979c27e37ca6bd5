from __future__ import annotations

import gzip
import json

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest

from dflash_dist.data.conversations import Conversation
from dflash_dist.evaluate.suites import SUITES, read_prompts

# A row of each suite as its data set publishes it, and what is asked.
ROWS = {
    "humaneval": (
        {
            "task_id": "HumanEval/0",
            "prompt": "def add(a, b):\n",
            "canonical_solution": "    return a + b\n",
            "test": "...",
            "entry_point": "add",
        },
        [
            "Write a solution to the following problem and make sure that it passes the tests:\n"
            "```python\ndef add(a, b):\n\n```"
        ],
    ),
    "mtbench": (
        {"prompt": ["Compose.", "Rewrite {this}."], "prompt_id": 1, "category": "writing", "reference": []},
        ["Compose.", "Rewrite {this}."],
    ),
    "gsm8k": (
        {"question": "How many {}?", "answer": "She has 9 * 2 = <<9*2=18>>18.\n#### 18"},
        ["How many {}?\nPlease reason step by step, and put your final answer within \\boxed{}."],
    ),
}


def write_file(path, *rows: dict):
    if path.suffix == ".parquet":
        pa.parquet.write_table(pa.Table.from_pylist(list(rows)), path)
        return path
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)
    return path


@pytest.mark.parametrize("name", SUITES)
def test_a_suite_is_a_data_set_of_the_hub_at_a_fixed_commit(name, monkeypatch):
    asked, (row, questions) = [], ROWS[name]

    def load(*place, **options):
        asked.append((*place, options["split"], options["revision"]))
        return datasets.Dataset.from_list([row, row])

    monkeypatch.setattr(datasets, "load_dataset", load)
    first, second = read_prompts([name], [])
    assert (first.suite, first.number, second.number) == (name, 0, 1)
    assert [first.asked.messages[0]["content"], *first.later] == questions
    assert first.asked.messages[0]["role"] == "user" and len(first.asked.messages) == 1
    [(*place, revision)] = asked
    assert (
        tuple(place)
        == {
            "humaneval": ("openai/openai_humaneval", None, "test"),
            "mtbench": ("HuggingFaceH4/mt_bench_prompts", None, "train"),
            "gsm8k": ("openai/gsm8k", "main", "test"),
        }[name]
    )
    assert len(revision) == 40 and int(revision, 16)


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "parquet"])
@pytest.mark.parametrize("name", SUITES)
def test_a_suite_is_read_from_a_file_of_its_data_set(name, ending, tmp_path):
    row, questions = ROWS[name]
    (prompt,) = read_prompts([f"{name}={write_file(tmp_path / f'test.{ending}', row)}"], [])
    assert [prompt.asked.messages[0]["content"], *prompt.later] == questions


def test_the_whole_of_gsm8k_is_asked_and_not_as_many_as_are_read_at_once(tmp_path):
    rows = [{"question": f"Question {i}?", "answer": "#### 1"} for i in range(1319)]
    prompts = read_prompts([f"gsm8k={write_file(tmp_path / 'test-00000-of-00001.parquet', *rows)}"], [])
    assert [prompt.asked.messages[0]["content"].split("\n")[0] for prompt in prompts] == [
        row["question"] for row in rows
    ]
    assert [prompt.number for prompt in prompts] == list(range(1319))


def test_mt_bench_is_read_as_its_authors_publish_it(tmp_path):
    row = {"question_id": 81, "category": "writing", "turns": ["Compose.", "Rewrite."]}
    (prompt,) = read_prompts([f"mtbench={write_file(tmp_path / 'question.jsonl', row)}"], [])
    assert [prompt.asked.messages[0]["content"], *prompt.later] == row["turns"]


def test_without_the_hub_it_says_how_to_do_without(monkeypatch):
    def load(*_, **__):
        raise ConnectionError("Couldn't reach 'HuggingFaceH4/mt_bench_prompts' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(ValueError, match=r"suite mtbench: HuggingFaceH4/.*Couldn't reach .*--suite mtbench=FILE$"):
        read_prompts(["mtbench"], [])


def test_files_are_suites_of_their_name_and_keep_the_datas_answer(write_chats):
    chats = write_chats([("user", "Hi"), ("assistant", "Hello")], [("user", "Bye")], name="chats.v2.jsonl")
    others = write_chats([("user", "A"), ("assistant", "B"), ("user", "C")], name="others.jsonl")
    answered, asked, more = read_prompts([], [str(chats), str(others)])
    assert [(p.suite, p.number) for p in (answered, asked, more)] == [("chats", 0), ("chats", 1), ("others", 0)]
    assert [m["content"] for m in answered.asked.messages] == ["Hi"]
    assert [m["content"] for m in answered.answered.messages] == ["Hi", "Hello"]
    assert asked.answered is None and more.answered is None and len(more.asked.messages) == 3


def test_a_prompt_of_a_file_keeps_its_tools(tmp_path):
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
    file = write_file(tmp_path / "calls.jsonl", {"messages": [{"role": "user", "content": "Hi"}], "tools": tools})
    (prompt,) = read_prompts([], [str(file)])
    assert prompt.asked.tools == tools


def test_limit_counts_in_each_suite(tmp_path, write_chats):
    row = ROWS["gsm8k"][0]
    file = write_file(tmp_path / "cases.jsonl", row, row, row)
    prompts = read_prompts([f"gsm8k={file}"], [str(write_chats([("user", "Hi")], [("user", "Bye")]))], limit=2)
    assert [(p.suite, p.number) for p in prompts] == [("gsm8k", 0), ("gsm8k", 1), ("chats", 0), ("chats", 1)]


def test_a_text_may_hold_what_python_takes_for_a_line_end(tmp_path):
    file = write_file(tmp_path / "question.jsonl", {"turns": ["one\u2028two", "three\x85"]})
    (prompt,) = read_prompts([f"mtbench={file}"], [])
    assert (prompt.asked.messages[0]["content"], list(prompt.later)) == ("one\u2028two", ["three\x85"])


def test_what_cannot_be_asked_is_refused(tmp_path, write_chats):
    with pytest.raises(ValueError, match="there is no suite 'math', only humaneval, mtbench, gsm8k"):
        read_prompts(["math"], [])
    with pytest.raises(ValueError, match=r"suite gsm8k: .*none\.jsonl cannot be read .*; give .* --suite gsm8k=FILE"):
        read_prompts([f"gsm8k={tmp_path / 'none.jsonl'}"], [])
    for wrong in ({"prompt": "How many?"}, {"question": 5}, {"question": []}, {"question": ["Why?", None]}):
        file = write_file(tmp_path / "test.jsonl", ROWS["gsm8k"][0], wrong)
        with pytest.raises(ValueError, match=r"suite gsm8k, row 2 of .*test\.jsonl: its 'question' is no question"):
            read_prompts([f"gsm8k={file}"], [])
    file.write_text("no JSON")
    with pytest.raises(ValueError, match=r"suite gsm8k, row 1 of .*test\.jsonl: malformed JSON"):
        read_prompts([f"gsm8k={file}"], [])
    (tmp_path / "more").mkdir()
    twice = [str(write_chats([("user", "Hi")], name=name)) for name in ("chats.jsonl", "more/chats.jsonl")]
    with pytest.raises(ValueError, match="two suites are called chats"):
        read_prompts([], twice)
    alone = write_chats([("assistant", "I talk to myself")], name="monologue.jsonl")
    with pytest.raises(ValueError, match=r"monologue\.jsonl, row 1: nothing to answer"):
        read_prompts([], [str(alone)])


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
def test_what_is_asked_leaves_out_only_a_final_answer(roles, kept):
    messages = [{"role": role, "content": str(i)} for i, role in enumerate(roles)]
    assert Conversation(messages).asked == messages[:kept]
    assert len(messages) == len(roles)  # the caller's list stays whole
