"""Real decoding during training: how many tokens a pass of the target yields with the draft as it is now.

Every rank decodes its share of the prompts. Where the target is sharded, each of its forwards gathers the shards of all
ranks; so the ranks run them together, and one that has finished takes part until the last one has. A request to stop
ends it on all ranks at the same forward: a scheduler may leave seconds, and a few answers take minutes.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers.modeling_outputs import CausalLMOutputWithPast

from dflash_dist.config import Config, EvalConfig
from dflash_dist.data.conversations import name_row, read_conversations
from dflash_dist.data.rows import Data, make_encoder
from dflash_dist.decoding.speculative import Decoder
from dflash_dist.draft.base import Draft
from dflash_dist.ranks import World
from dflash_dist.target.load import TargetInfo, check_rollback, check_room


class Stopped(Exception):
    """Some rank was asked to stop."""


@dataclass(frozen=True)
class Acceptance:
    """What became of a draft's blocks, pooled over prompts."""

    passes: float  # verification passes of the target, prefill excluded
    emitted: float  # tokens that they gave, cut at the stop token
    reached: list[float]  # by slot: passes in which the proposals up to this one were accepted

    @property
    def tau(self) -> float | None:
        """Tokens a pass, at least 1; None where every answer ended with its first token, which the prefill gives."""
        return self.emitted / self.passes if self.passes else None

    @property
    def by_slot(self) -> list[float | None]:
        """Share of the passes; None without any."""
        return [count / self.passes if self.passes else None for count in self.reached]


class Evaluation:
    """The prompts of a run and the target that answers them.

    Args:
        prompts: of all ranks, each shorter than the target's positions.
    """

    def __init__(
        self, config: EvalConfig, world: World, target: SharedTarget, stop_ids: list[int], prompts: list[list[int]]
    ):
        self.config, self.world, self.target, self.stop_ids, self.prompts = config, world, target, stop_ids, prompts

    def run(self, draft: Draft) -> Acceptance | None:
        """Decodes greedily with the draft in the target's dtype, as it would be exported; it is left as it is. None
        where a rank was asked to stop."""
        decoder = Decoder(self.target, in_dtype(draft, self.target.head.dtype), self.stop_ids)
        mine = self.prompts[self.world.rank :: self.world.size]
        try:
            answers = [decoder.speculative(prompt, self.config.max_new_tokens) for prompt in mine]
            self.target.follow_others()
        except Stopped:
            return None
        emitted = [count for answer in answers for count in answer.emitted]
        accepted = [count for answer in answers for count in answer.accepted]
        reached = [sum(count >= slot for count in accepted) for slot in range(1, draft.shape.proposals + 1)]
        passes, tokens, *by_slot = self.world.sum_numbers(len(emitted), sum(emitted), *reached)
        return Acceptance(passes, tokens, by_slot)


class SharedTarget:
    """The training's target with the plain copies of its ends: a causal language model that all ranks run together.

    A sharded module's forward is one of all ranks. Each rank says first that one is coming, so that those with nothing
    left to decode take part, with a single token.

    Args:
        model: the decoder, whole or sharded.
        embedding: [V, H].
        head: [V, H].
        stop: whether this rank was asked to stop.
    """

    def __init__(self, world: World, model: Any, embedding: torch.Tensor, head: torch.Tensor, stop: Callable[[], bool]):
        self.world, self.model, self.embedding, self.head, self.stop = world, model, embedding, head, stop
        self.config = model.config

    def get_input_embeddings(self) -> Any:
        return SimpleNamespace(weight=self.embedding)

    def get_output_embeddings(self) -> Any:
        return SimpleNamespace(weight=self.head)

    def __call__(self, logits_to_keep: int, **inputs: Any) -> CausalLMOutputWithPast:
        self._agree(decoding=True)
        hidden = self.model(**inputs).last_hidden_state
        return CausalLMOutputWithPast(logits=F.linear(hidden[:, -logits_to_keep:], self.head))

    @torch.no_grad()
    def follow_others(self) -> None:
        """Returns once no rank decodes any more."""
        while self._agree(decoding=False):
            self.model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=self.world.device), use_cache=False)

    def _agree(self, decoding: bool) -> bool:
        """Whether a forward of all ranks follows, since one of them decodes."""
        self.world.tick()
        decode, stops = self.world.sum_numbers(decoding, self.stop())
        if stops:
            raise Stopped
        return decode > 0


def in_dtype(draft: Draft, dtype: torch.dtype) -> Draft:
    """A copy for decoding; a draft of this dtype shares its tensors with it."""
    with torch.device("meta"):
        copy = type(draft)(draft.shape)
    copy.load_state_dict({name: tensor.to(dtype) for name, tensor in draft.state_dict().items()}, assign=True)
    return copy.eval()


def find_prompts(config: Config, info: TargetInfo, data: Data) -> list[list[int]]:
    """What the config asks to decode, as tokens, each up to where the last answer would begin.

    Raises:
        ValueError: a conversation of the file cannot be a prompt, or there is none.
    """
    check_rollback(info.text)
    prompts, count = [], config.eval.count
    if config.eval.prompts is None:
        assert data.held_out, "load_config refuses real decoding without prompts"
        rows = data.held_out
        numbers = np.unique(rows.chosen)
        for number in numbers[np.arange(0, len(numbers), max(len(numbers) / count, 1)).astype(int)]:
            document = rows.documents[int(number)]
            begins = [begin for begin, _ in document.supervised if 0 < begin < rows.seq_len]
            prompts += [document.input_ids[: begins[-1]].tolist()] if begins else []
    else:
        encoder = make_encoder(config.data, info.tokenizer, info.stop_ids, info.text.vocab_size)
        for row, conversation in itertools.islice(read_conversations(config.eval.prompts), count):
            try:
                prompt = encoder.prompt_of(dataclasses.replace(conversation, messages=conversation.asked))
                check_room(info, prompt)
            except ValueError as error:
                raise ValueError(f"eval.prompts {name_row(config.eval.prompts, row)}: {error}") from error
            prompts.append(prompt)
    if not prompts:
        raise ValueError("no held-out conversation has a prompt before its answer: set eval.prompts to a file of some")
    return prompts
