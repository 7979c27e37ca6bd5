"""Against a real HTTP server that behaves, and misbehaves, as an OpenAI-compatible one."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import openai._base_client
import pytest

from dflash_dist.answers import endpoint
from dflash_dist.answers.options import RegenerateOptions
from dflash_dist.answers.regenerate import main, regenerate
from dflash_dist.config import Config, DataConfig, TargetConfig
from dflash_dist.ranks import World
from dflash_dist.training.setup import read_data
from tests.data.files import chat, make_encoder, write_rows
from tests.ranks import run_ranks
from tests.test_commands import ENVIRONMENT, REPOSITORY

WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


class Server(ThreadingHTTPServer):
    """Echoes the last message; `trouble` may answer a request otherwise, and tells so by returning True."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self.asked: list[dict[str, Any]] = []
        self.headers: list[Any] = []
        self.in_flight = self.most = 0
        self.changed = threading.Condition()
        self.released = threading.Event()
        self.trouble: Callable[[Handler, str, int], bool | None] = lambda handler, question, attempt: False
        self.said: Callable[[dict[str, Any]], dict[str, Any]] = lambda body: {}
        self.models = ["right-model"]
        self.loading: Iterator[int] = iter(())
        self.loads: Callable[[Handler], bool] = lambda handler: False

    @property
    def questions(self) -> list[str]:
        """The last message of each request."""
        return [body["messages"][-1]["content"] for body in self.asked]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is part of the tests."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        assert self.path == "/v1/models"
        with self.server.changed:
            self.server.in_flight += 1
        if next(self.server.loading, None) is not None:
            self.server.loads(self)
            return
        self.reply(200, {"object": "list", "data": [{"id": name, "object": "model"} for name in self.server.models]})

    def do_POST(self) -> None:
        assert self.path == "/v1/chat/completions"
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server, question = self.server, body["messages"][-1]["content"]
        with server.changed:
            attempt = server.questions.count(question)
            server.asked.append(body)
            server.headers.append(self.headers)
            server.in_flight += 1
            server.most = max(server.most, server.in_flight)
            server.changed.notify_all()
        if not server.trouble(self, question, attempt):
            self.reply(200, self.answer(body))

    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        message = {"role": "assistant", "content": f"new: {body['messages'][-1]['content']}"}
        said = self.server.said(body)
        reason = said.pop("finish_reason", "stop")
        choice = {"index": 0, "message": message | said, "finish_reason": reason}
        return {"choices": [choice], "usage": {"completion_tokens": 100}}

    def reply(self, status: int, body: Any, **headers: str) -> bool:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        with self.server.changed:  # before the client knows: it may ask again at once
            self.server.in_flight -= 1
        self.send_response(status)
        headers = {"Content-Type": "application/json", "Content-Length": str(len(content))} | headers
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content)
        return True

    def refuse(self, status: int, **headers: str) -> bool:
        return self.reply(status, {"error": {"message": "the server says why", "code": status}}, **headers)

    def hang_up(self) -> bool:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)
        return True

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def server():
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.released.set()
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    """Back-off in milliseconds."""
    monkeypatch.setattr(openai._base_client, "INITIAL_RETRY_DELAY", 0.001)
    monkeypatch.setattr(endpoint, "FIRST_BACK_OFF", 0.001)


@pytest.fixture
def arguments(tmp_path, server):
    """The settings of a run over rows, by default of the questions q1, q2, ..., with changes."""

    def make(rows: int | list[dict] = 6, **changes: Any) -> RegenerateOptions:
        if isinstance(rows, int):
            rows = [chat(f"q{k}", "an old answer") for k in range(1, rows + 1)]
        settings = {
            "target": "right-model",
            "prompts": str(write_rows(tmp_path / "prompts.jsonl", rows)),
            "out": tmp_path / "answers.jsonl",
            "max_new_tokens": 50,
            "endpoint": server.url,
            "concurrency": 2,
            "wait": 0.0,
            "timeout": 20.0,
            "retries": 2,
        }
        return RegenerateOptions(**{**settings, **changes})

    return make


@pytest.fixture
def answer(arguments, alone):
    """Regenerates on one rank; returns the rows."""

    def run(*rows: Any, **changes: Any) -> list[dict]:
        args = arguments(*rows, **changes)
        regenerate(args, alone)
        return read(args.out)

    return run


def read(path: str | Path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_bytes().splitlines()]


def part_rows(args: RegenerateOptions) -> list[dict]:
    return [row for path in Path(f"{args.out}.parts").glob("rank-*.jsonl") for row in read(path)]


def echoed(row: int) -> dict:
    """What is written for the row of the question q<row>."""
    return chat(f"q{row}", f"new: q{row}", finish_reason="stop", row=row)


def free_url() -> str:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{closed.getsockname()[1]}/v1"


def call(name: str = "weather", arguments: str = '{"city": "Ulm"}', **more: Any) -> dict:
    return {"type": "function", "function": {"name": name, "arguments": arguments}, **more}


# ------------------------------------------------------------------------------------------------ what is asked


def test_rows_are_answered_in_order_of_their_numbers(answer, capsys, tmp_path):
    assert answer(9, concurrency=4) == [echoed(row) for row in range(1, 10)]
    told = capsys.readouterr()
    assert "wrote 9 rows to" in told.out
    assert "9/9" in told.err
    names = {"answers.jsonl", "answers.jsonl.settings.json", "prompts.jsonl"}
    assert {path.name for path in tmp_path.iterdir()} == names


def test_a_greedy_request_says_all_it_depends_on(answer, server, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    answer(1)
    assert server.asked == [
        {
            "model": "right-model",
            "messages": [{"role": "user", "content": "q1"}],
            "max_tokens": 50,
            "temperature": 0.0,
            "repetition_penalty": 1.0,
        }
    ]
    assert server.headers[0]["Authorization"] == "Bearer none"


def test_sampling_template_and_extra_fields_arrive(answer, server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    extra = {"repetition_penalty": None, "min_tokens": 3}
    answer(2, temperature=0.5, top_p=0.9, top_k=20, seed=7, template_args={"enable_thinking": False}, extra_body=extra)
    first, second = sorted(server.asked, key=lambda body: body["seed"])
    assert first | {"messages": []} == {
        "model": "right-model",
        "messages": [],
        "max_tokens": 50,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 20,
        "min_p": 0.0,
        "seed": 7_000_022,
        "chat_template_kwargs": {"enable_thinking": False},
        "min_tokens": 3,
    }
    assert second["seed"] == 7_000_023
    assert server.headers[0]["Authorization"] == "Bearer secret"


def test_what_a_row_states_arrives_and_stays(answer, server, capsys):
    """With the run's template arguments behind its own; whether they are known only the server's template can tell."""
    context = {"role": "assistant", "content": "no", "weight": 0}
    row = chat("q1", "no", "q2", tools=[WEATHER["function"]], chat_template_kwargs={"style": "row"})
    row["messages"][1] = context
    (written,) = answer([row], template_args={"style": "run", "n": 1})
    assert server.asked[0]["messages"] == chat("q1", "no", "q2")["messages"], "servers need not know weights"
    assert server.asked[0]["chat_template_kwargs"] == {"style": "row", "n": 1}
    assert server.asked[0]["tools"] == [WEATHER]
    assert written == row | {
        "messages": [*row["messages"], {"role": "assistant", "content": "new: q2"}],
        **{"tools": [WEATHER], "finish_reason": "stop", "row": 1},
    }
    assert "whether the server's chat template knows --template-args cannot be told" in capsys.readouterr().out


def test_template_arguments_are_compared_with_a_template_that_lies_here(arguments, alone, tiny_target):
    with pytest.raises(ValueError, match="the chat template knows no argument 'enable_thinking'"):
        regenerate(arguments(target=str(tiny_target), template_args={"enable_thinking": False}), alone)


def test_later_turns_are_asked_with_the_new_earlier_answers(answer, server):
    log = chat("q1", "old", "q2", "old", "q3")["messages"]
    (row,) = answer([{"messages": [{"role": "system", "content": "Be brief."}, *log]}])
    expected = [{"role": "system", "content": "Be brief."}, *chat("q1", "new: q1", "q2", "new: q2", "q3")["messages"]]
    assert [body["messages"] for body in server.asked] == [expected[:2], expected[:4], expected]
    assert row["messages"] == [*expected, {"role": "assistant", "content": "new: q3"}]


def test_as_many_requests_are_in_flight_as_asked_for(answer, server):
    together = threading.Barrier(4, timeout=10)  # passes only where four requests wait at once
    server.trouble = lambda *request: bool(together.wait()) and False
    assert len(answer(12, concurrency=4)) == 12
    assert server.most == 4


# ------------------------------------------------------------------------------------------------ what is written


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning"])
def test_reasoning_is_stored_and_sent_along(answer, server, key):
    server.said = lambda body: {key: "hm"}
    (row,) = answer([chat("q1", "old", "q2")])
    new = {"role": "assistant", "content": "new: q1", "reasoning_content": "hm"}
    assert row["messages"][1] == new
    assert server.asked[1]["messages"][1] == new | {"reasoning": "hm"}  # whatever name the engine reads


def test_nothing_follows_an_answer_that_was_cut(answer, server):
    server.said = lambda body: {"finish_reason": "length"} if body["messages"][-1]["content"] == "q1" else {}
    cut, whole = answer([chat("q1", "old", "q2", "old"), chat("q3", "old", "q4", "old")])
    assert cut == chat("q1", "new: q1", finish_reason="length", row=1)
    assert whole == chat("q3", "new: q3", "q4", "new: q4", finish_reason="stop", row=2)


def test_raw_thinking_that_was_cut_is_reasoning(answer, server):
    server.said = lambda body: {"finish_reason": "length", "content": "<think>\nhm"}
    (row,) = answer(1)
    assert row["messages"][1] == {"role": "assistant", "content": "", "reasoning_content": "hm"}


def with_tools(old: dict, *results: dict, then: str = "thanks") -> dict:
    log = [{"role": "user", "content": "q1"}, {"role": "assistant", "content": None, "tool_calls": [old]}, *results]
    return {"messages": [*log, {"role": "user", "content": then}], "tools": [WEATHER]}


def test_the_results_of_tools_follow_the_same_calls_only(answer, server):
    def said(body):
        if body["messages"][-1]["content"] != "q1":
            return {}
        return {"content": None, "tool_calls": [call(id="new-id", index=0)], "finish_reason": "tool_calls"}

    server.said = said
    result = {"role": "tool", "content": "rain", "tool_call_id": "old-id"}
    rows = answer([with_tools(call(arguments=a, id="old-id"), result) for a in ('{"city":"Ulm"}', '{"city":"Bonn"}')])
    assert all(body["tools"] == [WEATHER] for body in server.asked)
    for row in rows:
        assert row["tools"] == [WEATHER]
        assert row["finish_reason"] == "stop"
        assert row["messages"][1] == {"role": "assistant", "content": "", "tool_calls": [call(id="new-id")]}
    same, other = (row["messages"] for row in rows)
    assert same[2:] == [result | {"tool_call_id": "new-id"}, *chat("thanks", "new: thanks")["messages"]]
    assert len(other) == 2


def test_what_is_written_can_be_trained_on(answer, server, arguments, tmp_path, alone, capsys):
    server.said = lambda body: (
        {"finish_reason": "length", "content": "cut"} if "q1" in str(body["messages"][-1]) else {}
    )
    answer([chat("q1", "old"), chat("q2", "old", "q3", "old"), chat("q4")])
    config = DataConfig(path=str(arguments().out), cache_dir=str(tmp_path / "cache"))
    tokens = make_encoder()
    target = SimpleNamespace(
        path="", tokenizer=tokens.tokenizer, stop_ids=[*tokens.stop_ids], text=SimpleNamespace(vocab_size=None)
    )
    data = read_data(Config(target=TargetConfig(path="by/another"), data=config), target, alone)
    told = capsys.readouterr().out
    assert "answers.jsonl was written by right-model, and target.path is by/another" in told
    assert "warning: 1 of the 3 rows of " in told
    assert data.train.conversations == 3
    # an answer and its end, but no end of the one that was cut
    assert data.train.supervised == len("cut") + 3 * (len("new: q1") + 1)


# ------------------------------------------------------------------------------------------------ failures


def once(misbehave: Callable[[Handler], bool]) -> Callable[[Handler, str, int], bool]:
    """The first attempt at q2 fails."""
    return lambda handler, question, attempt: question == "q2" and attempt == 0 and misbehave(handler)


HALF = b'{"choices": [{"message": {"content": "ha'
FAILURES: dict[str, Callable[[Handler], bool]] = {
    "too many requests": lambda handler: handler.refuse(429),
    "internal error": lambda handler: handler.refuse(500),
    "overloaded": lambda handler: handler.refuse(503),
    "half a body": lambda handler: handler.reply(200, HALF),
    "no JSON": lambda handler: handler.reply(200, b"<html>", Content_Type="text/html"),
    "no choices": lambda handler: handler.reply(200, {"object": "error", "message": "busy"}),
    "broken off": lambda handler: handler.reply(200, {"choices": [{"message": {}, "finish_reason": "abort"}]}),
    "closed before the answer": lambda handler: handler.hang_up(),
    "closed in the answer": lambda handler: handler.reply(200, HALF, Content_Length="500") and handler.hang_up(),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_what_failed_is_asked_again(answer, server, failure):
    server.trouble = once(FAILURES[failure])
    assert answer() == [echoed(row) for row in range(1, 7)]
    assert Counter(server.questions) == Counter({f"q{k}": 1 for k in range(1, 7)} | {"q2": 2})


def test_a_request_that_takes_too_long_is_asked_again(answer, server):
    server.trouble = once(lambda handler: server.released.wait() and handler.hang_up())
    assert answer(timeout=1.0) == [echoed(row) for row in range(1, 7)]
    assert server.questions.count("q2") >= 2


@pytest.mark.parametrize("headers", [{"retry_after_ms": "3"}, {"Retry_After": "0.003"}])
def test_the_servers_own_pause_counts(answer, server, monkeypatch, headers):
    monkeypatch.setattr(openai._base_client, "INITIAL_RETRY_DELAY", 1000.0)
    monkeypatch.setattr(openai._base_client, "MAX_RETRY_DELAY", 1000.0)
    server.trouble = once(lambda handler: handler.refuse(429, **headers))
    assert len(answer()) == 6


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_row_that_the_server_refuses_is_left_out_and_not_asked_again(arguments, server, alone, capsys, status):
    def trouble(handler, question, attempt):
        return handler.refuse(status) if question == "q2" else question == "q5" and handler.refuse(500)

    server.trouble = trouble
    with pytest.raises(ValueError, match=r"1 of 6 rows are unanswered, the first cause: row 5: .*the server says why"):
        regenerate(arguments(retries=0), alone)
    refused = [row for row in part_rows(arguments()) if "error" in row]
    assert [row["row"] for row in refused] == [2]
    assert "the server says why" in refused[0]["error"]
    assert not Path(arguments().out).exists()

    server.asked.clear()
    server.trouble = lambda *request: False
    regenerate(arguments(), alone)
    assert server.questions == ["q5"]
    assert read(arguments().out) == [echoed(row) for row in (1, 3, 4, 5, 6)]
    told = capsys.readouterr().out
    assert "wrote 5 rows" in told
    assert "left out 1 rows, the first: row 2: " in told


@pytest.mark.parametrize(
    "said",
    [
        {"content": ""},
        {"content": None},
        {"tool_calls": [call(arguments="{")]},
        {"content": "\0"},
        {"content": "\ud800"},
    ],
    ids=["empty", "none", "arguments that are no JSON", "NUL", "half of a surrogate pair"],
)
def test_answers_that_training_could_not_read_are_left_out_and_not_continued(answer, server, capsys, said):
    server.said = lambda body: dict(said) if body["messages"][-1]["content"] == "q2" else {}
    assert answer([chat("q1"), chat("q2", "old", "go on"), chat("q3")]) == [echoed(1), echoed(3)]
    assert "go on" not in server.questions
    assert "left out 1 rows, the first: row 2: unusable answer: " in capsys.readouterr().out


def test_a_server_that_refuses_everything_is_no_reason_to_leave_out_its_rows(arguments, server, alone):
    server.trouble = lambda handler, question, attempt: handler.refuse(400)
    with pytest.raises(ValueError, match=r"none of the first 10 rows got an answer: .*the server says why"):
        regenerate(arguments(30), alone)
    assert part_rows(arguments(30)) == []
    assert len(server.asked) <= 11


def test_a_wrong_model_stops_at_once_and_tells_the_right_ones(arguments, server, alone):
    server.trouble = lambda handler, question, attempt: handler.refuse(404)
    with pytest.raises(ValueError, match=r"has no model wrong but right-model: .*the server says why"):
        regenerate(arguments(30, target="wrong"), alone)
    assert len(server.asked) <= 2


@pytest.mark.parametrize("status", [401, 403])
def test_a_wrong_key_stops_at_once(arguments, server, alone, status):
    server.trouble = lambda handler, question, attempt: handler.refuse(status)
    with pytest.raises(ValueError, match=r"refuses the key of OPENAI_API_KEY: .*the server says why"):
        regenerate(arguments(30), alone)
    assert len(server.asked) <= 2


def test_a_server_that_is_gone_is_given_up_and_continued_elsewhere(arguments, server, alone):
    # one at a time: a slow answer beside failures would begin their count anew
    args = arguments(30, retries=1, concurrency=1)
    server.trouble = lambda handler, question, attempt: int(question[1:]) > 8 and handler.hang_up()
    with pytest.raises(ValueError, match=r"is gone: 22 of 30 rows are unanswered, the first cause: row 9: Conn"):
        regenerate(args, alone)
    assert len(server.asked) == 8 + 2 * 10  # not all 30 rows were tried

    url = free_url()
    told = rf"^no server answers at {url} within --wait 0 s \(Connection error.*\): start it, or correct --endpoint$"
    with pytest.raises(ValueError, match=told):
        regenerate(arguments(30, endpoint=url), alone)

    server.asked.clear()
    server.trouble = lambda *request: False
    regenerate(args, alone)
    assert sorted(server.questions) == sorted(f"q{k}" for k in range(9, 31))
    assert read(args.out) == [echoed(row) for row in range(1, 31)]


def test_single_rows_that_fail_do_not_stop_the_others(arguments, server, alone):
    args = arguments(30, retries=0)
    server.trouble = lambda handler, question, attempt: int(question[1:]) % 3 == 0 and handler.refuse(500)
    with pytest.raises(ValueError, match=r"^10 of 30 rows are unanswered"):
        regenerate(args, alone)
    assert sorted(row["row"] for row in part_rows(args)) == [row for row in range(1, 31) if row % 3]


def test_rows_that_keep_failing_can_be_given_up(arguments, server, alone, capsys):
    server.trouble = lambda handler, question, attempt: int(question[1:]) % 3 == 0 and handler.refuse(500)
    args = arguments(30, retries=0, give_up=True)
    regenerate(args, alone)
    assert read(args.out) == [echoed(row) for row in range(1, 31) if row % 3]
    assert "left out 10 rows, the first: row 3: " in capsys.readouterr().out


@pytest.mark.parametrize(
    "wrong",
    [{"endpoint": "localhost:8000"}, {"concurrency": 0}, {"concurrency": 1001}, {"retries": -1}, {"timeout": 0}],
)
def test_impossible_options_are_refused(arguments, alone, wrong):
    with pytest.raises(ValueError, match=f"--{next(iter(wrong))}"):
        regenerate(arguments(**wrong), alone)


# ------------------------------------------------------------------------------------------------ interruptions, ranks


@pytest.mark.parametrize("status", [None, 503])
def test_a_server_that_still_loads_its_model_is_waited_for(arguments, server, alone, capsys, monkeypatch, status):
    monkeypatch.setattr(endpoint, "POLL", 0.001)
    server.loading = iter(range(3))
    server.loads = lambda handler: handler.refuse(status) if status else handler.hang_up()
    regenerate(arguments(wait=60.0), alone)
    told = capsys.readouterr().out
    assert told.count(f"waiting for {server.url} to answer, at most 60 s\n") == 1
    assert re.search(r"^wrote 600 tokens in [\d,]+ s: [\d,]+ tokens/s$", told, re.MULTILINE)
    assert "wrote 6 rows to" in told and next(server.loading, None) is None


def test_many_cut_answers_are_a_warning(answer, server, capsys, tmp_path):
    server.said = lambda body: {"finish_reason": "length"} if body["messages"][-1]["content"] in ("q1", "q2") else {}
    answer(20)
    told = capsys.readouterr().out
    assert "; 2 of them (10.0%) end with an answer that was cut at --max-new-tokens 50\n" in told
    assert "warning" not in told
    answer(19, out=tmp_path / "more.jsonl")
    assert "warning: that is more than 10%, and a draft never learns how a cut answer ends" in capsys.readouterr().out


def test_a_killed_run_continues_and_asks_nothing_twice(arguments, server, monkeypatch):
    """Of a real process, killed with two requests in flight, one of them for the second turn of its conversation."""
    monkeypatch.delenv("RANK", raising=False)
    args = arguments([chat(f"q{k}", "old", f"q{k + 1}", "old") for k in range(1, 13, 2)])
    options = [f"--{name}={getattr(args, name)}" for name in ("target", "prompts", "out", "endpoint", "concurrency")]
    command = ["regenerate", *options, "--template-args={}"]

    def trouble(handler, question, attempt):
        return int(question[1:]) > 7 and server.released.wait() and handler.hang_up()

    server.trouble = trouble
    process = subprocess.Popen(
        [sys.executable, "-m", "dflash_dist", *command], env=ENVIRONMENT, cwd=REPOSITORY, stderr=subprocess.PIPE
    )
    with server.changed:
        # whoever asks the eighth and ninth question has written what it was answered before
        started = server.changed.wait_for(lambda: len(server.asked) == 9, timeout=60)
    process.kill()
    _, told = process.communicate()
    assert started, told.decode()
    assert sorted(row["row"] for row in part_rows(args) if "turn" not in row) == [1, 2, 3]

    server.asked.clear()
    server.trouble = lambda *request: False
    main(command[1:])
    assert sorted(server.questions, key=lambda q: int(q[1:])) == [f"q{k}" for k in range(8, 13)]
    assert [row["messages"] for row in read(args.out)] == [
        chat(f"q{k}", f"new: q{k}", f"q{k + 1}", f"new: q{k + 1}")["messages"] for k in range(1, 13, 2)
    ]


def _regenerate(world: World, args: RegenerateOptions) -> None:
    regenerate(args, world)


def test_two_ranks_write_the_file_of_one(arguments, server, alone):
    one, two = arguments(7), arguments(7, out=arguments().out.with_name("two.jsonl"))
    regenerate(one, alone)
    run_ranks(_regenerate, 2, two)
    assert Path(two.out).read_bytes() == Path(one.out).read_bytes()
    assert Counter(server.questions) == Counter({f"q{k}": 2 for k in range(1, 8)})
