from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3MoeConfig

from dflash_dist.draft.model import DFlashDraftModel
from dflash_dist.target.load import read_info
from dflash_dist.target.tiny import tiny_tokenizer
from dflash_dist.target.warm_start import warm_start
from tests.tiny import tiny_shape


def test_the_targets_top_layers_are_copied(tiny_target) -> None:
    draft, target = DFlashDraftModel(tiny_shape()), AutoModelForCausalLM.from_pretrained(tiny_target).model
    warm_start(draft, read_info(str(tiny_target)))
    for ours, theirs in zip(draft.layers, target.layers[-2:]):
        for name, parameter in ours.named_parameters():
            assert torch.equal(parameter, theirs.get_parameter(name)), name
    assert torch.equal(draft.norm.weight, target.norm.weight)
    assert torch.equal(draft.hidden_norm.weight, target.layers[5].input_layernorm.weight)


def test_the_context_begins_as_the_deepest_captured_layer(tiny_target) -> None:
    draft = DFlashDraftModel(tiny_shape())
    warm_start(draft, read_info(str(tiny_target)))
    features = torch.randn(1, 3, 192)
    assert torch.equal(draft.fc(features), features[..., 128:])


def test_a_target_without_head_norms_sets_the_size_of_its_heads(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(**{**SIZES, "num_attention_heads": 4, "head_dim": 16})
    model = AutoModelForCausalLM.from_config(config)
    save(model, tmp_path)
    draft = DFlashDraftModel(tiny_shape(rms_norm_eps=config.rms_norm_eps))
    warm_start(draft, read_info(str(tmp_path)))
    # On white input of unit size, a normalised and rescaled head is as large as the target's own.
    white = torch.randn(4000, 64)
    for name in ("q", "k"):
        theirs = getattr(model.model.layers[-1].self_attn, f"{name}_proj")(white).pow(2).mean().sqrt()
        norm = getattr(draft.layers[-1].self_attn, f"{name}_norm").weight
        assert torch.all(norm == norm[0])
        assert abs(norm[0] / theirs - 1) < 0.02


def test_shapes_that_differ_from_the_targets_are_refused(tiny_target) -> None:
    draft = DFlashDraftModel(tiny_shape(intermediate_size=32))
    with pytest.raises(ValueError, match=r"draft.init: target needs the target's shapes: layers\.4\.mlp"):
        warm_start(draft, read_info(str(tiny_target)))


def test_more_layers_than_the_target_has_are_refused(tiny_target) -> None:
    with pytest.raises(ValueError, match="at most 6 draft layers"):
        warm_start(DFlashDraftModel(tiny_shape(num_layers=7)), read_info(str(tiny_target)))


def test_a_mixture_of_experts_is_refused(tmp_path: Path) -> None:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1}
    save(AutoModelForCausalLM.from_config(Qwen3MoeConfig(**SIZES, **experts, head_dim=16)), tmp_path)
    with pytest.raises(ValueError, match="needs a dense Llama- or Qwen-like target"):
        warm_start(DFlashDraftModel(tiny_shape()), read_info(str(tmp_path)))


SIZES = {
    "vocab_size": 260,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "bos_token_id": None,
}


def save(model, folder: Path) -> None:
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
