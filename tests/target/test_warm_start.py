"""What a draft begins as: the target's layers where a copy computes what they do, and what is said where not."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, Qwen2Config, Qwen3Config, SmolLM3Config

from dflash_dist.draft.kinds.dflash import DFlashDraftModel
from dflash_dist.target.load import read_info
from dflash_dist.target.warm_start import warm_start
from dflash_dist.training.setup import make_draft
from tests.ends import SIZES, begin_draft, save_lively
from tests.tiny import tiny_shape

BEGUN = "draft layers 0, 1 begin as the target's layers 4, 5"
RANDOM = "the draft begins with random weights, as with draft.init: random; of the target's layer 4, "
HEADS = {"head_dim": 16}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
BIASES = r"; it has self_attn\.q_proj\.bias, self_attn\.k_proj\.bias, self_attn\.v_proj\.bias besides"


def config_of(family: str, **changes: Any) -> Any:
    return getattr(transformers, f"{family}Config")(**SIZES | changes)


def as_random(draft: DFlashDraftModel) -> bool:
    """Whether the draft is as `draft.init: random` makes it."""
    torch.manual_seed(7)
    expected = DFlashDraftModel(draft.shape).state_dict()
    return all(torch.equal(tensor, expected[name]) for name, tensor in draft.state_dict().items())


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("Qwen3", HEADS),
        ("Llama", {}),
        ("Llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 5e5, "factor": 4.0}}),
        ("Qwen2", {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 5}),
    ],
    ids=["Qwen3", "Llama", "Llama-yarn", "Qwen2-sliding"],
)
def test_layers_and_norms_are_the_targets_to_the_bit(tmp_path: Path, family: str, changes: dict[str, Any]) -> None:
    model = save_lively(config_of(family, **changes), tmp_path)
    if family == "Qwen2":  # as Qwen2 is, but without what no draft has
        stored = load_file(tmp_path / "model.safetensors")
        for name in stored:
            stored[name] *= "bias" not in name
        save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    draft, said = begin_draft(tmp_path)
    assert said == [BEGUN]
    for ours, theirs in zip(draft.layers, model.model.layers[-2:]):
        for name, parameter in ours.named_parameters():
            if ("q_norm" not in name and "k_norm" not in name) or family == "Qwen3":
                assert torch.equal(parameter, theirs.get_parameter(name)), name
    assert torch.equal(draft.norm.weight, model.model.norm.weight)
    assert draft.shape.target_layer_ids[-1] == 3
    assert torch.equal(draft.hidden_norm.weight, model.model.layers[4].input_layernorm.weight)
    features = torch.randn(1, 3, 128)
    assert torch.equal(draft.fc(features), features[..., 64:])


def test_copied_layers_follow_the_whole_target(tmp_path: Path) -> None:
    """Against its own hidden states, on real tokens."""
    model = save_lively(config_of("Qwen3", **HEADS), tmp_path)
    draft, _ = begin_draft(tmp_path)
    states = model(input_ids=torch.arange(4, 34)[None], output_hidden_states=True).hidden_states

    def causal(query, _keys, _values, key, value):
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

    hidden, nothing = states[4], torch.zeros(1, 2, 0, 16)
    for layer in draft.layers:
        hidden = layer(hidden, draft._rope(torch.arange(30)[None]), (nothing, nothing), causal)
    torch.testing.assert_close(draft.norm(hidden), states[6], atol=1e-5, rtol=1e-5)


def test_norms_that_are_stored_less_one_are_copied_as_what_they_compute(tmp_path: Path) -> None:
    """Of a Gemma that but for them is a Llama."""
    gemma = config_of("Gemma", **HEADS, hidden_act="silu", hidden_activation="silu")
    model = save_lively(gemma, tmp_path)
    draft, said = begin_draft(tmp_path)
    assert said == [BEGUN]
    assert torch.equal(draft.norm.weight, 1 + model.model.norm.weight)
    assert torch.equal(draft.hidden_norm.weight, 1 + model.model.layers[4].input_layernorm.weight)
    assert torch.equal(
        draft.layers[1].post_attention_layernorm.weight, 1 + model.model.layers[5].post_attention_layernorm.weight
    )


@pytest.mark.parametrize(
    ("family", "changes", "why"),
    [
        ("Gemma", HEADS, r"a copy computes something else, off by 1\d\.\d\d%$"),
        ("Gemma3Text", HEADS, r"off by .*; it has pre_feedforward_layernorm\.weight, post_feedforward_layernorm"),
        ("Qwen2", {}, r"a copy computes something else, off by \d+\.\d\d%" + BIASES),
        ("Granite", {"residual_multiplier": 0.5, "attention_multiplier": 0.25}, r"something else, off by \d+\.\d\d%$"),
        ("Ernie4_5", HEADS, r"a copy computes something else, off by \d+\.\d\d%$"),  # rotates neighbours
        ("Olmo2", {}, r"which has no input_layernorm\.weight$"),
        ("Phi3", {}, r"which has no self_attn\.q_proj\.weight$"),
        ("Qwen3Moe", HEADS | EXPERTS | {"num_experts": 4}, r"which has no mlp\.gate_proj\.weight$"),
        ("GptOss", HEADS | {"num_experts_per_tok": 2, "num_local_experts": 4}, r"which has no mlp\.gate_proj\.weight$"),
        ("HunYuanDenseV1", HEADS, r"self_attn\.query_layernorm\.weight, self_attn\.key_layernorm\.weight besides$"),
        ("Mistral", {"sliding_window": 8}, r"a copy computes something else, off by \d+\.\d\d%$"),
    ],
)
def test_what_a_copy_would_not_compute_is_not_copied(tmp_path: Path, family: str, changes, why: str) -> None:
    save_lively(config_of(family, **changes), tmp_path)
    draft, (said,) = begin_draft(tmp_path)
    assert said.startswith(RANDOM)
    assert re.search(why, said), said
    assert as_random(draft)


def test_some_layers_may_be_copied_and_others_not(tmp_path: Path) -> None:
    """SmolLM3's layers without positions are no function that a draft's layer can be."""
    config = SmolLM3Config(**SIZES, no_rope_layers=[1, 1, 1, 1, 0, 1], no_rope_layer_interval=4)
    model = save_lively(config, tmp_path)
    draft, said = begin_draft(tmp_path)
    assert said[0] == "draft layers 1 begin as the target's layers 5"
    assert said[1].startswith(
        "draft layers 0 begin with random weights; of the target's layer 4, a copy computes something else, off by "
    )
    assert torch.equal(draft.layers[1].mlp.up_proj.weight, model.model.layers[5].mlp.up_proj.weight)
    torch.manual_seed(7)
    assert torch.equal(draft.layers[0].mlp.up_proj.weight, DFlashDraftModel(draft.shape).layers[0].mlp.up_proj.weight)


def test_quantised_weights_are_not_taken_for_numbers(tmp_path: Path) -> None:
    save_lively(Qwen3Config(**SIZES, **HEADS), tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    name = "model.layers.4.mlp.up_proj.weight"
    stored[name] = stored[name].to(torch.float8_e4m3fn)
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    _, said = begin_draft(tmp_path)
    assert said[1].endswith(f"has {name} quantised, as torch.float8_e4m3fn")


def test_a_target_without_head_norms_sets_the_size_of_its_heads(tmp_path: Path) -> None:
    model = save_lively(LlamaConfig(**SIZES), tmp_path)
    draft, _ = begin_draft(tmp_path)
    # On white input of unit size, a normalised and rescaled head is as large as the target's own.
    white = torch.randn(4000, 64) * model.model.layers[-1].input_layernorm.weight
    for name in ("q", "k"):
        theirs = getattr(model.model.layers[-1].self_attn, f"{name}_proj")(white).pow(2).mean().sqrt()
        norm = getattr(draft.layers[-1].self_attn, f"{name}_norm").weight
        assert torch.all(norm == norm[0])
        assert abs(norm[0] / theirs - 1) < 0.02


def test_sizes_that_the_config_states_otherwise_are_refused(tiny_target: Path) -> None:
    draft = DFlashDraftModel(tiny_shape(intermediate_size=32))
    with pytest.raises(
        ValueError, match=r"the target's shapes: layers\.4\.mlp.*; leave draft\.intermediate_size unset"
    ):
        warm_start(draft, read_info(str(tiny_target)))


def test_more_layers_than_the_target_has_are_refused(tiny_target: Path) -> None:
    with pytest.raises(ValueError, match="at most 6 draft layers"):
        warm_start(DFlashDraftModel(tiny_shape(num_layers=7)), read_info(str(tiny_target)))


def test_a_run_says_what_its_draft_begins_as(debug_config, tmp_path: Path) -> None:
    save_lively(Qwen2Config(**SIZES), tmp_path / "target")
    config = debug_config(f"target.path={tmp_path / 'target'}", "draft.init=target")
    _, said = make_draft(config, read_info(config.target.path))
    assert said[0].startswith(RANDOM)
