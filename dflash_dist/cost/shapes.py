"""Shapes of targets to try, published ones among them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from transformers import (
    GptOssConfig,
    LlamaConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from dflash_dist.config import TargetConfig
from dflash_dist.target.folder import CONFIG, check_decoder, find, looks_like_hub_id, read_config
from dflash_dist.target.tiny import BUILTIN_TARGET, tiny_config, tiny_tokenizer


def _shape(
    kind: Callable[..., PretrainedConfig],
    hidden: int,
    layers: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    intermediate: int,
    vocab: int,
    tied: bool = False,
    **more: int,
) -> partial[PretrainedConfig]:
    """Makes the config of a kind of decoder."""
    return partial(
        kind,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=intermediate,
        vocab_size=vocab,
        tie_word_embeddings=tied,
        **{"max_position_embeddings": 40_960} | more,
    )


SMALL = _shape(Qwen3Config, 256, 8, 8, 4, 32, 768, 8192)
# From the config.json of each model's page on huggingface.co.
PUBLISHED = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": _shape(LlamaConfig, 576, 30, 9, 3, 64, 1536, 49_152, True),
    "Qwen/Qwen3-0.6B": _shape(Qwen3Config, 1024, 28, 16, 8, 128, 3072, 151_936, True),
    "Qwen/Qwen3-1.7B": _shape(Qwen3Config, 2048, 28, 16, 8, 128, 6144, 151_936, True),
    "Qwen/Qwen3-4B": _shape(Qwen3Config, 2560, 36, 32, 8, 128, 9728, 151_936, True),
    "Qwen/Qwen3-8B": _shape(Qwen3Config, 4096, 36, 32, 8, 128, 12_288, 151_936),
    "Qwen/Qwen3-14B": _shape(Qwen3Config, 5120, 40, 40, 8, 128, 17_408, 151_936),
    "Qwen/Qwen3-32B": _shape(Qwen3Config, 5120, 64, 64, 8, 128, 25_600, 151_936),
    "Qwen/Qwen3-30B-A3B": _shape(
        Qwen3MoeConfig, 2048, 48, 32, 4, 128, 6144, 151_936, moe_intermediate_size=768, num_experts=128
    ),
    "Qwen/Qwen2.5-7B-Instruct": _shape(Qwen2Config, 3584, 28, 28, 4, 128, 18_944, 152_064),
    "meta-llama/Llama-3.1-8B-Instruct": _shape(LlamaConfig, 4096, 32, 32, 8, 128, 14_336, 128_256),
    "meta-llama/Llama-3.3-70B-Instruct": _shape(LlamaConfig, 8192, 80, 64, 8, 128, 28_672, 128_256),
    "openai/gpt-oss-20b": _shape(
        GptOssConfig, 2880, 24, 64, 8, 64, 2880, 201_088, num_local_experts=32, max_position_embeddings=131_072
    ),
}


def target_config(like: str | None, target: TargetConfig) -> PretrainedConfig:
    """The Hugging Face config of the model `like`, or else of a run's target, or else of a small one.

    Args:
        like: a name of `PUBLISHED`, or the folder or file of a config.json.

    Raises:
        ValueError: there is no such config to read.
    """
    name = like or target.path
    if name in PUBLISHED:
        return PUBLISHED[name]()
    if name == BUILTIN_TARGET:
        return tiny_config(tiny_tokenizer())
    if name:
        here = Path(name).is_file() or find(name, target.revision, CONFIG)
        if not here and (like or not looks_like_hub_id(name)):  # a run's target may be on the hub
            raise ValueError(f"{name} has no {CONFIG} to read, nor is it one of {', '.join(PUBLISHED)}")
        config = read_config(name, target.revision, target.trust_remote_code, local_files_only=like is not None)
        check_decoder(config.get_text_config(), name)
        return config
    return SMALL()
