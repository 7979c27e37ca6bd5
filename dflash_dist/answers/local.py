"""Answers from a whole copy of the target in this process, many conversations at once."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

from dflash_dist.answers.options import RegenerateOptions
from dflash_dist.answers.parts import Row
from dflash_dist.answers.turns import Pace, answer_turns, as_message
from dflash_dist.data.account import Account, BadRow
from dflash_dist.data.chat import ChatEncoder
from dflash_dist.data.conversations import Conversation, read_row
from dflash_dist.target.load import load_whole, read_info


def answer_here(
    todo: dict[int, Conversation],
    encoder: ChatEncoder,
    options: RegenerateOptions,
    device: torch.device,
    write: Callable[[Row], None],
) -> Pace:
    """Writes a row for each conversation, in batches.

    Raises:
        ValueError: the target cannot be loaded, or has no embedding for what too many prompts hold.
    """
    info = read_info(options.target, trust_remote_code=options.trust_remote_code)
    if encoder.knows_more:
        _refuse_unknown_tokens(todo, encoder, options)
    model = load_whole(info, getattr(torch, options.dtype), device)
    rows, pace = list(todo), Pace()
    for start in range(0, len(rows), options.batch_size):
        batch = rows[start : start + options.batch_size]
        torch.manual_seed(options.seed * 1_000_003 + batch[0])
        for row, answer in zip(batch, write_answers(model, encoder, [todo[row] for row in batch], options, pace)):
            write({**answer, "row": row})
    return pace


def _refuse_unknown_tokens(todo: dict[int, Conversation], encoder: ChatEncoder, options: RegenerateOptions) -> None:
    """Raises a ValueError where more prompts than may be bad have a token that the target has no embedding for."""
    bad = Account(options.prompts)
    for row, asked in todo.items():
        try:
            encoder.prompt_of(dataclasses.replace(asked, messages=next(answer_turns(asked))))
        except BadRow as error:
            bad.add_bad(row, error)
    bad.refuse_above(options.max_bad_rows, len(todo))


def write_answers(
    model: Any, encoder: ChatEncoder, conversations: list[Conversation], options: RegenerateOptions, pace: Pace
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
        together = [i for i in prompts if room[i] >= options.max_new_tokens]
        groups = [(together, options.max_new_tokens), *(([i], room[i]) for i in prompts if i not in together)]
        waiting = {}
        for i, text, finished in (
            (i, *answer)
            for group, limit in groups
            for i, answer in zip(group, _generate(model, encoder, [prompts[i] for i in group], limit, options, pace))
        ):
            try:
                waiting[i] = turns[i].send((as_message(encoder, prompts[i], text, finished), finished))
            except StopIteration as end:
                rows[i] = end.value
    return rows


def _generate(
    model: Any,
    encoder: ChatEncoder,
    prompts: list[list[int]],
    max_new_tokens: int,
    options: RegenerateOptions,
    pace: Pace,
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
    sampling = {"do_sample": True, "temperature": options.temperature, "top_p": options.top_p, "top_k": options.top_k}
    output = model.generate(
        input_ids=input_ids,
        attention_mask=attention_mask,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(encoder.stop_ids),
        pad_token_id=encoder.pad_id,
        repetition_penalty=1.0,  # a generation config may set another: the draft is to foretell the plain model
        **(sampling if options.temperature > 0 else {"do_sample": False}),
    )
    for ids in output[:, width:].tolist():
        end = next((i for i, token in enumerate(ids) if token in encoder.stop_ids), None)
        pace.tokens += len(ids) if end is None else end + 1
        yield encoder.tokenizer.decode(ids[:end], skip_special_tokens=False), end is not None
