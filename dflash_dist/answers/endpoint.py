"""Answers from an OpenAI-compatible server, such as vLLM or SGLang, with many requests in flight.

Whatever fails is asked again. A row that the server refuses is left out; a row that it fails to answer stays unanswered
for the next start. Only a wrong key or model stops a run at once, and a server that is gone soon.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import openai
from tqdm import tqdm

from dflash_dist.answers.options import RegenerateOptions
from dflash_dist.answers.parts import Row
from dflash_dist.answers.turns import Pace, answer_turns, split_reasoning
from dflash_dist.data.conversations import Conversation, Message
from dflash_dist.data.keys import REASONING_KEYS
from dflash_dist.reading import is_kind

FIRST_BACK_OFF, LONGEST_BACK_OFF = 0.5, 8.0  # [s], as the client's own
POLL = 1.0  # [s] between two looks whether a server answers
LOADING = (502, 503, 504)  # of a server, or a proxy before it, that is not ready yet


class Answered(NamedTuple):
    message: Message
    finished: bool  # by the target
    tokens: int  # as the server counts them; 0 where it does not


class _Failed(Exception):
    """A row that got no answer however often it was asked for."""


class _Refused(Exception):
    """A row that the server will never answer, such as one that is too long for it."""


def answer_from_server(
    todo: dict[int, Conversation],
    begun: dict[int, list[Message]],
    options: RegenerateOptions,
    write: Callable[[Row], None],
    says: bool,
) -> Pace:
    """Writes a row for each conversation as soon as it is answered, in any order; refused ones as {"error": ...}. Turns
    before the last are written as they come, so that only requests in flight can be lost.

    Args:
        begun: by row, the turns that an earlier start was answered already.
        says: that a server is waited for.

    Raises:
        ValueError: no server answers; a wrong key or model; or rows stayed unanswered, since the server failed or is
            gone.
    """
    return asyncio.run(_answer_all(todo, begun, options, write, says))


@dataclass
class _Progress:
    """What became of the rows so far, and whether it is worth going on.

    Refusals are held back until a row is answered: a server that refuses everything, because of a setting, is no reason
    to leave out its rows for good.
    """

    write: Callable[[Row], None]
    patience: int  # rows that may fail one after another
    settled: int = 0
    failures: int = 0  # one after another
    failed: list[Row] = field(default_factory=list)
    answered: bool = False
    held: list[Row] = field(default_factory=list)

    def settle(self, row: Row) -> None:
        self.failures = 0
        if "error" in row and not self.answered:
            self.held.append(row)
            if len(self.held) >= self.patience:
                raise ValueError(f"none of the first {len(self.held)} rows got an answer: {self.held[0]['error']}")
            return
        self.answered = True
        self.release()
        self._write(row)

    def release(self) -> None:
        while self.held:
            self._write(self.held.pop())

    def _write(self, row: Row) -> None:
        self.write(row)
        self.settled += 1

    def fail(self, row: int, error: _Failed) -> None:
        self.failures += 1
        self.failed.append({"error": str(error), "row": row})

    @property
    def hopeless(self) -> bool:
        return self.failures >= self.patience


async def _answer_all(
    todo: dict[int, Conversation],
    begun: dict[int, list[Message]],
    options: RegenerateOptions,
    write: Callable[[Row], None],
    says: bool,
) -> Pace:
    queue = iter(todo.items())  # shared: every worker takes the next row
    progress = _Progress(write, patience=max(10, options.concurrency))
    client = openai.AsyncOpenAI(
        base_url=options.endpoint,
        api_key=os.environ.get("OPENAI_API_KEY") or "none",  # servers of one's own ask for no key
        timeout=openai.Timeout(options.timeout, connect=min(options.timeout, 30.0)),
        max_retries=options.retries,
    )

    async def work() -> None:
        for row, asked in queue:
            try:
                answer = await _answer_row(client, options, row, asked, begun.get(row, []), write, pace)
                progress.settle({**answer, "row": row})
            except _Refused as error:
                progress.settle({"error": str(error), "row": row})
            except _Failed as error:
                progress.fail(row, error)
                if progress.hopeless:
                    raise

    async with client:
        await _wait_for(client, options, says)
        pace = Pace()
        workers = [asyncio.create_task(work()) for _ in range(min(options.concurrency, len(todo)))]
        try:
            await asyncio.gather(*workers)
        except _Failed:
            pass
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
    progress.release()
    if options.give_up and not progress.hopeless:
        for row in progress.failed:
            progress.settle(row)
    if unanswered := len(todo) - progress.settled:
        gone = f"{options.endpoint} is gone: " if progress.hopeless else ""
        first = progress.failed[0]
        raise ValueError(
            f"{gone}{unanswered} of {len(todo)} rows are unanswered, the first cause: row {first['row']}:"
            f" {first['error']}; start the same command again to continue, with --give-up to leave out what fails again"
        )
    return pace


async def _wait_for(client: openai.AsyncOpenAI, options: RegenerateOptions, says: bool) -> None:
    """Returns once the server answers anything: one that has just been started loads its model first."""
    once, until = client.with_options(max_retries=0, timeout=10.0), time.monotonic() + options.wait
    line = f"waiting for {options.endpoint} to answer, at most {options.wait:g} s"
    with tqdm(bar_format=line + ": {elapsed}", disable=None if says else True, delay=POLL, leave=False) as bar:
        while True:
            try:
                await once.models.list()
                return
            except openai.APIConnectionError as error:
                cause = f"{error} {error.__cause__ or ''}".strip()
            except openai.APIStatusError as error:
                if error.status_code not in LOADING:
                    return
                cause = str(error)[:1000]
            except (openai.OpenAIError, ValueError, TypeError, AttributeError):
                return
            if time.monotonic() >= until:
                raise ValueError(
                    f"no server answers at {options.endpoint} within --wait {options.wait:g} s ({cause}): start it, or"
                    " correct --endpoint"
                )
            if says and bar.disable:
                print(line, flush=True)
                says = False
            await asyncio.sleep(POLL)
            bar.refresh()


async def _answer_row(
    client: openai.AsyncOpenAI,
    options: RegenerateOptions,
    row: int,
    asked: Conversation,
    begun: list[Message],
    write: Callable[[Row], None],
    pace: Pace,
) -> Row:
    turns = answer_turns(asked)
    messages = next(turns)
    try:
        for message in begun:
            messages = turns.send((message, True))
        turn = len(begun)
        while True:
            message, finished, tokens = await _ask(client, options, _request(options, row, messages, asked))
            pace.tokens += tokens
            messages = turns.send((message, finished))
            write({"row": row, "turn": turn, "message": message})
            turn += 1
    except StopIteration as end:
        return end.value


def _request(options: RegenerateOptions, row: int, messages: list[Message], asked: Conversation) -> dict[str, Any]:
    """The fields of a request. Servers take what is not named from the model's generation config, and the draft is to
    foretell the plain model; `--extra-body` changes them, null leaves one out."""
    # engines differ in which name of the thinking they read
    history = [
        {key: value for key, value in message.items() if key != "weight"}
        | ({"reasoning": message["reasoning_content"]} if "reasoning_content" in message else {})
        for message in messages
    ]
    fields: dict[str, Any] = {
        "model": options.target,
        "messages": history,
        "max_tokens": options.max_new_tokens,
        "temperature": options.temperature,
        "repetition_penalty": 1.0,
    }
    if options.temperature > 0:
        fields |= {"top_p": options.top_p, "top_k": options.top_k or -1, "min_p": 0.0}
        fields["seed"] = options.seed * 1_000_003 + row
    if template_args := options.template_args | asked.template_args:
        fields["chat_template_kwargs"] = template_args
    if asked.tools:
        fields["tools"] = asked.tools
    return {name: value for name, value in (fields | options.extra_body).items() if value is not None}


async def _ask(client: openai.AsyncOpenAI, options: RegenerateOptions, request: dict[str, Any]) -> Answered:
    for attempt in range(options.retries + 1):
        if attempt:
            await asyncio.sleep(min(FIRST_BACK_OFF * 2 ** (attempt - 1), LONGEST_BACK_OFF))
        try:
            reply = await client.post("/chat/completions", body=request, cast_to=str)
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            raise ValueError(f"{options.endpoint} refuses the key of OPENAI_API_KEY: {error}") from error
        except openai.NotFoundError as error:
            raise ValueError(
                f"{options.endpoint} has no model {options.target}{await _models(client)}: {error}"
            ) from error
        except openai.APIStatusError as error:
            raise (_Refused if error.status_code in (400, 413, 422) else _Failed)(str(error)[:1000]) from error
        except openai.APIConnectionError as error:
            raise _Failed(f"{error} {error.__cause__ or ''}".strip()) from error
        try:
            return _read_answer(json.loads(reply))
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            # Half an answer: the client asks again after failures that HTTP shows, but not after a body cut short.
            malformed = f"no answer in {reply[:200]!r} ({type(error).__name__}: {error})"
    raise _Failed(malformed)


async def _models(client: openai.AsyncOpenAI) -> str:
    try:
        found = await client.with_options(max_retries=0, timeout=10.0).models.list()
        return f" but {', '.join(model.id for model in found.data)}"
    except (openai.OpenAIError, ValueError, TypeError, AttributeError):
        return ", or does not end in /v1"


def _read_answer(body: Any) -> Answered:
    choice = body["choices"][0]
    if choice["finish_reason"] in ("abort", "error"):
        raise ValueError("the server broke off")
    finished, said = choice["finish_reason"] != "length", choice["message"]
    message: Message = {"role": "assistant", "content": said.get("content") or ""}
    reasoning = next((said[key] for key in REASONING_KEYS if said.get(key)), None)
    message |= {"reasoning_content": reasoning} if reasoning else split_reasoning(message["content"], finished)
    if said.get("tool_calls"):
        message["tool_calls"] = [
            {"id": call.get("id") or f"call_{n}", "type": "function", "function": _named(call["function"])}
            for n, call in enumerate(said["tool_calls"])
        ]
    tokens = (body.get("usage") or {}).get("completion_tokens", 0)
    return Answered(message, finished, tokens if is_kind(tokens, int) else 0)


def _named(function: dict[str, Any]) -> dict[str, Any]:
    return {"name": function["name"], "arguments": function["arguments"]}
