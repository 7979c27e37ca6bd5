"""Which stored tensor is which parameter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, LlavaConfig, Qwen3Config, Qwen3MoeConfig, Qwen3NextConfig

from dflash_dist.target.checkpoint import Checkpoint
from tests.ends import SIZES, save_lively


def test_an_end_that_several_names_share_is_no_name(tmp_path: Path) -> None:
    """A hybrid's linear layers have a `norm.weight` too, and come first."""
    config = Qwen3NextConfig(**SIZES, head_dim=16, num_experts=2, num_experts_per_tok=1, linear_num_value_heads=2)
    model = save_lively(config, tmp_path)
    stored = Checkpoint(str(tmp_path), "main", model)
    for name in ("model.norm.weight", "model.layers.0.linear_attn.norm.weight", "lm_head.weight"):
        assert torch.equal(stored.read(name), model.get_parameter(name))
    with pytest.raises(ValueError, match=r"the checkpoint of .* has no tensor norm\.weight"):
        stored.read("norm.weight")


def test_renamed_tensors_of_a_wrapper_are_those_of_its_decoder(tmp_path: Path) -> None:
    """In the layout of older checkpoints, where the vision tower's attention has the decoder's names."""
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config={"model_type": "clip_vision_model", "image_size": 28, "patch_size": 14, **vision},
        text_config={"model_type": "llama", **SIZES},
        image_token_id=259,
    )
    model = AutoModelForImageTextToText.from_config(config)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def older(name: str) -> str:
        if name.startswith("model.language_model."):
            return name.replace("model.language_model.", "language_model.model.")
        return "language_model.lm_head.weight" if name == "lm_head.weight" else name.removeprefix("model.")

    save_file({older(name): tensor for name, tensor in state.items()}, tmp_path / "model.safetensors")
    stored = Checkpoint(str(tmp_path), "main", model)
    for name in ("layers.0.self_attn.q_proj.weight", "norm.weight", "layers.5.input_layernorm.weight"):
        assert torch.equal(stored.read(f"model.language_model.{name}"), state[f"model.language_model.{name}"])
    assert torch.equal(stored.read("lm_head.weight"), state["lm_head.weight"])


def test_two_tensors_of_one_parameter_are_named(tmp_path: Path) -> None:
    model = save_lively(Qwen3Config(**SIZES), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["norm.weight"] = torch.zeros(64)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"makes model\.norm\.weight from model\.norm\.weight, norm\.weight$"):
        Checkpoint(str(tmp_path), "main", model).read("model.norm.weight")


def test_what_is_made_from_parts_is_not_read_as_one(tmp_path: Path) -> None:
    model = save_lively(Qwen3MoeConfig(**SIZES, num_experts=2, num_experts_per_tok=1), tmp_path)
    with pytest.raises(
        ValueError, match=r"makes model\.layers\.0\.mlp\.experts\.down_proj from .*experts\.0\.down_proj"
    ):
        Checkpoint(str(tmp_path), "main", model).read("model.layers.0.mlp.experts.down_proj")


def test_tensors_are_found_in_shards_and_without_prefix(tmp_path: Path) -> None:
    model = save_lively(Qwen3Config(**SIZES), tmp_path)
    model.model.save_pretrained(tmp_path / "bare", max_shard_size="200KB")
    assert len(list((tmp_path / "bare").glob("*.safetensors"))) > 2
    stored = Checkpoint(str(tmp_path / "bare"), "main", model)
    for name, parameter in model.model.named_parameters():
        assert torch.equal(stored.read(f"model.{name}"), parameter)


def test_a_folder_without_safetensors_is_named(tmp_path: Path) -> None:
    model = save_lively(Qwen3Config(**SIZES), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="has no safetensors files"):
        Checkpoint(str(tmp_path), "main", model)
