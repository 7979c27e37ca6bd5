"""The DFlash draft: a small decoder whose queries are the slots of a block and whose keys and values are the target's
features and the block itself (arXiv 2602.06036, section 4.1).

Parameter names are those of the published drafts (z-lab/dflash), so that serving engines load them as they are. The
embedding and the LM head are the target's and live outside.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from dflash_dist.draft.attention import Attend, OneBlockAttention
from dflash_dist.draft.elementwise import GatedDown, NormalizeRMS, Rope, Rotate
from dflash_dist.draft.mask import FULL, Mask


@dataclass(frozen=True)
class DraftShape:
    """What determines a draft's tensors and how it is served."""

    hidden_size: int
    num_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    rms_norm_eps: float
    rope_theta: float
    block_size: int
    mask_token_id: int
    target_layer_ids: list[int]
    num_target_layers: int
    vocab_size: int
    max_position_embeddings: int


KeyValue = tuple[torch.Tensor, torch.Tensor]


class DFlashDraftModel(nn.Module):
    """Maps slot embeddings and target features to the slots' final hidden states."""

    mask: Mask = FULL  # of every layer, in training and in decoding

    def __init__(self, shape: DraftShape, gradient_checkpointing: bool = False):
        super().__init__()
        self.shape, self.gradient_checkpointing = shape, gradient_checkpointing
        hidden, eps = shape.hidden_size, shape.rms_norm_eps
        self.fc = nn.Linear(len(shape.target_layer_ids) * hidden, hidden, bias=False)
        self.hidden_norm = RMSNorm(hidden, eps)
        layers = nn.ModuleList(DraftLayer(shape) for _ in range(shape.num_layers))
        self.layers = cast("Sequence[DraftLayer]", layers)
        self.norm = RMSNorm(hidden, eps)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)  # as Qwen3, whose layers these are

    def forward(
        self,
        slots: torch.Tensor,
        slot_positions: torch.Tensor,
        features: torch.Tensor,
        context_positions: torch.Tensor,
        attend: Attend,
    ) -> torch.Tensor:
        """
        Args:
            slots: [B, A*K, H] embeddings of the anchors and mask tokens.
            slot_positions: [B, A*K].
            features: [B, S, L*H] from the target.
            context_positions: [B, S], restarting with each document.
            attend: which slot sees what.

        Returns:
            [B, A*K, H] hidden states, normalised, for the target's LM head.
        """
        context = self.hidden_norm(self.fc(features))
        slot_rope = self._rope(slot_positions)
        context_rope = self._rope(context_positions)
        hidden = slots
        for layer in self.layers:
            if self.gradient_checkpointing and self.training:
                hidden = checkpoint(
                    layer.over_context, hidden, slot_rope, context, context_rope, attend, use_reentrant=False
                )
            else:
                hidden = layer.over_context(hidden, slot_rope, context, context_rope, attend)
        return self.norm(hidden)

    def compile_layers(self) -> None:
        """From here on a training forward runs its layers compiled: one graph for all of them, which fuses what lies
        between the large products. Decoding, whose shapes change, stays as it is."""
        for layer in self.layers:
            layer.over_context = torch.compile(layer.over_context, dynamic=False)  # type: ignore[method-assign]

    def extend(self, cache: ContextCache, features: torch.Tensor) -> None:
        """Appends the context keys and values of the next tokens' features [1, N, L*H] to the cache."""
        positions = torch.arange(cache.length, cache.length + features.shape[1], device=features.device)[None]
        context, rope = self.hidden_norm(self.fc(features)), self._rope(positions)
        cache.append([layer.self_attn.key_value(context, rope) for layer in self.layers])

    def propose(self, cache: ContextCache, slots: torch.Tensor) -> torch.Tensor:
        """One block [1, K, H] after the cached context, its anchor at the next position; returns hidden states."""
        positions = torch.arange(cache.length, cache.length + slots.shape[1], device=slots.device)[None]
        rope, hidden = self._rope(positions), slots
        attend = OneBlockAttention(cache.length, slots.shape[1], self.mask, slots.device)
        for layer, context in zip(self.layers, cache.layers, strict=True):
            hidden = layer(hidden, rope, context, attend)
        return self.norm(hidden)

    def _rope(self, positions: torch.Tensor) -> Rope:
        """Cosine and signed sine for `Rotate`. Computed anew each time: a buffer would be rounded by `.to(bf16)`, which
        turns positions past a few hundred into noise."""
        half = torch.arange(0, self.shape.head_dim, 2, device=positions.device, dtype=torch.float32)
        frequencies = self.shape.rope_theta ** (-half / self.shape.head_dim)
        angles = positions[:, None, :, None].float() * frequencies
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


@dataclass
class ContextCache:
    """Keys and values of the accepted context for each draft layer. Block slots never enter."""

    layers: list[KeyValue] = field(default_factory=list)

    @property
    def length(self) -> int:
        return self.layers[0][0].shape[2] if self.layers else 0

    def append(self, new: list[KeyValue]) -> None:
        if not self.layers:
            self.layers = new
            return
        self.layers = [
            (torch.cat([key, more_key], dim=2), torch.cat([value, more_value], dim=2))
            for (key, value), (more_key, more_value) in zip(self.layers, new)
        ]


class DraftLayer(nn.Module):
    def __init__(self, shape: DraftShape):
        super().__init__()
        self.input_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.self_attn = DraftAttention(shape)
        self.post_attention_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.mlp = MLP(shape.hidden_size, shape.intermediate_size)

    def forward(self, hidden: torch.Tensor, rope: Rope, context: KeyValue, attend: Attend) -> torch.Tensor:
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), rope, context, attend)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))

    def over_context(
        self, hidden: torch.Tensor, rope: Rope, context: torch.Tensor, context_rope: Rope, attend: Attend
    ) -> torch.Tensor:
        """The layer with keys and values made from the shared context [B, S, H], which is not normalised again."""
        return self(hidden, rope, self.self_attn.key_value(context, context_rope), attend)


class DraftAttention(nn.Module):
    def __init__(self, shape: DraftShape):
        super().__init__()
        self.head_dim = shape.head_dim
        queries, keys = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.hidden_size, queries, bias=False)
        self.k_proj = nn.Linear(shape.hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(shape.hidden_size, keys, bias=False)
        self.o_proj = nn.Linear(queries, shape.hidden_size, bias=False)
        self.q_norm = RMSNorm(shape.head_dim, shape.rms_norm_eps)
        self.k_norm = RMSNorm(shape.head_dim, shape.rms_norm_eps)

    def forward(self, slots: torch.Tensor, rope: Rope, context: KeyValue, attend: Attend) -> torch.Tensor:
        query = Rotate.apply(self.q_norm(self._heads(self.q_proj(slots))), *rope)
        key, value = self.key_value(slots, rope)
        output = attend(query, *context, key, value)
        return self.o_proj(output.transpose(1, 2).flatten(2))

    def key_value(self, hidden: torch.Tensor, rope: Rope) -> KeyValue:
        """Keys and values [B, kv_heads, T, D] of context or slots [B, T, H]."""
        key = Rotate.apply(self.k_norm(self._heads(self.k_proj(hidden))), *rope)
        return key, self._heads(self.v_proj(hidden))

    def _heads(self, projected: torch.Tensor) -> torch.Tensor:
        return projected.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class MLP(nn.Module):
    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_proj(hidden), self.up_proj(hidden)
        return GatedDown.apply(gate, up, self.down_proj.weight.to(gate.dtype))


class RMSNorm(nn.Module):
    """Root-mean-square normalisation in float32; the result has the input's dtype."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return NormalizeRMS.apply(hidden, self.weight, self.eps)
