"""Tiny models that fit together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, Qwen3ForCausalLM

from dflash_dist.draft.model import DraftShape


def tiny_shape(**changes: Any):
    """A draft shape that fits the tiny target."""
    values: dict[str, Any] = {
        "hidden_size": 64,
        "num_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 128,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "block_size": 8,
        "mask_token_id": 3,
        "target_layer_ids": [1, 2, 4],
        "num_target_layers": 6,
        "vocab_size": 260,
        "max_position_embeddings": 2048,
    }
    return DraftShape(**{**values, **changes})


def lively_target(tiny_target: Path) -> Qwen3ForCausalLM:
    """The tiny target with large, untied weights.

    As it stands, it repeats one token whatever the context: a decoder that mixed up its caches would pass. With these
    weights every token of the context changes what it writes.
    """
    config = AutoConfig.from_pretrained(tiny_target, tie_word_embeddings=False, initializer_range=0.3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return Qwen3ForCausalLM(config).eval().requires_grad_(False)
