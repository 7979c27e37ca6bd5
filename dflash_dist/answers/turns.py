"""Conversations answered again turn by turn, and a target's raw text as a message: the same for the target in this
process and for a server."""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

from dflash_dist.answers.parts import Row
from dflash_dist.data.account import BadRow
from dflash_dist.data.chat import ChatEncoder
from dflash_dist.data.conversations import Conversation, Message, is_context, read_row


@dataclass
class Pace:
    """Tokens that the target has written in this start, and since when it could."""

    tokens: int = 0
    begun: float = field(default_factory=time.perf_counter)

    def __str__(self) -> str:
        seconds = time.perf_counter() - self.begun
        return f"{self.tokens:,} tokens in {seconds:,.0f} s: {self.tokens / seconds:,.0f} tokens/s"


def answer_turns(asked: Conversation) -> Generator[list[Message], tuple[Message, bool], Row]:
    """Writes a conversation's assistant turns again, one by one: yields the messages to answer, takes the new message
    and whether the target finished it, and returns the row.

    A later turn answers to the new earlier ones. A conversation that ends with a question gets an answer to it; answers
    before the first question are left out, and those that are context stay as they are.
    """
    log, written, waiting, reason = asked.messages, [], False, "stop"
    ids: dict[Any, Any] = {}  # of tool calls: the log's -> the new turn's
    for k, message in enumerate(log):
        following = log[k + 1] if k + 1 < len(log) else None
        if is_context(message):
            ids = {}
            written.append(message)
            waiting &= following is not None and _is_to_write(following)
        elif message["role"] != "assistant":
            if message["role"] == "tool" and ids:
                known = message.get("tool_call_id")
                message = message | {"tool_call_id": ids.pop(known if known in ids else next(iter(ids)))}
            written.append(message)
            waiting |= message["role"] in ("user", "tool")
        if not waiting or (following is not None and not _is_to_write(following)):
            continue
        new, finished = yield written
        try:
            read_row({"messages": [new]})
        except BadRow as error:  # an empty answer, arguments that are no JSON: training could not read it
            return {"error": f"unusable answer: {error}"}
        written.append(new)
        waiting = False
        if not finished:
            reason = "length"  # nothing sensible follows an answer that was cut
            break
        if following and k + 2 < len(log) and not _fits(following, new, log[k + 2]):
            break
        old_calls = following.get("tool_calls", []) if following else []
        ids = {old.get("id", n): call["id"] for n, (old, call) in enumerate(zip(old_calls, new.get("tool_calls", [])))}
    beside = {"tools": asked.tools, "chat_template_kwargs": asked.template_args}
    return {"messages": written, "finish_reason": reason} | {key: value for key, value in beside.items() if value}


def _is_to_write(message: Message) -> bool:
    return message["role"] == "assistant" and not is_context(message)


def _fits(old: Message, new: Message, following: Message) -> bool:
    """Whether what follows the old answer can follow the new one: the results of tools fit the same calls only, which
    models without parsed calls write as text."""
    if _calls(old) or _calls(new):
        return _calls(old) == _calls(new)
    return following["role"] != "tool" or old["content"] == new["content"]


def _calls(message: Message) -> list[tuple[str, Any]]:
    calls = []
    for call in message.get("tool_calls", []):
        arguments = call["function"]["arguments"]
        with contextlib.suppress(ValueError, TypeError):  # the log's are objects already
            arguments = json.loads(arguments) if arguments else {}
        calls.append((call["function"]["name"], arguments))
    return calls


def as_message(encoder: ChatEncoder, prompt_ids: list[int], text: str, finished: bool) -> Message:
    """The assistant's message from its raw text behind a prompt."""
    opened = encoder.tokenizer.decode(prompt_ids[-8:]).rstrip().endswith("<think>")
    return {"role": "assistant"} | split_reasoning(text, finished, opened)


def split_reasoning(text: str, finished: bool, opened: bool = False) -> Message:
    """The fields of an assistant's message from its raw text, such that a chat template renders it as it was written.

    Args:
        finished: the target ended the answer itself. Where it was cut while thinking, all is reasoning.
        opened: the prompt ended with an open <think>.
    """
    if "<|channel|>" in text:
        return _split_channels(text, finished)
    if opened or ("</think>" in text and "<think>" not in text):
        text = "<think>\n" + text
    if not finished and text.lstrip().startswith("<think>") and "</think>" not in text:
        return {"content": "", "reasoning_content": text.lstrip().removeprefix("<think>").removeprefix("\n")}
    return {"content": text}


# gpt-oss: the recipient of a call stands before or behind the channel's name
_CHANNEL = re.compile(
    r"([^<>|]*)<\|channel\|>(\w+)(.*?)<\|message\|>(.*?)(?=<\|(?:end|call|return|start|channel)\|>|\Z)", re.DOTALL
)


def _split_channels(text: str, finished: bool) -> Message:
    said: dict[str, list[str]] = {"analysis": [], "final": []}
    calls = []
    for before, channel, header, body in _CHANNEL.findall(text):
        if recipient := re.search(r"to=functions\.([\w.-]+)", before + header):
            calls.append({"type": "function", "function": {"name": recipient[1], "arguments": body}})
        elif channel in said:
            said[channel].append(body)
    message: Message = {"content": "".join(said["final"])}
    if said["analysis"]:
        message["reasoning_content"] = "\n".join(said["analysis"])
    if calls and finished:  # a cut call cannot be rendered: the answer ends before it
        message["tool_calls"] = [call | {"id": f"call_{n}"} for n, call in enumerate(calls)]
    return message
