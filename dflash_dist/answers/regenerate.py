"""The target writes the answers itself: a draft learns to foretell its target, so it must see the target's own text.

Every rank writes a part file of its own share, keyed by row: nothing is collective, an interrupted run continues where
it stopped, also on another number of ranks. Either every rank holds a whole copy of the target, or a server answers.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

from dflash_dist.answers.local import answer_here
from dflash_dist.answers.options import RegenerateOptions
from dflash_dist.answers.parts import Parts, Place, Row, stored_settings
from dflash_dist.answers.turns import answer_turns
from dflash_dist.config import TrainConfig
from dflash_dist.data.account import Account, BadRow
from dflash_dist.data.chat import ChatEncoder
from dflash_dist.data.conversations import Conversation, read_conversations
from dflash_dist.data.regenerated import MANY_CUT
from dflash_dist.data.template import settle_day
from dflash_dist.machine import say_slow_bfloat16
from dflash_dist.options import parse
from dflash_dist.ranks import World, join_world
from dflash_dist.target.load import check_loading_whole, read_info


def main(argv: list[str]) -> None:
    options = parse(RegenerateOptions, "regenerate", __doc__, argv)
    with join_world(TrainConfig.hang_timeout) as world:
        regenerate(options, world)


def regenerate(options: RegenerateOptions, world: World) -> None:
    """Writes `options.out`: the conversations of `options.prompts` with every assistant turn written by the target.

    Each line is `{"messages": [...], "finish_reason": "stop" | "length", "row": i}`, with "tools" and
    "chat_template_kwargs" where the prompt has them; rows are counted from 1, as in the prompts. An answer of weight 0
    stays as it is. Rows that cannot be answered are left out and counted.

    Raises:
        ValueError: the chat template does not know an argument, too many prompts are bad, a run with other prompts or
            settings left part files for this output, or the server gave up.
    """
    encoder = _encoder(options, world)
    rows, mine, prompts = _read_prompts(options, world)
    parts = Parts(options.out, _settings(options, prompts, encoder))
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

                pace = answer_from_server(todo, parts.turns(todo), options, write, world.is_main)
            else:
                if world.is_main and options.dtype == "bfloat16":
                    say_slow_bfloat16(world.device, "--dtype float32")
                pace = answer_here(todo, encoder, options, world.device, write)
        if pace.tokens:
            print(f"{f'[rank {world.rank}] ' * (world.size > 1)}wrote {pace}")
    elif finished and world.is_main:
        print(f"{parts.out} is finished already")
    if (merged := parts.merge(rows)) is not None:
        for line in _describe(merged, options):
            print(line)


def _describe(rows: dict[int, Place], options: RegenerateOptions) -> Iterator[str]:
    """What became of all rows, a line a fact."""
    refused = {row: place.error for row, place in rows.items() if place.error is not None}
    written, cut = len(rows) - len(refused), sum(place.cut for place in rows.values())
    share = cut / max(written, 1)
    yield (
        f"wrote {written:,} rows to {options.out}; {cut:,} of them ({share:.1%}) end with an answer that was cut at"
        f" --max-new-tokens {options.max_new_tokens}"
    )
    if share > MANY_CUT:
        yield (
            f"warning: that is more than {MANY_CUT:.0%}, and a draft never learns how a cut answer ends: write them"
            " again with a larger --max-new-tokens, to another --out"
        )
    if refused:
        row, error = next(iter(refused.items()))
        yield f"left out {len(refused):,} rows, the first: row {row}: {error}"


def _encoder(options: RegenerateOptions, world: World) -> ChatEncoder | None:
    """Renders the prompts, on the day on which the output was begun; None where a server does that.

    Raises:
        ValueError: the chat template does not know an argument, or the target could not be loaded.
    """
    if options.endpoint and not options.template_args:
        return None
    try:
        info = read_info(options.target, trust_remote_code=options.trust_remote_code)
    except ValueError as error:
        if not options.endpoint:
            raise
        if world.is_main:
            print(f"whether the server's chat template knows --template-args cannot be told: {error}")
        return None
    encoder = ChatEncoder(info.tokenizer, info.stop_ids, options.template_args, vocab_size=info.text.vocab_size)
    if options.endpoint:
        return None
    check_loading_whole(info)
    if encoder.writes_date:
        date = settle_day(world.agree_on_day, options.date, stored_settings(options.out).get("date"))
        encoder = dataclasses.replace(encoder, date=date)
        if world.is_main:
            print(f"the chat template writes a date, in this run {encoder.date} (--date)")
    return encoder


def _read_prompts(options: RegenerateOptions, world: World) -> tuple[list[int], dict[int, Conversation], str]:
    """The numbers of all rows, this rank's conversations by row, and a digest of all conversations."""
    rows: list[int] = []
    mine, bad, digest, account = {}, Account(options.prompts), hashlib.sha256(), Account()
    for row, asked in read_conversations(options.prompts, options.max_bad_rows, account):
        if next(answer_turns(asked), None) is None:
            bad.add_bad(row, BadRow("nothing to answer: nobody asks anything of the target"))
            bad.refuse_above(options.max_bad_rows)
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


def _settings(options: RegenerateOptions, prompts: str, encoder: ChatEncoder | None) -> dict[str, Any]:
    """What the answers depend on; a run continues only under the same. A server may move to another URL."""
    names = ["target", "max_new_tokens", "temperature", "top_p", "top_k", "seed", "template_args"]
    names.append("extra_body" if options.endpoint else "dtype")
    settings = {name: getattr(options, name) for name in names} | {"prompts": prompts}
    stored = stored_settings(options.out)
    if encoder and encoder.writes_date and (not stored or "date" in stored):
        settings["date"] = encoder.date
    return settings
