"""The contract is written out here by hand, from what z-lab/dflash, vLLM and SGLang read: nothing is computed with the
package's own tables, which would agree with themselves whatever they said."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3MLP,
    Qwen3RMSNorm,
    Qwen3RotaryEmbedding,
    apply_rotary_pos_emb,
    repeat_kv,
)

from dflash_dist.contract import folder as module
from dflash_dist.contract.folder import find_draft, from_config, read_draft, refuse_mismatch, write_draft
from dflash_dist.draft.kinds.dflash import DFlashDraftModel
from dflash_dist.draft.layers import ContextCache
from tests.tiny import tiny_shape

CPU = torch.device("cpu")

# No two sizes agree, and no value is a default of Qwen3Config: a swapped or forgotten key shows.
SHAPE = {
    "hidden_size": 24,
    "num_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 40,
    "rms_norm_eps": 0.01,
    "rope_theta": 5000.0,
    "block_size": 5,
    "mask_token_id": 90,
    "target_layer_ids": [0, 3, 4],
    "num_target_layers": 7,
    "vocab_size": 97,
    "max_position_embeddings": 512,
}

SEES = {"layer_types": None, "sliding_window": None, "is_causal": False}  # all, in both directions

CONFIG = {
    "architectures": ["DFlashDraftModel"],
    "model_type": "qwen3",
    "dtype": "float32",
    "block_size": 5,
    "num_target_layers": 7,
    "dflash_config": {"mask_token_id": 90, "target_layer_ids": [0, 3, 4], "block_size": 5, "causal": False},
    "num_hidden_layers": 2,
    "layer_types": ["full_attention", "full_attention"],
    "is_causal": False,
    "hidden_size": 24,
    "vocab_size": 97,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 40,
    "hidden_act": "silu",
    "rms_norm_eps": 0.01,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "max_position_embeddings": 512,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
    "rope_theta": 5000.0,
    "tie_word_embeddings": False,
}

TENSORS = {
    "fc.weight": (24, 72),
    "hidden_norm.weight": (24,),
    "norm.weight": (24,),
    "layers.0.input_layernorm.weight": (24,),
    "layers.0.post_attention_layernorm.weight": (24,),
    "layers.0.self_attn.q_proj.weight": (48, 24),
    "layers.0.self_attn.k_proj.weight": (16, 24),
    "layers.0.self_attn.v_proj.weight": (16, 24),
    "layers.0.self_attn.o_proj.weight": (24, 48),
    "layers.0.self_attn.q_norm.weight": (8,),
    "layers.0.self_attn.k_norm.weight": (8,),
    "layers.0.mlp.gate_proj.weight": (40, 24),
    "layers.0.mlp.up_proj.weight": (40, 24),
    "layers.0.mlp.down_proj.weight": (24, 40),
    "layers.1.input_layernorm.weight": (24,),
    "layers.1.post_attention_layernorm.weight": (24,),
    "layers.1.self_attn.q_proj.weight": (48, 24),
    "layers.1.self_attn.k_proj.weight": (16, 24),
    "layers.1.self_attn.v_proj.weight": (16, 24),
    "layers.1.self_attn.o_proj.weight": (24, 48),
    "layers.1.self_attn.q_norm.weight": (8,),
    "layers.1.self_attn.k_norm.weight": (8,),
    "layers.1.mlp.gate_proj.weight": (40, 24),
    "layers.1.mlp.up_proj.weight": (40, 24),
    "layers.1.mlp.down_proj.weight": (24, 40),
}


@pytest.fixture
def shape():
    return tiny_shape(**SHAPE)


@pytest.fixture
def draft(shape):
    """All parameters random, the norms too: ones would hide a norm that is swapped or left out."""
    torch.manual_seed(0)
    draft = DFlashDraftModel(shape).requires_grad_(False)
    for parameter in draft.parameters():
        parameter.normal_(std=0.3) if parameter.ndim == 2 else parameter.uniform_(0.5, 2)
    return draft


@pytest.fixture
def folder(tmp_path, shape, draft):
    write_draft(tmp_path / "draft", DFlashDraftModel, shape, draft.state_dict(), "float32")
    return tmp_path / "draft"


# ---- what is written ----


def test_config_json_has_the_keys_and_values_that_engines_read(folder):
    assert json.loads((folder / "config.json").read_text()) == CONFIG


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_config_names_the_dtype_of_the_weights(tmp_path, shape, draft, dtype):
    write_draft(tmp_path, DFlashDraftModel, shape, draft.state_dict(), dtype)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == dtype
    assert {tensor.dtype for tensor in load_file(tmp_path / "model.safetensors").values()} == {getattr(torch, dtype)}


def test_the_weights_file_has_exactly_the_published_names_and_shapes(folder):
    assert len(TENSORS) == 2 * 11 + 3
    found = {name: tuple(tensor.shape) for name, tensor in load_file(folder / "model.safetensors").items()}
    assert found == TENSORS


def test_the_weights_say_that_they_are_from_torch_and_how_they_were_trained(folder):
    with safe_open(folder / "model.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata.pop("format") == "pt"  # transformers refuses to load safetensors without this
    assert {key: json.loads(value) for key, value in metadata.items()} == {"dflash_shape": SHAPE | SEES}


def test_a_draft_folder_is_just_config_and_weights(folder):
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]


# ---- what is read ----


def test_a_draft_comes_back_bitwise_in_float32(folder, shape, draft):
    loaded = read_draft(folder, torch.float32, CPU)
    assert loaded.shape == shape
    assert not loaded.training
    ours = draft.state_dict()
    assert loaded.state_dict().keys() == ours.keys()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, ours[name]), name
        assert tensor.dtype == torch.float32 and not tensor.requires_grad


def test_bfloat16_rounds_once_and_to_nearest(tmp_path, shape, draft):
    write_draft(tmp_path, DFlashDraftModel, shape, draft.state_dict(), "bfloat16")
    rounded = {name: tensor.to(torch.bfloat16) for name, tensor in draft.state_dict().items()}
    assert any(not torch.equal(rounded[name].float(), tensor) for name, tensor in draft.state_dict().items())
    for dtype in (torch.float32, torch.bfloat16):
        for name, tensor in read_draft(tmp_path, dtype, CPU).state_dict().items():
            assert tensor.dtype == dtype
            assert torch.equal(tensor, rounded[name].to(dtype)), name


def test_a_config_with_only_the_older_rope_key_is_read(shape):
    assert from_config({key: value for key, value in CONFIG.items() if key != "rope_parameters"}) == shape


def test_the_newer_rope_key_is_enough(shape):
    assert from_config({key: value for key, value in CONFIG.items() if key != "rope_theta"}) == shape


def test_weights_in_several_files_are_read(folder, draft):
    names = sorted(TENSORS)
    files = {"model-1.safetensors": names[:7], "model-2.safetensors": names[7:]}
    for file, part in files.items():
        save_file({name: draft.state_dict()[name] for name in part}, folder / file)
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {name: file for file, part in files.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    loaded = read_draft(folder, torch.float32, CPU).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in draft.state_dict().items())
    (folder / "model-2.safetensors").unlink()
    with pytest.raises(ValueError, match=r"holds no model-2\.safetensors"):
        read_draft(folder, torch.float32, CPU)


def test_what_dflash_config_holds_may_stand_at_the_top_level(shape):
    config = {key: value for key, value in CONFIG.items() if key != "dflash_config"}
    assert from_config({**config, **CONFIG["dflash_config"]}) == shape
    assert from_config({key: value for key, value in CONFIG.items() if key != "block_size"}) == shape
    # what stands inside comes first
    assert from_config(CONFIG | {"block_size": 16, "mask_token_id": 7, "rope_theta": 5.0}) == shape


# ---- what is refused ----


def _without(tensors, name):
    return {key: tensor for key, tensor in tensors.items() if key != name}


@pytest.mark.parametrize("name", TENSORS)
def test_a_missing_tensor_is_refused_by_name(shape, draft, name):
    # vLLM would fill it with whatever memory held
    with pytest.raises(ValueError, match=rf"(^|\W){name} is missing"):
        refuse_mismatch(_without(draft.state_dict(), name), DFlashDraftModel, shape)


@pytest.mark.parametrize(
    "name",
    [
        "embed_tokens.weight",
        "lm_head.weight",
        "rotary_emb.inv_freq",
        "model.norm.weight",
        "layers.2.input_layernorm.weight",
        "layers.0.self_attn.q_proj.bias",
    ],
)
def test_a_tensor_too_many_is_refused_by_name(shape, draft, name):
    with pytest.raises(ValueError, match=f"{name} does not belong into a draft"):
        refuse_mismatch({**draft.state_dict(), name: torch.zeros(24)}, DFlashDraftModel, shape)


def test_a_model_prefix_is_refused(shape, draft):
    prefixed = {f"model.{name}": tensor for name, tensor in draft.state_dict().items()}
    with pytest.raises(
        ValueError, match=r": fc\.weight is missing; .*; model\.fc\.weight does not belong into a draft"
    ):
        refuse_mismatch(prefixed, DFlashDraftModel, shape)


def test_a_wrong_shape_is_refused_with_both_shapes(shape, draft):
    tensors = {**draft.state_dict(), "fc.weight": torch.zeros(24, 48)}
    with pytest.raises(ValueError, match=r"fc\.weight is \[24, 48\], not \[24, 72\]"):
        refuse_mismatch(tensors, DFlashDraftModel, shape)


@pytest.mark.parametrize(
    "ids",
    [[4, 3, 0], [0, 3, 3], [0, 3, 6], [-1, 3, 4], [0, 3, 7]],
    ids=["reversed", "repeated", "last layer", "negative", "beyond the target"],
)
def test_layer_ids_that_engines_would_sort_or_misread_are_refused(tmp_path, ids):
    # vLLM sorts them, and engines disagree on whether the last layer's output is normalised
    shape = tiny_shape(**{**SHAPE, "target_layer_ids": ids})
    with pytest.raises(ValueError) as refusal:
        write_draft(tmp_path / "draft", DFlashDraftModel, shape, DFlashDraftModel(shape).state_dict(), "float32")
    assert f"target_layer_ids {ids}" in str(refusal.value)


def test_a_draft_without_layer_ids_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({**CONFIG, "dflash_config": {**CONFIG["dflash_config"], "target_layer_ids": []}})
    )
    save_file({"norm.weight": torch.zeros(24)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="target_layer_ids"):
        read_draft(tmp_path, torch.float32, CPU)


@pytest.mark.parametrize("mask_token_id", [97, 1000, -1])
def test_a_mask_token_outside_the_vocabulary_is_refused(draft, mask_token_id):
    shape = tiny_shape(**{**SHAPE, "mask_token_id": mask_token_id})
    with pytest.raises(ValueError, match=f"mask_token_id {mask_token_id} is outside the vocabulary of 97"):
        refuse_mismatch(draft.state_dict(), DFlashDraftModel, shape)


def test_all_faults_are_named_at_once(shape, draft):
    tensors = {**_without(draft.state_dict(), "norm.weight"), "embed_tokens.weight": torch.zeros(97, 24)}
    with pytest.raises(ValueError, match=r"embed_tokens\.weight does not belong.*; norm\.weight is missing"):
        refuse_mismatch(tensors, DFlashDraftModel, shape)


def test_a_refused_draft_leaves_no_folder(tmp_path, shape, draft):
    with pytest.raises(ValueError, match="is missing"):
        write_draft(tmp_path / "draft", DFlashDraftModel, shape, _without(draft.state_dict(), "fc.weight"), "float32")
    assert not (tmp_path / "draft").exists()


def test_reading_checks_the_tensors_too(folder, draft):
    save_file(_without(draft.state_dict(), "layers.1.mlp.up_proj.weight"), folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.weight is missing"):
        read_draft(folder, torch.float32, CPU)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path / 'nowhere'} holds no config.json"):
        read_draft(tmp_path / "nowhere", torch.float32, CPU)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(ValueError, match=f"{folder} holds no {name}"):
        read_draft(folder, torch.float32, CPU)


@pytest.mark.parametrize("key", ["num_target_layers", "head_dim", "vocab_size"])
def test_a_missing_config_key_is_named(folder, key):
    (folder / "config.json").write_text(json.dumps({name: CONFIG[name] for name in CONFIG if name != key}))
    with pytest.raises(ValueError, match=f"no key '{key}'"):
        read_draft(folder, torch.float32, CPU)


@pytest.mark.parametrize("key", ["block_size", "mask_token_id", "target_layer_ids"])
def test_a_missing_key_of_dflash_config_is_named(key):
    inner = {name: value for name, value in CONFIG["dflash_config"].items() if name != key}
    config = {name: value for name, value in CONFIG.items() if name != key}
    with pytest.raises(ValueError, match=f"no key '{key}'"):
        from_config({**config, "dflash_config": inner})


def test_a_config_without_dflash_config_is_refused():
    with pytest.raises(ValueError, match="no key 'mask_token_id'"):
        from_config({key: value for key, value in CONFIG.items() if key != "dflash_config"})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", "24"),
        ("head_dim", 8.5),
        ("rms_norm_eps", "1e-6"),
        ("vocab_size", None),
        ("num_target_layers", True),
    ],
)
def test_a_value_of_the_wrong_kind_is_named(key, value):
    with pytest.raises(ValueError, match=f"{key} in the draft's config.json is {value!r}, which is no "):
        from_config({**CONFIG, key: value})


@pytest.mark.parametrize("ids", [3, [0, "3"], None])
def test_layer_ids_that_are_no_integers_are_named(ids):
    inner = {**CONFIG["dflash_config"], "target_layer_ids": ids}
    with pytest.raises(ValueError, match=r"target_layer_ids in .* which is no list\[int\]"):
        from_config({**CONFIG, "dflash_config": inner})


def test_objects_must_be_objects():
    for key in ("dflash_config", "rope_parameters"):
        with pytest.raises(ValueError, match="must be JSON objects"):
            from_config({**CONFIG, key: [1]})


@pytest.mark.parametrize(("text", "fault"), [("{", "is not JSON"), ("[]", "holds no JSON object")])
def test_a_config_that_cannot_be_read_is_named(folder, text, fault):
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match=f"{folder / 'config.json'} {fault}"):
        read_draft(folder, torch.float32, CPU)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"hidden_act": "gelu"}, "hidden_act gelu"),
        ({"attention_bias": True}, "attention_bias True"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling {'rope_type': 'yarn'}"),
        (
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0}},
            "rope_type linear; factor 2.0",
        ),
        ({"dflash_config": {**CONFIG["dflash_config"], "attention_sink_bias": True}}, "attention_sink_bias True"),
    ],
)
def test_a_draft_that_computes_something_else_is_refused(folder, change, named):
    # decoded as if it were ours, it would show a low acceptance that it does not have in engines
    (folder / "config.json").write_text(json.dumps({**CONFIG, **change}))
    with pytest.raises(ValueError, match=f"may serve but this program cannot: {re.escape(named)}$"):
        read_draft(folder, torch.float32, CPU)


# ---- what an engine makes of it ----


class PublishedAttention(nn.Module):
    """As the published class attends: queries from the block; keys and values from context and block together, which
    share projections, key norm and rotary embedding; no mask."""

    def __init__(self, config):
        super().__init__()
        hidden, bias = config.hidden_size, config.attention_bias
        self.head_dim = config.head_dim
        self.groups = config.num_attention_heads // config.num_key_value_heads
        self.q_proj = nn.Linear(hidden, config.num_attention_heads * config.head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden, config.num_key_value_heads * config.head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden, config.num_key_value_heads * config.head_dim, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * config.head_dim, hidden, bias=bias)
        self.q_norm = Qwen3RMSNorm(config.head_dim, eps=config.rms_norm_eps)
        self.k_norm = Qwen3RMSNorm(config.head_dim, eps=config.rms_norm_eps)

    def forward(self, block, context, cos, sin):
        both, slots = torch.cat([context, block], dim=1), block.shape[1]
        query = self.q_norm(self._heads(self.q_proj(block))).transpose(1, 2)
        key = self.k_norm(self._heads(self.k_proj(both))).transpose(1, 2)
        value = self._heads(self.v_proj(both)).transpose(1, 2)
        query, _ = apply_rotary_pos_emb(query, query, cos[:, -slots:], sin[:, -slots:])
        key, _ = apply_rotary_pos_emb(key, key, cos, sin)
        scores = query @ repeat_kv(key, self.groups).transpose(2, 3) * self.head_dim**-0.5
        mixed = scores.softmax(dim=-1) @ repeat_kv(value, self.groups)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))

    def _heads(self, projected):
        return projected.view(*projected.shape[:2], -1, self.head_dim)


class PublishedLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.self_attn = PublishedAttention(config)
        self.mlp = Qwen3MLP(config)
        self.input_layernorm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, block, context, cos, sin):
        block = block + self.self_attn(self.input_layernorm(block), context, cos, sin)
        return block + self.mlp(self.post_attention_layernorm(block))


class PublishedDraft(nn.Module):
    """What the published z-lab class computes, written anew from transformers' Qwen3 modules."""

    def __init__(self, config):
        super().__init__()
        captured = len(config.dflash_config["target_layer_ids"])
        assert len(config.layer_types) == config.num_hidden_layers
        self.layers = nn.ModuleList(PublishedLayer(config) for _ in range(config.num_hidden_layers))
        self.fc = nn.Linear(captured * config.hidden_size, config.hidden_size, bias=False)
        self.hidden_norm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.norm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = Qwen3RotaryEmbedding(config)

    def forward(self, block, features):
        context = self.hidden_norm(self.fc(features))
        cos, sin = self.rotary_emb(block, torch.arange(features.shape[1] + block.shape[1])[None])
        for layer in self.layers:
            block = layer(block, context, cos, sin)
        return self.norm(block)


@pytest.fixture
def published(folder):
    model = PublishedDraft(Qwen3Config.from_pretrained(folder)).requires_grad_(False)
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    return model


def test_transformers_reads_the_config_as_qwen3(folder):
    config = AutoConfig.from_pretrained(folder)
    assert type(config) is Qwen3Config
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 5000.0}
    assert (config.rms_norm_eps, config.head_dim, config.hidden_act) == (0.01, 8, "silu")
    assert config.layer_types == ["full_attention"] * 2
    assert (config.block_size, config.num_target_layers) == (5, 7)
    assert config.dflash_config == CONFIG["dflash_config"] and config.is_causal is False
    assert config.architectures == ["DFlashDraftModel"]


@pytest.mark.parametrize("length", [1, 9, 300])
def test_the_published_model_computes_what_ours_computes(draft, published, length):
    torch.manual_seed(length)
    features, block = torch.randn(1, length, 72), torch.randn(1, 5, 24)
    cache = ContextCache()
    draft.extend(cache, features[:, : length // 2 + 1])
    if length > 1:
        draft.extend(cache, features[:, length // 2 + 1 :])
    ours = draft.foresee(cache, block)
    torch.testing.assert_close(ours, published(block, features), rtol=0, atol=1e-5)


def test_a_mistyped_folder_and_a_target_are_no_drafts(tmp_path, monkeypatch):
    asked = []

    def snapshot_download(name: str, allow_patterns: list[str]) -> str:
        asked.append(name)
        if name != "drafts/of-the-hub":
            raise FileNotFoundError("no such repository")
        return str(tmp_path / "cached")

    monkeypatch.setattr(module, "snapshot_download", snapshot_download)
    (tmp_path / "drafts/mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    # An organisation of the hub whose other drafts lie here in a folder of its name.
    assert find_draft("drafts/of-the-hub") == tmp_path / "cached" and asked == ["drafts/of-the-hub"]
    with pytest.raises(ValueError, match="there is no draft folder drafts/mien: in drafts are mine"):
        find_draft("drafts/mien")
    (tmp_path / "drafts/mine/config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    with pytest.raises(ValueError, match=r"drafts/mine holds \['LlamaForCausalLM'\], which is no draft"):
        read_draft(find_draft("drafts/mine"), torch.float32, CPU)
