"""The parts that drafts are made of. Parameter names are those of the published drafts (z-lab/dflash)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from dflash_dist.draft.shape import DraftShape
from dflash_dist.kernels.attention import Attend
from dflash_dist.kernels.elementwise import GatedDown, NormalizeRMS, Rope, Rotate

KeyValue = tuple[torch.Tensor, torch.Tensor]


def rope_of(positions: torch.Tensor, head_dim: int, theta: float) -> Rope:
    """Cosine and signed sine for `Rotate`, of positions [B, T]. Computed anew each time: a buffer would be rounded by
    `.to(bf16)`, which turns positions past a few hundred into noise."""
    half = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32)
    frequencies = theta ** (-half / head_dim)
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
    # Modules that a kind adds, which begin as if they were not there: a target's layer has none.
    added: tuple[str, ...] = ()

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
