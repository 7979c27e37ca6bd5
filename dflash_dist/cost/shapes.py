"""What a training step has to compute, from shapes alone: floating-point operations, and published shapes to try.

Letters as everywhere: `B` rows, `S` packed length, `L` captured layers, `H` hidden, `A` anchors a row, `K` block size,
`V` vocabulary. A multiplication with its addition counts as two operations.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, Qwen3Config, Qwen3MoeConfig

from dflash_dist.config import TargetConfig
from dflash_dist.draft.shape import DraftShape
from dflash_dist.target.folder import CONFIG, check_decoder, find, looks_like_hub_id, read_config
from dflash_dist.target.tiny import BUILTIN_TARGET, tiny_config, tiny_tokenizer


@dataclass(frozen=True)
class TargetShape:
    """A decoder's shape, as far as it costs."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int  # of one expert, where there are several
    vocab: int
    tied: bool  # whether embedding and LM head are one
    experts: int = 0
    experts_per_token: int = 0

    @staticmethod
    def of(text_config: Any) -> TargetShape:
        """Reads a Hugging Face config of a Llama-like decoder."""
        heads = text_config.num_attention_heads
        experts = getattr(text_config, "num_experts", None) or getattr(text_config, "num_local_experts", None) or 0
        expert = getattr(text_config, "moe_intermediate_size", None) or text_config.intermediate_size
        return TargetShape(
            hidden=text_config.hidden_size,
            layers=text_config.num_hidden_layers,
            heads=heads,
            kv_heads=text_config.num_key_value_heads,
            head_dim=getattr(text_config, "head_dim", None) or text_config.hidden_size // heads,
            intermediate=expert if experts else text_config.intermediate_size,
            vocab=text_config.vocab_size,
            tied=bool(text_config.tie_word_embeddings),
            experts=experts,
            experts_per_token=text_config.num_experts_per_tok if experts else 0,
        )

    def config(self) -> PretrainedConfig:
        """A Qwen3 of this shape: whatever the published model is, its costs are in these numbers."""
        common: dict[str, Any] = {
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab,
            "tie_word_embeddings": self.tied,
            "max_position_embeddings": 40_960,
        }
        if not self.experts:
            return Qwen3Config(**common, intermediate_size=self.intermediate)
        return Qwen3MoeConfig(
            **common,
            intermediate_size=self.intermediate,
            moe_intermediate_size=self.intermediate,
            num_experts=self.experts,
            num_experts_per_tok=self.experts_per_token,
        )

    @property
    def attention_parameters(self) -> int:
        """Of the projections of one layer."""
        return attention_parameters(self.hidden, self.heads, self.kv_heads, self.head_dim)

    @property
    def layer_parameters(self) -> int:
        """Of the matrices of one layer; norms, a few thousand, are left out."""
        mlp = 3 * self.hidden * self.intermediate
        return self.attention_parameters + (self.experts * (mlp + self.hidden) if self.experts else mlp)

    @property
    def layer_active_parameters(self) -> int:
        """Of the matrices that one token meets in one layer."""
        mlp = 3 * self.hidden * self.intermediate
        routed = self.experts_per_token * mlp + self.hidden * self.experts
        return self.attention_parameters + (routed if self.experts else mlp)


# From the config.json of each model's page on huggingface.co.
PUBLISHED = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": TargetShape(576, 30, 9, 3, 64, 1536, 49_152, True),
    "Qwen/Qwen3-0.6B": TargetShape(1024, 28, 16, 8, 128, 3072, 151_936, True),
    "Qwen/Qwen3-1.7B": TargetShape(2048, 28, 16, 8, 128, 6144, 151_936, True),
    "Qwen/Qwen3-4B": TargetShape(2560, 36, 32, 8, 128, 9728, 151_936, True),
    "Qwen/Qwen3-8B": TargetShape(4096, 36, 32, 8, 128, 12_288, 151_936, False),
    "Qwen/Qwen3-14B": TargetShape(5120, 40, 40, 8, 128, 17_408, 151_936, False),
    "Qwen/Qwen3-32B": TargetShape(5120, 64, 64, 8, 128, 25_600, 151_936, False),
    "Qwen/Qwen3-30B-A3B": TargetShape(2048, 48, 32, 4, 128, 768, 151_936, False, 128, 8),
    "Qwen/Qwen2.5-7B-Instruct": TargetShape(3584, 28, 28, 4, 128, 18_944, 152_064, False),
    "meta-llama/Llama-3.1-8B-Instruct": TargetShape(4096, 32, 32, 8, 128, 14_336, 128_256, False),
    "meta-llama/Llama-3.3-70B-Instruct": TargetShape(8192, 80, 64, 8, 128, 28_672, 128_256, False),
    "openai/gpt-oss-20b": TargetShape(2880, 24, 64, 8, 64, 2880, 201_088, False, 32, 4),
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
        return PUBLISHED[name].config()
    if name == BUILTIN_TARGET:
        return tiny_config(tiny_tokenizer())
    if name:
        here = Path(name).is_file() or find(name, target.revision, CONFIG)
        if not here and (like or not looks_like_hub_id(name)):  # a run's target may be on the hub
            raise ValueError(f"{name} has no {CONFIG} to read, nor is it one of {', '.join(PUBLISHED)}")
        config = read_config(name, target.revision, target.trust_remote_code, local_files_only=like is not None)
        check_decoder(config.get_text_config(), name)
        return config
    return TargetShape(256, 8, 8, 4, 32, 768, 8192, False).config()


def attention_parameters(hidden: int, heads: int, kv_heads: int, head_dim: int) -> int:
    """Of the four projections q, k, v, o."""
    return 2 * hidden * head_dim * (heads + kv_heads)


def spread_layers(layers: int, count: int) -> list[int]:
    """Layers to capture, evenly from the second to the third from last (arXiv 2602.06036, section 4.1).

    Raises:
        ValueError: the decoder has too few layers for as many different ones.
    """
    ids = [round(1 + i * (layers - 4) / (count - 1)) for i in range(count)] if count > 1 else [layers // 2]
    if len(set(ids)) < count or not all(0 <= i < layers - 1 for i in ids):
        raise ValueError(f"{layers} layers are too few to capture {count} of them: name them with --layer-ids")
    return ids


@dataclass(frozen=True)
class Work:
    """What one step works on, over all ranks."""

    tokens: int  # B * S
    causal_pairs: float  # (token, earlier token or itself) in one document, which the target's attention sees
    slots: int  # B * A * K
    visible_pairs: float  # (slot, context token or slot of its block)
    labels: float  # slots that enter the LM head


def step_flops(target: TargetShape, draft: DraftShape, work: Work) -> dict[str, float]:
    """Operations that one step cannot do without, by stage: matrix products and attention, nothing element-wise.

    The target runs up to the deepest captured layer and without its LM head; attention counts what is visible; the
    head counts its forward and the gradient of its input, for the slots that have a label. A backward of attention
    counts twice its forward: recomputing the scores is a choice.
    """
    depth = max(draft.target_layer_ids) + 1
    queries = target.heads * target.head_dim
    capture = depth * (2 * work.tokens * target.layer_active_parameters + 4 * queries * work.causal_pairs)

    hidden, layers = draft.hidden_size, draft.num_layers
    heads, kv_heads, head_dim = draft.num_attention_heads, draft.num_key_value_heads, draft.head_dim
    weights = attention_parameters(hidden, heads, kv_heads, head_dim) + 3 * hidden * draft.intermediate_size
    fuse = 2 * work.tokens * len(draft.target_layer_ids) * hidden * hidden
    context = layers * 2 * work.tokens * 2 * hidden * kv_heads * head_dim
    slots = layers * 2 * work.slots * weights
    attention = layers * 4 * heads * head_dim * work.visible_pairs
    logits = 2 * work.labels * hidden * draft.vocab_size
    return {
        "capture": capture,
        "propose": fuse + context + slots + attention,
        "loss": 2 * logits,
        # The features need no gradient, so `fc` has only that of its weight.
        "backward": fuse + 2 * (context + slots + attention),
    }
