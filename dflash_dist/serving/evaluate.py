"""A draft at work: decodes prompts plainly and speculatively and reports acceptance, speed and equality.

`python -m dflash_dist evaluate --target T --draft DIR --prompts F.jsonl [--json OUT]`
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

import torch

from dflash_dist.contract.folder import TRAINING, find_draft, read_draft
from dflash_dist.data.chat import ChatEncoder
from dflash_dist.data.sources import Message, read_conversations
from dflash_dist.decoding.speculative import TIE, Decoded, Decoder, first_difference
from dflash_dist.target.load import TargetInfo, load_whole, read_info


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="dflash_dist evaluate", description=__doc__)
    parser.add_argument("--target", required=True, help="model folder or hub id")
    parser.add_argument("--draft", required=True, help="draft folder or hub id, exported here or published")
    parser.add_argument("--prompts", required=True, help="JSONL of conversations; each is cut before its last answer")
    parser.add_argument("--json", type=Path, help="file for the report")
    parser.add_argument("--limit", type=int, help="the first N prompts only; all by default")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="float32", help="float32 shows equality")
    parser.add_argument(
        "--template-args", type=json.loads, help="JSON object for the chat template; default: as trained"
    )
    args = parser.parse_args(argv)
    args.draft = find_draft(args.draft)
    report = evaluate(args)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    print_report(report)


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """Decodes every prompt both ways.

    Raises:
        ValueError: target, draft or prompts cannot be read, or draft and target do not belong together.
    """
    if args.limit is not None and args.limit < 1:
        raise ValueError(f"--limit must be at least 1, found {args.limit}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, args.dtype)
    info = read_info(args.target)
    draft = read_draft(args.draft, dtype, device, info.text.num_hidden_layers)
    for name, ours, theirs in (
        ("hidden size", draft.shape.hidden_size, info.text.hidden_size),
        ("vocabulary", draft.shape.vocab_size, info.text.vocab_size),
        ("number of target layers", draft.shape.num_target_layers, info.text.num_hidden_layers),
    ):
        if ours != theirs:
            raise ValueError(
                f"{args.draft} was trained for another target than {args.target}: {name} {ours}, not {theirs}"
            )
    conversations = [conversation for _, conversation in itertools.islice(read_conversations(args.prompts), args.limit)]
    encoder = make_encoder(args, info)
    decoder = Decoder(load_whole(info, dtype, device), draft, info.stop_ids)
    decoder.speculative(encoder.prompt_ids([{"role": "user", "content": "Hi"}]), 4)  # warms both models up

    results = []
    for number, conversation in enumerate(conversations):
        prompt = encoder.prompt_ids(before_last_answer(conversation.messages), conversation.tools)
        plain = decoder.plain(prompt, args.max_new_tokens)
        fast = decoder.speculative(prompt, args.max_new_tokens)
        results.append((plain, fast, _difference(decoder, number, prompt, plain, fast)))
    return summarise(results, draft.shape.block_size) | {
        "dtype": args.dtype,
        "draft": str(args.draft),
        "template_args": encoder.template_args,
    }


def make_encoder(args: argparse.Namespace, info: TargetInfo) -> ChatEncoder:
    """Renders prompts as the draft's training did, unless asked otherwise."""
    record = args.draft / TRAINING
    trained: dict[str, Any] = json.loads(record.read_text()) if record.is_file() else {}
    template_args = trained.get("template_args", {}) if args.template_args is None else args.template_args
    if trained and template_args != trained["template_args"]:
        print(f"note: the draft was trained with the template arguments {json.dumps(trained['template_args'])}")
    return ChatEncoder(
        info.tokenizer,
        info.stop_ids,
        template_args,
        trained.get("chat_template"),
        drop_reasoning=trained.get("drop_reasoning", False),
    )


def before_last_answer(messages: list[Message]) -> list[Message]:
    """The prompt of a conversation: all of it, without the assistant's last turn if it ends with one."""
    return messages[:-1] if messages[-1]["role"] == "assistant" else messages


def _difference(
    decoder: Decoder, number: int, prompt: list[int], plain: Decoded, fast: Decoded
) -> dict[str, Any] | None:
    """Where the two outputs part, and how close the target's top two logits are there."""
    index = first_difference(plain.tokens, fast.tokens)
    if index is None:
        return None
    gap = decoder.gap(prompt, plain.tokens[:index])
    return {"prompt": number, "token": index, "gap": gap, "tie": gap <= TIE}


def summarise(results: list[tuple[Decoded, Decoded, dict[str, Any] | None]], block_size: int) -> dict[str, Any]:
    """Pools the prompts.

    `tau` is tokens emitted divided by verification passes, prefill excluded, cut at the stop token. The acceptance of
    slot k is the share of passes whose first k proposals were all accepted.
    """
    emitted = [count for _, fast, _ in results for count in fast.emitted]
    accepted = [count for _, fast, _ in results for count in fast.accepted]
    per_prompt = [sum(fast.emitted) / fast.passes for _, fast, _ in results if fast.passes]
    plain_rate = sum(len(plain.tokens) for plain, _, _ in results) / sum(plain.seconds for plain, _, _ in results)
    fast_rate = sum(len(fast.tokens) for _, fast, _ in results) / sum(fast.seconds for _, fast, _ in results)
    differences = [difference for _, _, difference in results if difference]
    return {
        "prompts": len(results),
        "tokens": sum(len(plain.tokens) for plain, _, _ in results),
        "passes": len(emitted),
        "tau": sum(emitted) / max(len(emitted), 1),
        "tau_mean_of_prompts": sum(per_prompt) / max(len(per_prompt), 1),
        "acceptance_by_slot": [
            sum(count >= slot for count in accepted) / max(len(accepted), 1) for slot in range(1, block_size)
        ],
        "plain_tokens_per_s": plain_rate,
        "speculative_tokens_per_s": fast_rate,
        "speed_up": fast_rate / plain_rate,
        "lossless": all(difference["tie"] for difference in differences),
        "equal_outputs": len(results) - len(differences),
        "differences": differences,
    }


def print_report(report: dict[str, Any]) -> None:
    print(f"{report['prompts']} prompts, {report['tokens']} tokens, {report['dtype']}")
    print(
        f"acceptance length   {report['tau']:.2f} tokens a pass ({report['tau_mean_of_prompts']:.2f} mean of prompts)"
    )
    slots = "  ".join(f"{share:.2f}" for share in report["acceptance_by_slot"])
    print(f"acceptance by slot  {slots}")
    print(
        f"tokens/s            {report['speculative_tokens_per_s']:.1f} speculative,"
        f" {report['plain_tokens_per_s']:.1f} plain: {report['speed_up']:.2f}x"
    )
    print(f"equal outputs       {report['equal_outputs']} of {report['prompts']}")
    for difference in report["differences"]:
        kind = "a tie" if difference["tie"] else "NOT a tie"
        print("  prompt {prompt}, token {token}: top two logits {gap:.1e} apart,".format(**difference), kind)
