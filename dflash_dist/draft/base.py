"""What every kind of draft is: its shape, its tensors, its config.json, its forward and its proposals.

Whoever trains, writes, checks, plans or decodes with a draft asks for nothing else, so that a kind is one file of
`kinds/`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn

from dflash_dist.batch import Batch
from dflash_dist.draft.layers import DraftLayer, RMSNorm
from dflash_dist.draft.shape import DraftShape

# Chooses tokens for the next slots from their logits [N, V]; the second argument says how many slots come before.
Choose = Callable[[torch.Tensor, int], list[int]]


class Judgement(NamedTuple):
    """What a kind that chooses among candidates says of slots with labels, each [N] float32."""

    loss: torch.Tensor  # of its own scores, with gradient
    correct: torch.Tensor  # 1 where its choice, given the label before, is the label
    shown: dict[str, torch.Tensor]  # other shares, by name


class Draft(nn.Module):
    """Maps the target's features and the slots of blocks to the slots' hidden states, and these to scores of tokens.

    The embedding and the LM head are the target's, and live outside. What a warm start fills is the same in all kinds.
    """

    fc: nn.Linear  # from the captured layers, one behind the other, to the context
    hidden_norm: RMSNorm  # of the context
    layers: Sequence[DraftLayer]
    norm: RMSNorm  # of the last layer's hidden states

    architecture: ClassVar[str]  # in config.json
    candidates: int = 0  # the likeliest tokens of a slot, among which a kind's own scores choose; 0: it has none
    Shape: ClassVar[type[DraftShape]] = DraftShape  # a kind with more to tell has a shape of its own
    shape: DraftShape

    def __init__(self, shape: DraftShape, gradient_checkpointing: bool = False):
        super().__init__()
        self.shape, self.gradient_checkpointing = shape, gradient_checkpointing

    @classmethod
    def to_config(cls, shape: DraftShape, dtype: str) -> dict[str, Any]:
        """The `config.json` that engines know this kind by. The fields of the shape stand in it by their names, at the
        top level, in `dflash_config` or in `rope_parameters`, which is how `contract` reads them back."""
        raise NotImplementedError

    @classmethod
    def tensors(cls, shape: DraftShape) -> dict[str, list[int]]:
        """The shape of every tensor by its name: no embedding, LM head or rotary buffer, no prefix."""
        # Of a draft that captures no layer torch says that there is nothing to initialise.
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return {name: list(tensor.shape) for name, tensor in cls(shape).state_dict().items()}

    def forward(self, batch: Batch, features: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        """The training's forward over all blocks.

        Args:
            batch: with blocks, on the device.
            features: [B, S, L*H] from the target, in any dtype.
            embedding: [V, H], the target's, in the dtype to compute in.

        Returns:
            [B, A*K, H] hidden states.
        """
        raise NotImplementedError

    def judge(
        self,
        states: torch.Tensor,
        labels: torch.Tensor,
        previous: torch.Tensor,
        ids: torch.Tensor,
        logits: torch.Tensor,
    ) -> Judgement:
        """What training shows a kind with `candidates`, in the order of decoding: each slot's choice behind the label
        before it.

        Args:
            states: [N, H], hidden states of slots.
            labels: [N].
            previous: [N], the token before each.
            ids: [N, candidates + 1], the likeliest tokens, the first one likeliest, and behind them the label.
            logits: [N, candidates + 1], theirs in float32, with gradient.
        """
        raise NotImplementedError

    def compile_layers(self) -> None:
        """Lets the training's forward run compiled from here on."""
        raise NotImplementedError

    def scores(self, hidden: torch.Tensor, previous: torch.Tensor | None, head: torch.Tensor) -> torch.Tensor:
        """The logits [N, V] of slots.

        Args:
            hidden: [N, H], of their hidden states.
            previous: [N], the token before each of them; None where a kind does not look at it.
            head: [V, H], the target's.
        """
        return hidden @ head.T

    def new_cache(self) -> Any:
        """What `extend` and `propose` keep of the accepted context, without any; its `length` counts the tokens."""
        raise NotImplementedError

    def extend(self, cache: Any, features: torch.Tensor) -> None:
        """Takes the next tokens' features [1, N, L*H] into the cache."""
        raise NotImplementedError

    def propose(
        self, cache: Any, anchor: int, embedding: torch.Tensor, head: torch.Tensor, choose: Choose
    ) -> list[int]:
        """The K-1 tokens that follow `anchor`, which stands behind the cached context."""
        raise NotImplementedError
