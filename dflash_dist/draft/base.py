"""What every kind of draft is: its shape, its tensors, its config.json, its forward and its proposals.

Whoever trains, writes, checks, plans or decodes with a draft asks for nothing else, so that a kind is one file of
`kinds/`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn

from dflash_dist.batch import Batch
from dflash_dist.draft.layers import DraftLayer, RMSNorm
from dflash_dist.draft.shape import DraftShape
from dflash_dist.kernels.cross_entropy import Seen

# Chooses tokens for the next slots from their logits [N, V]; the second argument says how many slots come before.
Choose = Callable[[torch.Tensor, int], list[int]]


class Judgement(NamedTuple):
    """What a kind says of slots with labels by scores of its own, each [N] float32."""

    loss: torch.Tensor  # of its own scores, with gradient
    correct: torch.Tensor | None  # 1 where its choice, given the label before, is the label; None: as the logits say
    shown: dict[str, torch.Tensor]  # other shares, by name


class Draft(nn.Module):
    """Maps the target's features and the slots of blocks to the slots' hidden states, and these to scores of tokens.

    The embedding and the LM head are the target's, and live outside. What a warm start fills is the same in all kinds.
    """

    fc: nn.Linear  # from the captured layers, one behind the other, to the context
    hidden_norm: RMSNorm  # of the context
    layers: Sequence[DraftLayer]
    norm: RMSNorm  # of the last layer's hidden states

    architecture: ClassVar[str]  # in config.json, and
    projector: ClassVar[str | None] = None  # in its dflash_config, where kinds share an architecture
    method: ClassVar[str] = "dflash"  # what vLLM calls it, and in capitals SGLang
    engines: ClassVar[tuple[str, ...]] = ("vLLM", "SGLang", "transformers")  # that serve it
    published: ClassVar[Mapping[str, Any]] = MappingProxyType({})  # knobs besides those of all kinds, and their values
    candidates: int = 0  # the likeliest tokens of a slot that `judge` looks at
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

    def added(
        self, states: torch.Tensor, previous: torch.Tensor, embedding: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """What a kind adds to the logits of slots, as a product of learned rows [.., T, r] and a learned table [V, r]:
        few numbers, with which the loss goes through the logits in chunks. None where it adds nothing.

        Args:
            states: [.., T, H], hidden states of the first T slots of blocks, behind the anchors.
            previous: [.., T], the token before each.
            embedding: [V, H], the target's; None where a kind does not look at it.
        """
        return None

    def base_share(self, progress: float) -> float:
        """What the loss of the logits without `added` counts in that of both, at this share of the run."""
        return 0.0

    def judge(
        self,
        batch: Batch,
        features: torch.Tensor | None,
        embedding: torch.Tensor | None,
        states: torch.Tensor,
        seen: Seen,
    ) -> Judgement | None:
        """What training shows a kind with scores of its own, in the order of decoding: each slot behind the label
        before it. None where it has none.

        Args:
            batch: as `forward` had it, and so
            features: and
            embedding: None where a kind does not look at them again.
            states: [N, H], hidden states of the batch's `weighted` slots.
            seen: of the same slots.
        """
        return None

    def compile_layers(self) -> None:
        """Lets the training's forward run compiled from here on."""
        raise NotImplementedError

    def scores(
        self,
        hidden: torch.Tensor,
        previous: torch.Tensor | None,
        head: torch.Tensor,
        embedding: torch.Tensor | None = None,
        before: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The logits [T, V] of the first T slots of a block, behind its anchor.

        Args:
            hidden: [T, H], their hidden states.
            previous: [T], the token before each of them; None where a kind does not look at it, and so
            head: [V, H], the target's.
            embedding: [V, H], the target's; and
            before: [L*H], the features of the token before the anchor, None also where the text begins with it.
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
