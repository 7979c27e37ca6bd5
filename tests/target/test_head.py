"""The LM head and embedding that a training takes are those that the whole target computes with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, PhiConfig, Qwen3VLConfig

from dflash_dist.target.head import check_head, head_gap
from dflash_dist.target.load import check_loading, load_ends, load_target, load_whole, read_info
from dflash_dist.target.tiny import tiny_tokenizer
from dflash_dist.training.trainer import Trainer
from tests.ends import CPU, SIZES, compare_head, save_lively
from tests.families import family
from tests.tiny import target_of

ALL_FAMILIES = ["Qwen3", "Qwen2", "Llama", "Gemma", "Olmo2", "Phi3", "Qwen3Moe", "GptOss"]
EXPERTS = {
    "Qwen3Moe": {"num_experts": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "GptOss": {"num_local_experts": 2, "num_experts_per_tok": 2},
}


def ends_of(folder: Path, alone) -> tuple[torch.Tensor, ...]:
    """Embedding and head as both ways of a training give them, which must be the same, and the whole model's."""
    info = read_info(str(folder))
    target, ends = load_target(info, target_of([1]), alone), load_ends(info, torch.float32, CPU)
    whole = load_whole(info, torch.float32, CPU)
    own = whole.get_input_embeddings().weight, whole.get_output_embeddings().weight
    for ours, stored, theirs in zip((target.embedding, target.head), (ends.embedding, ends.head), own):
        assert torch.equal(ours, theirs) and torch.equal(stored, theirs)
    assert (target.head is target.embedding) is (ends.head is ends.embedding) is (own[0] is own[1])
    assert compare_head(folder).error == 0
    return own


@pytest.mark.parametrize("family", ["Qwen3", "Llama"])
@pytest.mark.parametrize("stored", ["its own", "the embedding", "none"])
def test_the_weights_decide_where_the_config_says_tied(tmp_path: Path, alone, family: str, stored: str) -> None:
    config = getattr(transformers, f"{family}Config")(**SIZES)
    model = save_lively(config, tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(written | {"tie_word_embeddings": True}))
    tensors = load_file(tmp_path / "model.safetensors")
    if stored == "the embedding":
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    if stored == "none":
        del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    embedding, head = ends_of(tmp_path, alone)
    assert (head is embedding) is (stored != "its own")
    if stored == "its own":
        assert torch.equal(head, model.lm_head.weight)


@pytest.mark.parametrize("outer", [False, True])
def test_a_wrapper_and_its_decoder_may_disagree_whether_the_head_is_tied(tmp_path: Path, alone, outer: bool) -> None:
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 64}
    config = Qwen3VLConfig(
        vision_config=vision | {"deepstack_visual_indexes": [0], "num_position_embeddings": 16},
        text_config={**SIZES, "head_dim": 16, "tie_word_embeddings": not outer},
        tie_word_embeddings=outer,
    )
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    embedding, head = ends_of(tmp_path, alone)
    assert (head is embedding) is outer


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_the_states_times_the_head_are_the_targets_logits(tmp_path: Path, family: str) -> None:
    save_lively(getattr(transformers, f"{family}Config")(**SIZES, **EXPERTS.get(family, {})), tmp_path)
    assert compare_head(tmp_path).error < 1e-6
    for dtype in (torch.float32, torch.bfloat16):
        assert load_ends(read_info(str(tmp_path)), dtype, CPU).note == ""


@pytest.mark.parametrize(
    ("family", "changes", "error"),
    [("Granite", {"logits_scaling": 8.0}, (2.0, 6.0)), ("Gemma2", {"final_logit_softcapping": 5.0}, (1.0, 6.0))],
)
def test_scaled_and_capped_logits_are_told_and_nothing_else(
    debug_config, tmp_path: Path, alone, capsys, family: str, changes: dict[str, Any], error: tuple[float, float]
) -> None:
    save_lively(getattr(transformers, f"{family}Config")(**SIZES, head_dim=16, **changes), tmp_path / "target")
    gap = compare_head(tmp_path / "target")
    assert error[0] < gap.error < error[1] and gap.same_order
    note = f"{tmp_path / 'target'} scales or caps the logits of its LM head; "
    for dtype in (torch.float32, torch.bfloat16):
        assert load_ends(read_info(str(tmp_path / "target")), dtype, CPU).note.startswith(note)
    Trainer(debug_config(f"target.path={tmp_path / 'target'}"), alone)
    assert capsys.readouterr().out.count(note) == 1


def test_another_head_is_refused(tmp_path: Path) -> None:
    model = save_lively(transformers.Qwen3Config(**SIZES), tmp_path)
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert check_head("it", model, head) == ""
    assert not head_gap(model, embedding).same_order
    with pytest.raises(ValueError, match=r"the logits of it are not what its LM head's matrix gives: .* off by \d{3}%"):
        check_head("it", model, embedding)


def test_a_head_that_adds_a_bias_is_refused(tmp_path: Path) -> None:
    save_lively(PhiConfig(**SIZES), tmp_path)
    bias = load_file(tmp_path / "model.safetensors")
    bias["lm_head.bias"] = 20 * torch.randn(260)
    save_file(bias, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"are not what its LM head's matrix gives"):
        load_ends(read_info(str(tmp_path)), torch.float32, CPU)


def test_a_checkpoint_without_a_head_is_refused(tmp_path: Path) -> None:
    save_lively(transformers.Qwen3Config(**SIZES), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"the checkpoint of .* lacks lm_head\.weight"):
        load_ends(read_info(str(tmp_path)), torch.float32, CPU)


@pytest.mark.filterwarnings("ignore")
def test_a_tensor_of_all_layers_hides_no_head_and_asks_for_full_depth(alone) -> None:
    """Gemma 4 embeds each token once more for every layer."""
    of = family("Gemma4Text")
    assert of.head.error == 0
    info = read_info(str(of.folder))
    with pytest.raises(ValueError, match=r"embed_tokens_per_layer\.weight is .*; set target\.full_depth=true"):
        check_loading(info, target_of([1]))
    check_loading(info, target_of([1], full_depth=True))
    target = load_target(info, target_of([1], full_depth=True), alone)
    assert torch.equal(target.head, load_whole(info, torch.float32, CPU).get_output_embeddings().weight)
