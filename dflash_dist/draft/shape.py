"""The sizes of a draft."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from dflash_dist.kernels.mask import Mask

FULL_ATTENTION, SLIDING_ATTENTION = "full_attention", "sliding_attention"


@dataclass(frozen=True, kw_only=True)
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
    # What layers see; without sliding layers everything before the anchor, and in both directions inside the block.
    layer_types: list[str] | None = None  # of each layer; None: all full
    sliding_window: int | None = None  # of sliding layers [tokens]
    is_causal: bool | None = False  # within the block; None: sliding layers are, the others not

    @classmethod
    def of_kind(cls) -> list[str]:
        """The names of the fields that a kind has besides those of all kinds."""
        return [field.name for field in dataclasses.fields(cls) if field.name not in DraftShape.__dataclass_fields__]

    @property
    def masks(self) -> list[Mask]:
        """Of each layer."""
        sliding = [kind == SLIDING_ATTENTION for kind in self.types]
        return [
            Mask(self.sliding_window if slides else None, slides if self.is_causal is None else self.is_causal)
            for slides in sliding
        ]

    @property
    def types(self) -> list[str]:
        """The type of each layer, as engines name it."""
        return self.layer_types or [FULL_ATTENTION] * self.num_layers

    @property
    def proposals(self) -> int:
        """Tokens that a block proposes: all but the anchor."""
        return self.block_size - 1
