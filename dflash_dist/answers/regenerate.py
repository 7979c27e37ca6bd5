"""The target writes the answers itself: a draft learns to foretell its target, so it must see the target's own text.

Every rank writes a part file of its own share, keyed by row: nothing is collective, an interrupted run continues where
it stopped, also on another number of ranks. Either every rank holds a whole copy of the target, or a server answers.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import json
import re
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from dflash_dist.answers.parts import Parts, Row, stored_settings
from dflash_dist.config import TrainConfig, is_day
from dflash_dist.data.account import Account, BadRow
from dflash_dist.data.chat import ChatEncoder
from dflash_dist.data.conversations import Conversation, Message, is_context, read_conversations, read_row
from dflash_dist.data.template import today
from dflash_dist.ranks import World, join_world
from dflash_dist.target.load import check_loading_whole, load_whole, read_info


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="dflash_dist regenerate", description=__doc__)
    parser.add_argument("--target", required=True, help="model folder or hub id; with --endpoint its name there")
    parser.add_argument("--trust-remote-code", action="store_true", help="run Python code that the target brings")
    parser.add_argument("--prompts", required=True, help="conversations; their answers are written again")
    parser.add_argument("--out", required=True, help="JSONL to write")
    parser.add_argument("--max-bad-rows", type=int, default=0, help="prompts that may be unusable, and are left out")
    parser.add_argument("--batch-size", type=int, default=24, help="conversations generated at once")
    parser.add_argument("--max-new-tokens", type=int, default=1024, help="longest answer [tokens]")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: greedy")
    parser.add_argument("--top-p", type=float, default=1.0, help="nucleus of the sampled distribution")
    parser.add_argument("--top-k", type=int, default=0, help="likeliest tokens that are sampled from; 0: all")
    parser.add_argument("--seed", type=int, default=0, help="seed of sampling")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--template-args", type=json_object, default={}, help="JSON object for the chat template")
    parser.add_argument(
        "--date",
        type=_day,
        help="the day that the chat template writes (YYYY-MM-DD); default: that on which the run began",
    )
    server = parser.add_argument_group("answers from a server (key: OPENAI_API_KEY)")
    server.add_argument("--endpoint", help="URL of an OpenAI-compatible server, such as http://localhost:8000/v1")
    server.add_argument("--concurrency", type=int, default=64, help="requests in flight")
    server.add_argument("--timeout", type=float, default=600.0, help="longest wait for one answer [s]")
    server.add_argument("--retries", type=int, default=8, help="how often a failed request is sent again")
    server.add_argument("--give-up", action="store_true", help="leave out rows that every retry failed to answer")
    server.add_argument("--extra-body", type=json_object, default={}, help="further JSON fields of every request")
    args = parser.parse_args(argv)
    with join_world(TrainConfig.hang_timeout) as world:
        regenerate(args, world)


def json_object(text: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"expected a JSON object, found {text}")
    return value


def _day(text: str) -> str:
    if not is_day(text):
        raise argparse.ArgumentTypeError(f"expected a day as YYYY-MM-DD, found {text}")
    return text


def regenerate(args: argparse.Namespace, world: World) -> None:
    """Writes `args.out`: the conversations of `args.prompts` with every assistant turn written by the target.

    Each line is `{"messages": [...], "finish_reason": "stop" | "length", "row": i}`, with "tools" and
    "chat_template_kwargs" where the prompt has them; rows are counted from 1, as in the prompts. An answer of weight 0
    stays as it is. Rows that cannot be answered are left out and counted.

    Raises:
        ValueError: the chat template does not know an argument, too many prompts are bad, a run with other prompts or
            settings left part files for this output, or the server gave up.
    """
    encoder = _encoder(args, world)
    rows, mine, prompts = _read_prompts(args, world)
    parts = Parts(Path(args.out), _settings(args, prompts, encoder))
    places = parts.index()
    finished = parts.out.is_file()  # asked after the parts were read: they go once it is there
    todo = {} if finished else {row: asked for row, asked in mine.items() if row not in places}
    if todo:
        bar = tqdm(total=len(mine), initial=len(mine) - len(todo), unit="row", disable=not world.is_main)
        with bar, parts.append(world.rank) as append:

            def write(row: Row) -> None:
                append(row)
                bar.update("turn" not in row)

            if encoder is None:
                from dflash_dist.answers.endpoint import answer_from_server  # slow to import, and only needed here

                answer_from_server(todo, parts.turns(todo), args, write)
            else:
                _answer_here(todo, encoder, args, world.device, write)
    elif finished and world.is_main:
        print(f"{parts.out} is finished already")
    refused = parts.merge(rows)
    if refused is not None:
        print(f"[rank {world.rank}] wrote {len(rows) - len(refused)} rows to {parts.out}")
        if refused:
            print(f"[rank {world.rank}] left out {len(refused)} rows, the first: {refused[0]}")


def _encoder(args: argparse.Namespace, world: World) -> ChatEncoder | None:
    """Renders the prompts, on the day on which the output was begun; None where a server does that.

    Raises:
        ValueError: the chat template does not know an argument, or there is no such day.
    """
    if args.endpoint and args.date:
        raise ValueError(f"--date {args.date}: a server writes the day that its own clock says; leave it out")
    if args.endpoint and not args.template_args:
        return None
    try:
        info = read_info(args.target, trust_remote_code=args.trust_remote_code)
    except ValueError as error:
        if not args.endpoint:
            raise
        if world.is_main:
            print(f"whether the server's chat template knows --template-args cannot be told: {error}")
        return None
    encoder = ChatEncoder(info.tokenizer, info.stop_ids, args.template_args, vocab_size=info.text.vocab_size)
    if args.endpoint:
        return None
    if encoder.writes_date:
        day = args.date or stored_settings(Path(args.out)).get("date") or today()
        encoder = dataclasses.replace(encoder, date=world.agree_on_day(day))
        if world.is_main:
            print(f"the chat template writes a date, in this run {encoder.date} (--date)")
    return encoder


def _read_prompts(args: argparse.Namespace, world: World) -> tuple[list[int], dict[int, Conversation], str]:
    """The numbers of all rows, this rank's conversations by row, and a digest of all conversations."""
    rows: list[int] = []
    mine, bad, digest, account = {}, Account(args.prompts), hashlib.sha256(), Account()
    for row, asked in read_conversations(args.prompts, args.max_bad_rows, account):
        if next(answer_turns(asked), None) is None:
            bad.add_bad(row, BadRow("nothing to answer: nobody asks anything of the target"))
            bad.refuse_above(args.max_bad_rows)
            continue
        if len(rows) % world.size == world.rank:
            mine[row] = asked
        rows.append(row)
        own = [asked.template_args] if asked.template_args else []
        digest.update(json.dumps([row, asked.messages, asked.tools, *own]).encode() + b"\n")
    if world.is_main:
        for line in (*account.describe_unread(), *account.describe_noted()):
            print(line)
    return rows, mine, digest.hexdigest()[:16]


def _settings(args: argparse.Namespace, prompts: str, encoder: ChatEncoder | None) -> dict[str, Any]:
    """What the answers depend on; a run continues only under the same. A server may move to another URL."""
    names = ["target", "max_new_tokens", "temperature", "top_p", "top_k", "seed", "template_args"]
    names.append("extra_body" if args.endpoint else "dtype")
    settings = {name: getattr(args, name) for name in names} | {"prompts": prompts}
    stored = stored_settings(Path(args.out))
    if encoder and encoder.writes_date and (not stored or "date" in stored):
        settings["date"] = encoder.date
    return settings


# ------------------------------------------------------------------------------------------------ turns


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


# ------------------------------------------------------------------------------------------------ generation


def _answer_here(
    todo: dict[int, Conversation],
    encoder: ChatEncoder,
    args: argparse.Namespace,
    device: torch.device,
    write: Callable[[Row], None],
) -> None:
    info = read_info(args.target, trust_remote_code=args.trust_remote_code)
    check_loading_whole(info)
    if encoder.knows_more:
        _refuse_unknown_tokens(todo, encoder, args)
    model = load_whole(info, getattr(torch, args.dtype), device)
    rows = list(todo)
    for start in range(0, len(rows), args.batch_size):
        batch = rows[start : start + args.batch_size]
        torch.manual_seed(args.seed * 1_000_003 + batch[0])
        for row, answer in zip(batch, write_answers(model, encoder, [todo[row] for row in batch], args)):
            write({**answer, "row": row})


def _refuse_unknown_tokens(todo: dict[int, Conversation], encoder: ChatEncoder, args: argparse.Namespace) -> None:
    """Raises a ValueError where more prompts than may be bad have a token that the target has no embedding for."""
    bad = Account(args.prompts)
    for row, asked in todo.items():
        try:
            encoder.prompt_of(dataclasses.replace(asked, messages=next(answer_turns(asked))))
        except BadRow as error:
            bad.add_bad(row, error)
    bad.refuse_above(args.max_bad_rows, len(todo))


def write_answers(
    model: Any, encoder: ChatEncoder, conversations: list[Conversation], args: argparse.Namespace
) -> list[Row]:
    """The rows of the conversations, answered together turn by turn; {"error": ...} where that cannot be."""
    rows: list[Row] = [{} for _ in conversations]
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
    turns = [answer_turns(conversation) for conversation in conversations]
    waiting = {i: next(turn) for i, turn in enumerate(turns)}
    while waiting:
        prompts = {}
        for i, messages in waiting.items():
            try:
                own = {"tools": conversations[i].tools, "chat_template_kwargs": conversations[i].template_args}
                asked = read_row({"messages": messages} | own)  # as training reads them
                assert isinstance(asked, Conversation)
                ids = encoder.prompt_of(asked)
                if len(ids) >= positions:
                    raise BadRow(
                        f"no room for an answer: the prompt's {len(ids)} tokens fill all {positions} positions"
                    )
                prompts[i] = ids
            except BadRow as error:
                rows[i] = {"error": str(error)}
        # Nothing is written past the last position: those that come near it end there, as at a server, each alone.
        room = {i: positions - len(ids) for i, ids in prompts.items()}
        together = [i for i in prompts if room[i] >= args.max_new_tokens]
        groups = [(together, args.max_new_tokens), *(([i], room[i]) for i in prompts if i not in together)]
        waiting = {}
        for i, text, finished in (
            (i, *answer)
            for group, limit in groups
            for i, answer in zip(group, _generate(model, encoder, [prompts[i] for i in group], limit, args))
        ):
            try:
                waiting[i] = turns[i].send((as_message(encoder, prompts[i], text, finished), finished))
            except StopIteration as end:
                rows[i] = end.value
    return rows


def _generate(
    model: Any, encoder: ChatEncoder, prompts: list[list[int]], max_new_tokens: int, args: argparse.Namespace
) -> Iterator[tuple[str, bool]]:
    """The text of each answer, and whether the target finished it."""
    if not prompts:
        return
    width = max(map(len, prompts))
    padding = [width - len(prompt) for prompt in prompts]
    input_ids = torch.tensor(
        [[encoder.pad_id] * n + prompt for n, prompt in zip(padding, prompts)], device=model.device
    )
    attention_mask = torch.tensor([[0] * n + [1] * (width - n) for n in padding], device=model.device)
    sampling = {"do_sample": True, "temperature": args.temperature, "top_p": args.top_p, "top_k": args.top_k}
    output = model.generate(
        input_ids=input_ids,
        attention_mask=attention_mask,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(encoder.stop_ids),
        pad_token_id=encoder.pad_id,
        repetition_penalty=1.0,  # a generation config may set another: the draft is to foretell the plain model
        **(sampling if args.temperature > 0 else {"do_sample": False}),
    )
    for ids in output[:, width:].tolist():
        end = next((i for i, token in enumerate(ids) if token in encoder.stop_ids), None)
        yield encoder.tokenizer.decode(ids[:end], skip_special_tokens=False), end is not None
