"""The speculators library's layout, written out by hand from what version 0.9.0 saves and vLLM 0.32 reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dflash_dist.contract import folder as module
from dflash_dist.contract.folder import find_draft, read_draft, read_kind, write_draft
from dflash_dist.draft.kinds.dflash import DFlashDraftModel
from tests.contract.test_folder import SHAPE, TENSORS
from tests.tiny import tiny_shape

CPU = torch.device("cpu")
CONFIG = {
    "architectures": ["DFlashDraftModel"],
    "dtype": "bfloat16",
    "block_size": 5,
    "num_target_layers": 7,  # not of the format, which lets other keys be
    "speculators_model_type": "dflash",
    "speculators_version": "0.9.0",
    "speculators_config": {
        "algorithm": "dflash",
        "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": 4}],
        "default_proposal_method": "greedy",
        "verifier": {"name_or_path": "org/target", "architectures": ["Qwen3ForCausalLM"]},
    },
    "transformer_layer_config": {
        "model_type": "qwen3",
        "num_hidden_layers": 2,
        "layer_types": ["full_attention", "full_attention"],
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
    },
    "draft_vocab_size": 97,
    "mask_token_id": 90,
    "aux_hidden_state_layer_ids": [1, 4, 5],  # the embedding counts as 0: the outputs of layers 0, 3 and 4
    "sample_from_anchor": False,
    "sliding_window_non_causal": True,  # false, the library's default, makes vLLM's full attention causal
    "tie_word_embeddings": False,
}


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    shape = tiny_shape(**SHAPE)
    tensors = DFlashDraftModel(shape).state_dict()
    write_draft(tmp_path / "draft", DFlashDraftModel, shape, tensors, "bfloat16", ("org/target", ["Qwen3ForCausalLM"]))
    return tmp_path / "draft"


def rewrite(folder: Path, without: str = "", **changes) -> None:
    config = {key: value for key, value in (CONFIG | changes).items() if key != without}
    (folder / "config.json").write_text(json.dumps(config))


def test_the_config_is_the_librarys_and_the_tensors_are_the_published_ones(folder):
    assert json.loads((folder / "config.json").read_text()) == CONFIG
    tensors = load_file(folder / "model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == TENSORS


def test_the_draft_comes_back(folder):
    draft = read_draft(folder, torch.bfloat16, CPU)
    assert draft.shape == tiny_shape(**SHAPE)
    stored = load_file(folder / "model.safetensors")
    assert all(torch.equal(tensor, stored[name]) for name, tensor in draft.state_dict().items())


def test_a_draft_of_the_library_is_read_once_the_targets_depth_is_known(folder):
    rewrite(folder, without="num_target_layers", architectures=["DFlashSpeculator"], sliding_window_non_causal=False)
    with pytest.raises(ValueError, match="no key 'num_target_layers'"):
        read_kind(folder)
    assert read_kind(folder, target_layers=7) == (DFlashDraftModel, tiny_shape(**SHAPE))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"sample_from_anchor": True}, "sample_from_anchor True"),
        ({"draft_vocab_size": 64}, "draft_vocab_size 64"),
        ({"speculators_model_type": "xpress"}, "speculator of type 'xpress'"),
        ({"transformer_layer_config": None}, "needs transformer_layer_config"),
        ({"aux_hidden_state_layer_ids": None}, "aux_hidden_state_layer_ids, a list"),
        ({"aux_hidden_state_layer_ids": [1, "4"]}, "aux_hidden_state_layer_ids, a list"),
        ({"mask_token_id": None}, "mask_token_id in .*config.json is None"),
    ],
)
def test_another_kind_of_draft_is_refused_by_what_makes_it_one(folder, changes, named):
    rewrite(folder, **changes)
    with pytest.raises(ValueError, match=named):
        read_draft(folder, torch.float32, CPU)


def test_a_hub_id_is_downloaded_without_what_a_draft_does_not_need(monkeypatch, tmp_path):
    asked = []

    def snapshot_download(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        if name == "org/gone":
            raise FileNotFoundError("no such repository")
        return str(tmp_path / "cached")

    monkeypatch.setattr(module, "snapshot_download", snapshot_download)
    assert find_draft("org/draft") == tmp_path / "cached"
    assert asked == [("org/draft", ["*.json", "*.safetensors", "mask_embedding.pt"])]
    assert find_draft(str(tmp_path)) == tmp_path
    assert find_draft("nowhere") == Path("nowhere")
    assert len(asked) == 1
    with pytest.raises(ValueError, match="draft org/gone could not be read, neither as a folder nor from the hub"):
        find_draft("org/gone")
