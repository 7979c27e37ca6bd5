"""What a training takes from a target, compared with the target itself: for the folder of a tiny model."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from dflash_dist.config import Config, DataConfig, DraftConfig, TargetConfig
from dflash_dist.draft.kinds.dflash import DFlashDraftModel
from dflash_dist.target.capture import capture_layers, decoder_layers
from dflash_dist.target.head import HeadGap, head_gap
from dflash_dist.target.layers import _unscale
from dflash_dist.target.load import load_ends, load_whole, read_info, whole_class
from dflash_dist.target.tiny import tiny_tokenizer
from dflash_dist.target.warm_start import HEAD_NORMS, warm_start
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


# ---- the slow truth, of the whole model on a text ----


@torch.no_grad()
def head_is_right(folder: Path, text: list[int]) -> bool:
    """Whether the states before the model's head, times the head that a training takes, are the model's logits."""
    info = read_info(str(folder))
    model, seen = load_whole(info, torch.float32, CPU), []
    model.get_output_embeddings().register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    logits = model(input_ids=torch.tensor([text]), use_cache=False).logits
    ours = F.linear(seen[0], load_ends(info, torch.float32, CPU).head)
    return bool((logits - ours).abs().max() < 1e-5 * ours.std())


@torch.no_grad()
def copies_follow(draft: DFlashDraftModel, copied: list[int], folder: Path, text: list[int]) -> bool:
    """Whether the draft's layers `copied`, without head norms where the target has none, give what the target's give
    behind all that are before them, its rotary scaling aside."""
    config = read_info(str(folder)).config
    _unscale(getattr(config.get_text_config(), "rope_parameters", None) or {})
    model = whole_class(config).from_pretrained(folder, config=config, dtype=torch.float32).eval()
    layers = decoder_layers(model)
    first, inputs = draft.shape.num_target_layers - draft.shape.num_layers, {}
    for number, layer in enumerate(layers):
        layer.register_forward_hook(
            lambda _module, args, named, _out, n=number: inputs.update(
                {n: args[0] if args else named["hidden_states"]}
            ),
            with_kwargs=True,
        )
    with capture_layers(layers, range(len(layers))) as captured:
        model(input_ids=torch.tensor([text]), use_cache=False)
        outputs = captured()
    for number in copied:
        layer, theirs = draft.layers[number], layers[first + number]
        if not set(HEAD_NORMS) <= dict(theirs.named_parameters()).keys():
            layer.self_attn.q_norm = layer.self_attn.k_norm = torch.nn.Identity()
        states, expected = inputs[first + number], outputs[first + number]
        nothing = states.new_empty(1, 0, 0)
        found = layer(states, draft._rope(torch.arange(len(text))[None]), (nothing, nothing), _causal)
        if not (found - expected).norm() < 1e-4 * (expected - states).norm():
            return False
    return True


def _causal(query, _keys, _values, key, value):
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
