"""What a training takes from a target, compared with the target itself: for the folder of a tiny model."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from dflash_dist.config import Config, DataConfig, DraftConfig, TargetConfig
from dflash_dist.draft.model import DFlashDraftModel
from dflash_dist.target.head import HeadGap, head_gap
from dflash_dist.target.load import load_ends, load_whole, read_info
from dflash_dist.target.tiny import tiny_tokenizer
from dflash_dist.target.warm_start import warm_start
from dflash_dist.training.setup import draft_shape

CPU = torch.device("cpu")
SIZES = {
    "vocab_size": 260,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "bos_token_id": None,
}


def save_lively(config: PreTrainedConfig, folder: Path) -> PreTrainedModel:
    """Writes a model of random weights, none of which is nought or one, and the tiny tokenizer."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return model


def compare_head(folder: Path) -> HeadGap:
    """The LM head that a training multiplies with, against the logits of the whole model."""
    info = read_info(str(folder))
    return head_gap(load_whole(info, torch.float32, CPU), load_ends(info, torch.float32, CPU).head)


def begin_draft(folder: Path, **changes: int) -> tuple[DFlashDraftModel, list[str]]:
    """A draft of two layers as `draft.init: target` begins it, and what is said of that.

    Raises:
        ValueError: the target is no Llama-like decoder.
    """
    info = read_info(str(folder))
    deepest = info.text.num_hidden_layers - 3
    config = Config(
        target=TargetConfig(path=str(folder), layer_ids=[0, deepest]),
        data=DataConfig(seq_len=16),
        draft=DraftConfig(mask_token_id=3, block_size=8, num_layers=2, **changes),
    )
    torch.manual_seed(7)
    draft = DFlashDraftModel(draft_shape(config, info.text, str(folder)))
    return draft, warm_start(draft, info)
