"""The target writes the answers itself: a draft learns to foretell its target, so it must see the target's own text.

Every rank holds a whole copy of the target and writes a part file of its own share, keyed by row: nothing is
collective, an interrupted run continues where it stopped, also on another number of ranks.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from dflash_dist.data.chat import ChatEncoder, Message, read_conversations
from dflash_dist.ranks import World, join_world
from dflash_dist.target.load import load_whole, read_info


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="dflash_dist regenerate", description=__doc__)
    parser.add_argument("--target", required=True, help="model folder or hub id")
    parser.add_argument("--prompts", required=True, help="JSONL of conversations; their answers are written again")
    parser.add_argument("--out", required=True, help="JSONL to write")
    parser.add_argument("--batch-size", type=int, default=24, help="conversations generated at once")
    parser.add_argument("--max-new-tokens", type=int, default=1024, help="longest answer [tokens]")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: greedy")
    parser.add_argument("--top-p", type=float, default=1.0, help="nucleus of the sampled distribution")
    parser.add_argument("--seed", type=int, default=0, help="seed of sampling")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--template-args", type=json.loads, default={}, help="JSON object for the chat template")
    args = parser.parse_args(argv)
    with join_world() as world:
        regenerate(args, world)


def regenerate(args: argparse.Namespace, world: World) -> None:
    """Writes `args.out`: the conversations of `args.prompts` with every assistant turn written by the target.

    Each line is `{"messages": [...], "row": i, "finish_reason": "stop" | "length"}`.

    Raises:
        ValueError: a conversation has nothing to answer, or a run with other prompts or settings left part files for
            this output.
    """
    conversations, _ = read_conversations(args.prompts)
    out = Path(args.out)
    for number, messages in enumerate(conversations, 1):
        if all(message["role"] == "assistant" for message in messages):
            raise ValueError(f"{args.prompts}, conversation {number}: there is nothing to answer")
    parts = Parts(out, _settings(args, conversations))
    done = range(len(conversations)) if out.is_file() else parts.rows()
    mine = [row for row in range(world.rank, len(conversations), world.size) if row not in done]
    if mine:
        info = read_info(args.target)
        model = load_whole(info, getattr(torch, args.dtype), world.device)
        encoder = ChatEncoder(info.tokenizer, info.stop_ids, args.template_args)
        begun, written = time.perf_counter(), 0
        with parts.append(world.rank) as part:
            for start in range(0, len(mine), args.batch_size):
                rows = mine[start : start + args.batch_size]
                torch.manual_seed(args.seed * 1_000_003 + rows[0])
                for row, answer in zip(rows, write_answers(model, encoder, [conversations[r] for r in rows], args)):
                    part.write(json.dumps({**answer, "row": row}, ensure_ascii=False) + "\n")
                part.flush()
                os.fsync(part.fileno())
                written += len(rows)
                rate = written / (time.perf_counter() - begun)
                left = (len(mine) - written) / rate
                print(
                    f"[rank {world.rank}] {written}/{len(mine)} rows, {rate:.2f} rows/s, {left:.0f} s left", flush=True
                )
    elif out.is_file() and world.is_main:
        print(f"{out} is finished already")
    if parts.merge(len(conversations)):
        print(f"[rank {world.rank}] wrote {len(conversations)} rows to {out}")


def _settings(args: argparse.Namespace, conversations: list[list[Message]]) -> dict[str, Any]:
    """What the answers depend on; a run continues only under the same."""
    names = ("target", "max_new_tokens", "temperature", "top_p", "seed", "dtype", "template_args")
    prompts = hashlib.sha256(json.dumps(conversations).encode()).hexdigest()[:16]
    return {name: getattr(args, name) for name in names} | {"prompts": prompts}


class Parts:
    """The part files of an output: one a rank, whole lines only.

    The settings lie beside the output and stay there: they tell how it was written, and that it is finished.
    """

    def __init__(self, out: Path, settings: dict[str, Any]):
        self.out, self.folder = out, out.with_name(out.name + ".parts")
        described = out.with_name(out.name + ".settings.json")
        if out.is_file() and not described.is_file():
            raise ValueError(f"{out} exists and was not written by this command: choose another --out, or delete it")
        if described.is_file() and json.loads(described.read_text()) != settings:
            raise ValueError(
                f"{described} belongs to a run with other prompts or settings: choose another --out,"
                f" or delete it with {out} and {self.folder}"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        if not described.is_file():
            _write_whole(described, json.dumps(settings, indent=2))

    def rows(self) -> dict[int, dict[str, Any]]:
        """The finished rows, by number. A line that an interruption cut short counts as unwritten."""
        done = {}
        for path in sorted(self.folder.glob("rank-*.jsonl")):
            for line in path.read_bytes().split(b"\n"):  # bytes: a cut may fall inside a character
                try:
                    row = json.loads(line)
                except ValueError:
                    continue
                done[row["row"]] = row
        return done

    def append(self, rank: int) -> Any:
        path = self.folder / f"rank-{rank:05d}.jsonl"
        part = path.open("a+", encoding="utf-8")
        if part.tell() and not path.read_bytes().endswith(b"\n"):
            part.write("\n")  # closes a line that an interruption cut short
        return part

    def merge(self, count: int) -> bool:
        """Writes the output in row order and removes the parts, if all rows are there and nobody else did.

        No rank waits for another: whichever finishes last finds everything. The lock is the operating system's, so it
        falls with its holder.
        """
        with (self.folder.parent / f"{self.folder.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            rows = self.rows()
            merged = len(rows) == count and not self.out.is_file()
            if merged:
                _write_whole(self.out, "".join(json.dumps(rows[i], ensure_ascii=False) + "\n" for i in range(count)))
            if self.out.is_file():
                shutil.rmtree(self.folder, ignore_errors=True)
                Path(lock.name).unlink(missing_ok=True)
        return merged


def _write_whole(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")  # ranks on several hosts may write at once
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def write_answers(
    model: torch.nn.Module, encoder: ChatEncoder, conversations: list[list[Message]], args: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Writes every assistant turn of the conversations again, turn by turn: a later turn answers to the new earlier
    ones. A conversation that ends with a user's turn gets an answer to it."""
    written: list[list[Message]] = [[] for _ in conversations]
    reason = ["stop"] * len(conversations)
    queues = [_until_answers(messages) for messages in conversations]
    while any(queues):
        batch = [i for i, queue in enumerate(queues) if queue]
        for i in batch:
            written[i] += queues[i].pop(0)
        prompts = [encoder.prompt_ids(written[i]) for i in batch]
        for i, (text, finished) in zip(batch, _generate(model, encoder, prompts, args)):
            written[i].append({"role": "assistant", "content": text})
            if not finished:
                reason[i] = "length"
                queues[i].clear()  # nothing sensible follows an answer that was cut
    for messages, why in zip(written, reason):
        yield {"messages": messages, "finish_reason": why}


def _until_answers(messages: list[Message]) -> list[list[Message]]:
    """The messages before each answer: one list a turn that the assistant is to write."""
    turns: list[list[Message]] = [[]]
    for message in messages:
        if message["role"] == "assistant":
            turns.append([])
        else:
            turns[-1].append(message)
    return [turn for turn in turns if turn]


def _generate(
    model: Any, encoder: ChatEncoder, prompts: list[list[int]], args: argparse.Namespace
) -> Iterator[tuple[str, bool]]:
    width = max(map(len, prompts))
    padding = [width - len(prompt) for prompt in prompts]
    input_ids = torch.tensor(
        [[encoder.pad_id] * n + prompt for n, prompt in zip(padding, prompts)], device=model.device
    )
    attention_mask = torch.tensor([[0] * n + [1] * (width - n) for n in padding], device=model.device)
    sampling = {"do_sample": True, "temperature": args.temperature, "top_p": args.top_p, "top_k": 0}
    output = model.generate(
        input_ids=input_ids,
        attention_mask=attention_mask,
        max_new_tokens=args.max_new_tokens,
        eos_token_id=sorted(encoder.stop_ids),
        pad_token_id=encoder.pad_id,
        repetition_penalty=1.0,  # a generation config may set another: the draft is to foretell the plain model
        **(sampling if args.temperature > 0 else {"do_sample": False}),
    )
    for ids in output[:, width:].tolist():
        end = next((i for i, token in enumerate(ids) if token in encoder.stop_ids), None)
        yield encoder.tokenizer.decode(ids[:end], skip_special_tokens=False), end is not None
