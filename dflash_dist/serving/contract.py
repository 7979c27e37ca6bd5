"""What serving engines (z-lab/dflash, vLLM, SGLang) expect of a draft folder: one description, read and written here.

Engines refuse unknown tensor names, but vLLM accepts missing ones in silence, so a folder is checked against the full
list before it is written and when it is read.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from dflash_dist.draft.model import DFlashDraftModel, DraftShape

WEIGHTS, CONFIG, TRAINING = "model.safetensors", "config.json", "training.json"


def tensor_shapes(shape: DraftShape) -> dict[str, list[int]]:
    """Every tensor of a draft by name: 11 a layer and 3 more. No embedding, LM head or rotary buffer, no prefix."""
    hidden, mlp, head = shape.hidden_size, shape.intermediate_size, shape.head_dim
    queries, keys = shape.num_attention_heads * head, shape.num_key_value_heads * head
    layer = {
        "input_layernorm": [hidden],
        "post_attention_layernorm": [hidden],
        "self_attn.q_proj": [queries, hidden],
        "self_attn.k_proj": [keys, hidden],
        "self_attn.v_proj": [keys, hidden],
        "self_attn.o_proj": [hidden, queries],
        "self_attn.q_norm": [head],
        "self_attn.k_norm": [head],
        "mlp.gate_proj": [mlp, hidden],
        "mlp.up_proj": [mlp, hidden],
        "mlp.down_proj": [hidden, mlp],
    }
    outside = {"fc": [hidden, len(shape.target_layer_ids) * hidden], "hidden_norm": [hidden], "norm": [hidden]}
    shapes = {f"layers.{i}.{name}.weight": size for i in range(shape.num_layers) for name, size in layer.items()}
    return shapes | {f"{name}.weight": size for name, size in outside.items()}


def to_config(shape: DraftShape, dtype: str) -> dict[str, Any]:
    """The `config.json` of a draft."""
    return {
        "architectures": ["DFlashDraftModel"],
        "model_type": "qwen3",
        "dtype": dtype,
        "block_size": shape.block_size,
        "num_target_layers": shape.num_target_layers,
        "dflash_config": {
            "mask_token_id": shape.mask_token_id,
            "target_layer_ids": shape.target_layer_ids,
            "block_size": shape.block_size,
        },
        "num_hidden_layers": shape.num_layers,
        "layer_types": ["full_attention"] * shape.num_layers,
        "hidden_size": shape.hidden_size,
        "vocab_size": shape.vocab_size,
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_key_value_heads,
        "head_dim": shape.head_dim,
        "intermediate_size": shape.intermediate_size,
        "hidden_act": "silu",
        "rms_norm_eps": shape.rms_norm_eps,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "max_position_embeddings": shape.max_position_embeddings,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
        "rope_theta": shape.rope_theta,  # engines that know only the older key
        "tie_word_embeddings": False,
    }


def from_config(config: dict[str, Any]) -> DraftShape:
    """The shape that a draft's `config.json` describes.

    Raises:
        ValueError: a key is missing.
    """
    try:
        dflash = config["dflash_config"]
        rope = config.get("rope_parameters") or {"rope_theta": config["rope_theta"]}
        return DraftShape(
            hidden_size=config["hidden_size"],
            num_layers=config["num_hidden_layers"],
            num_attention_heads=config["num_attention_heads"],
            num_key_value_heads=config["num_key_value_heads"],
            head_dim=config["head_dim"],
            intermediate_size=config["intermediate_size"],
            rms_norm_eps=config["rms_norm_eps"],
            rope_theta=rope["rope_theta"],
            block_size=config["block_size"],
            mask_token_id=dflash["mask_token_id"],
            target_layer_ids=dflash["target_layer_ids"],
            num_target_layers=config["num_target_layers"],
            vocab_size=config["vocab_size"],
            max_position_embeddings=config["max_position_embeddings"],
        )
    except KeyError as error:
        raise ValueError(f"the draft's {CONFIG} has no key {error}") from error


def refuse_mismatch(tensors: dict[str, torch.Tensor], shape: DraftShape) -> None:
    """Refuses a set of tensors that is not exactly a draft's.

    Raises:
        ValueError: naming what is missing, left over or of another shape.
    """
    expected, found = tensor_shapes(shape), {name: list(tensor.shape) for name, tensor in tensors.items()}
    faults = [f"{name} is missing" for name in expected.keys() - found.keys()]
    faults += [f"{name} does not belong into a draft" for name in found.keys() - expected.keys()]
    faults += [
        f"{name} is {found[name]}, not {expected[name]}"
        for name in expected.keys() & found.keys()
        if found[name] != expected[name]
    ]
    ids = shape.target_layer_ids
    if (
        not ids
        or any(a >= b for a, b in itertools.pairwise(ids))
        or not 0 <= ids[0] <= ids[-1] < shape.num_target_layers - 1
    ):
        faults.append(f"target_layer_ids {ids} are not strictly increasing below the target's last layer")
    if not 0 <= shape.mask_token_id < shape.vocab_size:
        faults.append(f"mask_token_id {shape.mask_token_id} is outside the vocabulary of {shape.vocab_size}")
    if faults:
        raise ValueError(f"not a draft that engines can serve: {'; '.join(sorted(faults))}")


def write_draft(folder: Path, shape: DraftShape, tensors: dict[str, torch.Tensor], dtype: str) -> None:
    """Writes config.json and the weights; checks them first."""
    refuse_mismatch(tensors, shape)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.to(getattr(torch, dtype)).contiguous() for name, tensor in tensors.items()}
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(to_config(shape, dtype), indent=2) + "\n")


def read_draft(folder: Path, dtype: torch.dtype, device: torch.device) -> DFlashDraftModel:
    """Loads a draft folder for decoding.

    Raises:
        ValueError: a file is missing, or what is there is not exactly a draft.
    """
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise ValueError(f"draft folder {folder} holds no {name}: export a run there first")
    shape = from_config(json.loads((folder / CONFIG).read_text()))
    tensors = load_file(folder / WEIGHTS)
    refuse_mismatch(tensors, shape)
    draft = DFlashDraftModel(shape)
    draft.load_state_dict(tensors)
    return draft.to(device, dtype).eval().requires_grad_(False)
