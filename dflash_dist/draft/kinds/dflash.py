"""The DFlash draft: a small decoder whose queries are the slots of a block and whose keys and values are the target's
features and the block itself (arXiv 2602.06036, section 4.1).

Parameter names are those of the published drafts (z-lab/dflash), so that serving engines load them as they are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from dflash_dist.batch import Batch
from dflash_dist.draft.base import Choose, Draft
from dflash_dist.draft.layers import ContextCache, DraftLayer, RMSNorm, rope_of
from dflash_dist.draft.shape import DraftShape
from dflash_dist.draft.visibility import to_keys
from dflash_dist.kernels.attention import Attend, OneBlockAttention, training_attention
from dflash_dist.kernels.elementwise import Rope
from dflash_dist.kernels.mask import Mask


class DFlashDraftModel(Draft):
    """All slots of a block are foretold at once."""

    architecture = "DFlashDraftModel"

    def __init__(self, shape: DraftShape, gradient_checkpointing: bool = False):
        super().__init__(shape, gradient_checkpointing)
        hidden, eps = shape.hidden_size, shape.rms_norm_eps
        self.fc = nn.Linear(len(shape.target_layer_ids) * hidden, hidden, bias=False)
        self.hidden_norm = RMSNorm(hidden, eps)
        layers = nn.ModuleList(self.new_layer() for _ in range(shape.num_layers))
        self.layers = cast("Sequence[DraftLayer]", layers)
        self.masks = shape.masks  # in training and in decoding
        self.norm = RMSNorm(hidden, eps)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)  # as Qwen3, whose layers these are

    def new_layer(self) -> DraftLayer:
        return DraftLayer(self.shape)

    @classmethod
    def to_config(cls, shape: DraftShape, dtype: str) -> dict[str, Any]:
        visible, visible_inside = to_keys(shape)
        return {
            "architectures": [cls.architecture],
            "model_type": "qwen3",
            "dtype": dtype,
            "block_size": shape.block_size,
            "num_target_layers": shape.num_target_layers,
            "dflash_config": {
                "mask_token_id": shape.mask_token_id,
                "target_layer_ids": shape.target_layer_ids,
                "block_size": shape.block_size,
                **visible_inside,
            },
            "num_hidden_layers": shape.num_layers,
            **visible,
            "hidden_size": shape.hidden_size,
            "vocab_size": shape.vocab_size,
            "num_attention_heads": shape.num_attention_heads,
            "num_key_value_heads": shape.num_key_value_heads,
            "head_dim": shape.head_dim,
            "intermediate_size": shape.intermediate_size,
            "hidden_act": "silu",
            "rms_norm_eps": shape.rms_norm_eps,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "max_position_embeddings": shape.max_position_embeddings,
            "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
            "rope_theta": shape.rope_theta,  # engines that know only the older key
            "tie_word_embeddings": False,
        }

    def forward(self, batch: Batch, features: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        slots = F.embedding(batch.slot_ids.flatten(1), embedding)
        positions = batch.slot_positions.flatten(1)
        attend_by = functools.partial(training_attention, batch, slots.dtype)
        return self.through_layers(slots, positions, features.to(slots.dtype), batch.position_ids, attend_by)

    def through_layers(
        self,
        slots: torch.Tensor,
        slot_positions: torch.Tensor,
        features: torch.Tensor,
        context_positions: torch.Tensor,
        attend_by: Callable[[Mask], Attend],
    ) -> torch.Tensor:
        """
        Args:
            slots: [B, A*K, H] embeddings of the anchors and mask tokens.
            slot_positions: [B, A*K].
            features: [B, S, L*H] from the target.
            context_positions: [B, S], restarting with each document.
            attend_by: gives the attention of layers with this mask.

        Returns:
            [B, A*K, H] hidden states, normalised, for the target's LM head.
        """
        context = self.hidden_norm(self.fc(features))
        slot_rope, context_rope = self._rope(slot_positions), self._rope(context_positions)
        hidden = slots
        for layer, attend in zip(self.layers, self._attention(attend_by)):
            inputs = hidden, slot_rope, context, context_rope, attend
            if self.gradient_checkpointing and self.training:
                hidden = checkpoint(layer.over_context, *inputs, use_reentrant=False)
            else:
                hidden = layer.over_context(*inputs)
        return self.output(hidden)

    def output(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the LM head reads, of the last layer's hidden states."""
        return self.norm(hidden)

    def compile_layers(self) -> None:
        """From here on a training forward runs its layers compiled: one graph for all of them, which fuses what lies
        between the large products. Decoding, whose shapes change, stays as it is."""
        for layer in self.layers:
            layer.over_context = torch.compile(layer.over_context, dynamic=False)  # type: ignore[method-assign]

    def new_cache(self) -> ContextCache:
        return ContextCache()

    def extend(self, cache: ContextCache, features: torch.Tensor) -> None:
        positions = torch.arange(cache.length, cache.length + features.shape[1], device=features.device)[None]
        context, rope = self.hidden_norm(self.fc(features)), self._rope(positions)
        cache.append([layer.self_attn.key_value(context, rope) for layer in self.layers])

    def propose(
        self, cache: ContextCache, anchor: int, embedding: torch.Tensor, head: torch.Tensor, choose: Choose
    ) -> list[int]:
        return choose(self.scores(self.block_behind(cache, anchor, embedding), None, head), 0)

    def block_behind(self, cache: ContextCache, anchor: int, embedding: torch.Tensor) -> torch.Tensor:
        """The hidden states [K-1, H] of the slots behind `anchor`."""
        masked = [self.shape.mask_token_id] * self.shape.proposals
        slots = torch.tensor([[anchor, *masked]], device=embedding.device)
        return self.foresee(cache, F.embedding(slots, embedding))[0, 1:]

    def foresee(self, cache: ContextCache, slots: torch.Tensor) -> torch.Tensor:
        """The hidden states [1, K, H] of one block of embeddings after the cached context, its anchor at the next
        position."""
        positions = torch.arange(cache.length, cache.length + slots.shape[1], device=slots.device)[None]
        rope, hidden = self._rope(positions), slots
        attention = self._attention(lambda mask: OneBlockAttention(cache.length, slots.shape[1], mask, slots.device))
        for layer, context, attend in zip(self.layers, cache.layers, attention, strict=True):
            hidden = layer(hidden, rope, context, attend)
        return self.output(hidden)

    def _attention(self, attend_by: Callable[[Mask], Attend]) -> list[Attend]:
        """Of each layer; layers with the same mask share it, since it takes time to make."""
        made = {mask: attend_by(mask) for mask in set(self.masks)}
        return [made[mask] for mask in self.masks]

    def _rope(self, positions: torch.Tensor) -> Rope:
        return rope_of(positions, self.shape.head_dim, self.shape.rope_theta)
