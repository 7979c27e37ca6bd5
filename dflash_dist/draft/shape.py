"""The sizes of a draft."""

from __future__ import annotations

from dataclasses import dataclass


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

    @property
    def proposals(self) -> int:
        """Tokens that a block proposes: all but the anchor."""
        return self.block_size - 1
