"""What a config may leave to the target: the layers to capture and the mask token; and what it must not choose."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from dflash_dist.target.load import TargetInfo, named_ids

CAPTURED = 5  # layers, in all published drafts
RESERVED = re.compile("mask|reserved|unused", re.IGNORECASE)  # in the name of a token that no text contains


def layers_to_capture(layers: int, count: int = CAPTURED) -> list[int]:
    """Evenly from the second to the third from last (arXiv 2602.06036, section 4.1).

    Args:
        layers: of the target's decoder.
        count: fewer where it has fewer between these.

    Raises:
        ValueError: there is no layer but the last, which is never captured.
    """
    count = min(count, max(layers - 3, 1))
    if layers < 2:
        raise ValueError("a target with a single layer has none to capture: choose another")
    if count == 1:
        return [min(layers // 2, layers - 2)]
    return [round(1 + i * (layers - 4) / (count - 1)) for i in range(count)]


class Choice(NamedTuple):
    value: Any
    why: str  # for people; empty where the config states it


def mask_token(info: TargetInfo, found: Collection[int] = ()) -> Choice | None:
    """A token that no text contains and that has an embedding, if there is one: reserved by name, or behind the
    tokenizer's own, or a special one that neither the config nor the chat template knows.

    Args:
        found: ids that the data holds.
    """
    tokenizer, vocab, taken = info.tokenizer, info.text.vocab_size, {*_with_meaning(info), *found}
    added = {token.content: (number, token.special) for number, token in tokenizer.added_tokens_decoder.items()}
    template = str(tokenizer.chat_template)
    behind = max(tokenizer.get_vocab().values()) + 1  # an embedding often has rows behind the tokenizer's own tokens
    choices = [Choice(added[name][0], f"{name}, reserved") for name in sorted(added) if RESERVED.search(name)]
    choices.append(Choice(behind, f"first id behind the tokenizer's own; the embedding has rows up to {vocab - 1}"))
    used = {*named_ids(info.config.to_dict())}
    choices += [
        Choice(number, f"{name}, a special token that the chat template does not use")
        for name, (number, special) in sorted(added.items(), key=lambda item: item[1])
        if special and name not in template and number not in used
    ]
    return next((choice for choice in choices if 0 <= choice.value < vocab and choice.value not in taken), None)


def _with_meaning(info: TargetInfo) -> dict[int | None, str]:
    """The tokens that texts are made with."""
    return {info.tokenizer.pad_token_id: "pad", info.tokenizer.bos_token_id: "bos"} | dict.fromkeys(
        info.stop_ids, "eos"
    )


def check_mask_token(info: TargetInfo, mask_token_id: int) -> None:
    """Refuses a mask token that is outside the vocabulary or has a meaning of its own, naming it."""
    vocab, taken = info.text.vocab_size, _with_meaning(info)
    if 0 <= mask_token_id < vocab and mask_token_id not in taken:
        return
    better = mask_token(info)
    advice = f", such as {better.value}" if better else ""
    if mask_token_id in taken:
        raise ValueError(
            f"draft.mask_token_id {mask_token_id} is the {taken[mask_token_id]} token of {info.path}, which occurs in"
            f" text: choose a reserved token{advice}"
        )
    raise ValueError(
        f"draft.mask_token_id {mask_token_id} is outside the vocabulary of {vocab} tokens: choose a reserved"
        f" token{advice}"
    )


def check_capture(info: TargetInfo, layer_ids: Sequence[int]) -> None:
    """Refuses layers that the target does not have, and its last one, with a ValueError that names ids and range."""
    last = info.text.num_hidden_layers - 1
    if last == 0:
        raise ValueError(f"{info.path} has a single layer, and a target's last layer is never captured: choose another")
    outside = [i for i in layer_ids if not 0 <= i <= last]
    if outside:
        raise ValueError(
            f"target.layer_ids {outside} are out of range: of {info.path}, layers 0 to {last - 1} can be captured"
        )
    if last in layer_ids:
        raise ValueError(
            f"target.layer_ids contains {last}, the last layer of {info.path}: serving engines disagree on whether its"
            f" output is normalised, so capture layers up to {last - 1}"
        )
