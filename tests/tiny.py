"""Tiny models that fit together, with weights that all matter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel, Qwen3ForCausalLM

from dflash_dist.config import TargetConfig
from dflash_dist.draft.shape import DraftShape
from dflash_dist.target.tiny import tiny_config, tiny_tokenizer


def target_of(layer_ids: list[int], dtype: torch.dtype = torch.float32, **more: Any) -> TargetConfig:
    """How to load a target."""
    return TargetConfig(layer_ids=layer_ids, dtype=str(dtype).removeprefix("torch."), **more)


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


@torch.no_grad()
def enliven(model: PreTrainedModel, seed: int = 7) -> PreTrainedModel:
    """Gives every parameter that is constant, as norms and biases are until they are trained, values of its own.

    With ones and zeros in all layers, a norm of the wrong layer, or one left out, is as good as the right one.
    """
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.min() == parameter.max():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def make_tiny_target(folder: Path) -> None:
    """Writes the package's tiny target with weights of about unit gain, and its tokenizer."""
    tokenizer = tiny_tokenizer()
    config = tiny_config(tokenizer)
    config.initializer_range = config.hidden_size**-0.5
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        enliven(Qwen3ForCausalLM(config)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def lively_target(tiny_target: Path) -> Qwen3ForCausalLM:
    """The tiny target with large, untied weights.

    As it stands, it soon repeats itself, and a decoder that mixed up its caches might pass. With these weights every
    token of the context changes what it writes.
    """
    config = AutoConfig.from_pretrained(tiny_target, tie_word_embeddings=False, initializer_range=0.3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(28)
        return enliven(Qwen3ForCausalLM(config)).eval().requires_grad_(False)
