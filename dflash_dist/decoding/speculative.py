"""Decoding of one sequence, plainly and speculatively. The speculative output is the plain output.

A round: the draft fills a block behind the anchor (the newest token, not yet in any cache); the target runs the block
in one pass and chooses at every slot, greedily or with the noise of the slot's position; the proposals are accepted
while they equal its choices; the choice at the first difference becomes the next anchor. The draft's cache holds
accepted context only.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import torch
from transformers import DynamicCache

from dflash_dist.decoding.sampling import GREEDY, PROPOSAL, Sampling
from dflash_dist.draft.base import Draft
from dflash_dist.target.capture import capture_layers, decoder_layers
from dflash_dist.target.load import check_rollback

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
        target: a causal language model.
        draft: in the target's dtype and on its device.
        stop_ids: tokens that end an answer.
        sampling: how tokens are chosen; greedily by default.

    Raises:
        ValueError: the target's cache cannot be rolled back.
    """

    def __init__(self, target: Any, draft: Draft, stop_ids: Sequence[int], sampling: Sampling = GREEDY):
        text = target.config.get_text_config()
        check_rollback(text)
        self.target, self.draft, self.stop_ids = target, draft, frozenset(stop_ids)
        self.sampling = sampling
        self.positions = text.max_position_embeddings
        self.layers = decoder_layers(target)
        self.embedding = target.get_input_embeddings().weight
        self.head = target.get_output_embeddings().weight

    # Not inference_mode: the buffers of a sharded target would become tensors that no later training step may write.
    @torch.no_grad()
    def plain(self, prompt: Sequence[int], max_new_tokens: int) -> Decoded:
        """The target alone, one token a pass."""
        begun, limit = time.perf_counter(), self._limit(prompt, max_new_tokens)
        cache, following = DynamicCache(), prompt
        tokens: list[int] = []
        while not self._ended(tokens, limit):
            logits = self._logits(following, cache, keep=1)
            following = self._choose(logits, len(prompt) + len(tokens))
            tokens += following
        return Decoded(tokens, time.perf_counter() - begun)

    @torch.no_grad()
    def speculative(self, prompt: Sequence[int], max_new_tokens: int) -> Decoded:
        """The target verifying the draft's blocks: one block a pass."""
        begun, limit = time.perf_counter(), self._limit(prompt, max_new_tokens)
        # A cache that keeps everything: the target's masks see to its sliding windows, and it can be cut anywhere.
        cache, context, result = DynamicCache(), self.draft.new_cache(), Decoded()
        logits, features = self._verify(prompt, cache, keep=1)
        self.draft.extend(context, features)
        result.tokens += self._choose(logits, len(prompt))
        while not self._ended(result.tokens, limit):
            run, features = self._pass(result.tokens[-1], cache, context)
            if rejected := features.shape[1] - len(run):
                cache.crop(-rejected)
            self.draft.extend(context, features[:, : len(run)])
            emitted = self._until_stop(run)[: limit - len(result.tokens)]
            result.tokens += emitted
            result.emitted.append(len(emitted))
            result.accepted.append(min(len(run) - 1, len(emitted)))
        result.seconds = time.perf_counter() - begun
        return result

    @torch.no_grad()
    def gap(self, prompt: Sequence[int], tokens: Sequence[int]) -> float:
        """How far apart the two largest logits are after `prompt` and `tokens`; of a sampled token, the two largest
        logarithms of probability with the position's noise."""
        logits = self._logits([*prompt, *tokens], DynamicCache(), keep=1)
        best, second = self.sampling.scores(logits, len(prompt) + len(tokens))[0].float().topk(2).values.tolist()
        return best - second

    def _pass(self, anchor: int, cache: DynamicCache, context: Any) -> tuple[list[int], torch.Tensor]:
        """One verification: the accepted proposals and the target's own token after them; the features of the block."""
        position = context.length + 1  # of the first proposal; the anchor is at `context.length`
        if self.sampling.rejects:
            return self._pass_by_rejection(anchor, cache, context, position)
        proposals = self._propose(anchor, context)
        logits, features = self._verify([anchor, *proposals], cache)
        choices = self._choose(logits, position)
        return choices[: leading_run(proposals, choices) + 1], features

    def _pass_by_rejection(
        self, anchor: int, cache: DynamicCache, context: Any, position: int
    ) -> tuple[list[int], torch.Tensor]:
        foreseen: list[torch.Tensor] = []

        def draw(logits: torch.Tensor, before: int) -> list[int]:
            foreseen.append(self.sampling.probabilities(logits))
            return self.sampling.draw(foreseen[-1], position + before, PROPOSAL)

        proposals = self.draft.propose(context, anchor, self.embedding, self.head, draw)
        logits, features = self._verify([anchor, *proposals], cache)
        probabilities = self.sampling.probabilities(logits)
        return self.sampling.accept(proposals, torch.cat(foreseen), probabilities, position), features

    def _propose(self, anchor: int, context: Any) -> list[int]:
        def choose(logits: torch.Tensor, before: int) -> list[int]:
            return self._choose(logits, context.length + 1 + before)

        return self.draft.propose(context, anchor, self.embedding, self.head, choose)

    def _verify(self, tokens: Sequence[int], cache: DynamicCache, keep: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [N, V], as `_logits`, and features [1, N, L*H] of the next tokens."""
        with capture_layers(self.layers, self.draft.shape.target_layer_ids) as captured:
            logits = self._logits(tokens, cache, keep)
        return logits, torch.cat(captured(), dim=-1)

    def _logits(self, tokens: Sequence[int], cache: DynamicCache, keep: int = 0) -> torch.Tensor:
        """Of the last `keep` of the next tokens, or of all: those of a long prompt would take gigabytes."""
        input_ids = torch.tensor([list(tokens)], device=self.head.device)
        return self.target(input_ids=input_ids, past_key_values=cache, use_cache=True, logits_to_keep=keep).logits[0]

    def _choose(self, logits: torch.Tensor, position: int) -> list[int]:
        """The tokens at `position` and after it, one for each row of logits [N, V]."""
        return self.sampling.scores(logits, position).argmax(dim=-1).tolist()

    def _limit(self, prompt: Sequence[int], max_new_tokens: int) -> int:
        """How many tokens an answer may have: none is written past the target's last position."""
        if not 1 <= len(prompt) < self.positions:
            raise ValueError(f"a prompt must have 1 to {self.positions - 1} tokens, found {len(prompt)}")
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, found {max_new_tokens}")
        return min(max_new_tokens, self.positions - len(prompt))

    def _ended(self, tokens: list[int], limit: int) -> bool:
        return len(tokens) >= limit or (bool(tokens) and tokens[-1] in self.stop_ids)

    def _until_stop(self, tokens: list[int]) -> list[int]:
        end = next((i for i, token in enumerate(tokens) if token in self.stop_ids), len(tokens))
        return tokens[: end + 1]


def leading_run(proposals: Sequence[int], choices: Sequence[int]) -> int:
    """How many proposals are accepted: those before the first that differs from the target's choice."""
    return next((i for i, (ours, theirs) in enumerate(zip(proposals, choices)) if ours != theirs), len(proposals))


def first_difference(left: Sequence[int], right: Sequence[int]) -> int | None:
    """The first index at which two outputs differ; None where they are equal."""
    return next((i for i, (ours, theirs) in enumerate(zip_longest(left, right)) if ours != theirs), None)
