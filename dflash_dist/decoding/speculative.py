"""Greedy decoding of one sequence, plainly and speculatively. The speculative output is the plain output.

A round: the draft fills a block behind the anchor (the newest token, not yet in any cache); the target runs the block
in one pass; the proposals are accepted while they equal the target's own choice; that choice at the first difference
becomes the next anchor. The draft's cache holds accepted context only.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from transformers import DynamicCache

from dflash_dist.draft.model import ContextCache, DFlashDraftModel
from dflash_dist.target.capture import capture_layers, decoder_layers

TIE = 1e-3  # top two logits closer than this are a tie, which forwards of different length may round differently


@dataclass
class Decoded:
    """New tokens, prompt excluded, up to and including the stop token."""

    tokens: list[int] = field(default_factory=list)
    seconds: float = 0.0  # prefill included
    emitted: list[int] = field(default_factory=list)  # speculative: tokens of each verification pass
    accepted: list[int] = field(default_factory=list)  # speculative: how many of those were proposals

    @property
    def passes(self) -> int:
        return len(self.emitted)


class Decoder:
    """Decodes with a whole target and, speculatively, a draft.

    Args:
        target: a causal language model, unsharded.
        draft: in the target's dtype and on its device.
        stop_ids: tokens that end an answer.
    """

    def __init__(self, target: Any, draft: DFlashDraftModel, stop_ids: Sequence[int]):
        self.target, self.draft, self.stop_ids = target, draft, frozenset(stop_ids)
        self.layers = decoder_layers(target)
        self.embedding = target.get_input_embeddings().weight
        self.head = target.get_output_embeddings().weight

    @torch.inference_mode()
    def plain(self, prompt: Sequence[int], max_new_tokens: int) -> Decoded:
        """The target alone, one token a pass."""
        begun = time.perf_counter()
        cache = DynamicCache()
        tokens = [self._greedy(self._logits(prompt, cache)[-1:])[0]]
        while len(tokens) < max_new_tokens and tokens[-1] not in self.stop_ids:
            tokens += self._greedy(self._logits(tokens[-1:], cache))
        return Decoded(tokens, time.perf_counter() - begun)

    @torch.inference_mode()
    def speculative(self, prompt: Sequence[int], max_new_tokens: int) -> Decoded:
        """The target verifying the draft's blocks: one block a pass."""
        begun = time.perf_counter()
        cache, context, result = DynamicCache(), ContextCache(), Decoded()
        logits, features = self._verify(prompt, cache)
        self.draft.extend(context, features)
        anchor = self._greedy(logits[-1:])[0]
        result.tokens.append(anchor)
        while len(result.tokens) < max_new_tokens and anchor not in self.stop_ids:
            proposals = self._propose(anchor, context)
            logits, features = self._verify([anchor, *proposals], cache)
            choices = self._greedy(logits)
            accepted = leading_run(proposals, choices)
            rejected = len(proposals) - accepted
            if rejected:
                cache.crop(-rejected)
            self.draft.extend(context, features[:, : accepted + 1])
            emitted = self._until_stop([*proposals[:accepted], choices[accepted]])[
                : max_new_tokens - len(result.tokens)
            ]
            result.tokens += emitted
            result.emitted.append(len(emitted))
            result.accepted.append(min(accepted, len(emitted)))
            anchor = result.tokens[-1]
        result.seconds = time.perf_counter() - begun
        return result

    @torch.inference_mode()
    def gap(self, prompt: Sequence[int], tokens: Sequence[int]) -> float:
        """How far apart the target's two largest logits are after `prompt` and `tokens`."""
        best, second = self._logits([*prompt, *tokens], DynamicCache())[-1].float().topk(2).values.tolist()
        return best - second

    def _propose(self, anchor: int, context: ContextCache) -> list[int]:
        shape = self.draft.shape
        block = torch.tensor([[anchor] + [shape.mask_token_id] * (shape.block_size - 1)], device=self.head.device)
        hidden = self.draft.propose(context, F.embedding(block, self.embedding))
        return self._greedy(hidden[0, 1:] @ self.head.T)

    def _verify(self, tokens: Sequence[int], cache: DynamicCache) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [N, V] and features [1, N, L*H] of the next tokens; both caches' owner sees them."""
        with capture_layers(self.layers, self.draft.shape.target_layer_ids) as captured:
            logits = self._logits(tokens, cache)
        return logits, torch.cat(captured(), dim=-1)

    def _logits(self, tokens: Sequence[int], cache: DynamicCache) -> torch.Tensor:
        input_ids = torch.tensor([list(tokens)], device=self.head.device)
        return self.target(input_ids=input_ids, past_key_values=cache, use_cache=True).logits[0]

    @staticmethod
    def _greedy(logits: torch.Tensor) -> list[int]:
        return logits.argmax(dim=-1).tolist()

    def _until_stop(self, tokens: list[int]) -> list[int]:
        end = next((i for i, token in enumerate(tokens) if token in self.stop_ids), len(tokens))
        return tokens[: end + 1]


def leading_run(proposals: Sequence[int], choices: Sequence[int]) -> int:
    """How many proposals are accepted: those before the first that differs from the target's choice."""
    return next((i for i, (ours, theirs) in enumerate(zip(proposals, choices)) if ours != theirs), len(proposals))


def first_difference(left: Sequence[int], right: Sequence[int]) -> int | None:
    """The first index at which two outputs differ; None where they are equal."""
    if list(left) == list(right):
        return None
    shorter = min(len(left), len(right))
    return next((i for i in range(shorter) if left[i] != right[i]), shorter)
