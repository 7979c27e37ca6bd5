"""What z-lab/dflash, vLLM and SGLang expect of a draft folder: one description, read and written here.

vLLM accepts missing tensors in silence, so a folder is checked against the full list before it is written and when it
is read. What the folder needs in addition, and what engines make of a broken one, is in export/check.py.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import typing
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dflash_dist.contract.speculators import METHOD, from_speculators, to_speculators
from dflash_dist.data.template import check_day
from dflash_dist.draft.model import DFlashDraftModel, DraftShape
from dflash_dist.reading import check_fields, parse, read_object, read_shards, reading, shown
from dflash_dist.target.folder import looks_like_hub_id

WEIGHTS, CONFIG, TRAINING = "model.safetensors", "config.json", "training.json"
INDEX = f"{WEIGHTS}.index.json"
MASK_EMBEDDING = "mask_embedding.pt"  # of some published drafts; none of ours has one
AGAIN = "export or download the draft again"
SHAPE = "dflash_shape"  # in the metadata of the weights: the shape they were trained in, as JSON

Sizes = dict[str, list[int]]  # tensor name -> shape

KINDS = typing.get_type_hints(DraftShape)
# What rules of their own are about may be any number.
SIZES = [name for name, kind in KINDS.items() if kind is int and name != "mask_token_id"]
RECORD = {
    "template_args": dict[str, Any],
    "chat_template": str | None,
    "drop_reasoning": bool | None,
    "step": int | None,
}
MOST = {"num_layers": 1000}  # its tensors are listed by name


def tensor_shapes(shape: DraftShape, attention_bias: bool = False) -> Sizes:
    """Every tensor of a draft by name: 11 a layer and 3 more. No embedding, LM head or rotary buffer, no prefix.

    Drafts trained elsewhere may have biases in attention, 4 more a layer.
    """
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
    tensors = {f"{name}.weight": size for name, size in layer.items()}
    if attention_bias:
        tensors |= {f"self_attn.{x}_proj.bias": layer[f"self_attn.{x}_proj"][:1] for x in "qkvo"}
    shapes = {f"layers.{i}.{name}": size for i in range(shape.num_layers) for name, size in tensors.items()}
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


def from_config(config: dict[str, Any], where: str = f"the draft's {CONFIG}") -> DraftShape:
    """The shape that a draft's `config.json` describes; `where` names it.

    What `dflash_config` holds may stand at the top level instead, as published drafts have it.

    Raises:
        ValueError: a key is missing or has a value of the wrong kind.
    """
    inner, rope = config.get("dflash_config") or {}, config.get("rope_parameters") or {}
    if not isinstance(inner, dict) or not isinstance(rope, dict):
        raise ValueError(f"dflash_config and rope_parameters in {where} must be JSON objects")
    values: dict[str, Any] = {}
    for field in dataclasses.fields(DraftShape):
        key = "num_hidden_layers" if field.name == "num_layers" else field.name
        place = next((place for place in (inner, rope) if key in place), config)
        check_fields(place, {key: KINDS[field.name]}, where, AGAIN)
        values[field.name] = place[key]
    for name in SIZES:
        if not 1 <= values[name] <= MOST.get(name, 2**31 - 1):
            raise ValueError(f"{name} in {where} is {shown(values[name])}, which is no size: {AGAIN}")
    return DraftShape(**values)


# ---- what must hold of tensors and shape: each rule returns what breaks it ----


def missing(found: Sizes, expected: Sizes) -> list[str]:
    return [f"{name} is missing" for name in expected if name not in found]


def foreign(found: Sizes, expected: Sizes) -> list[str]:
    return [f"{name} does not belong into a draft" for name in found if name not in expected]


def misshapen(found: Sizes, expected: Sizes) -> list[str]:
    return [f"{name} is {found[name]}, not {size}" for name, size in expected.items() if found.get(name, size) != size]


def layer_faults(shape: DraftShape) -> list[str]:
    ids = shape.target_layer_ids
    if ids and all(a < b for a, b in itertools.pairwise(ids)) and 0 <= ids[0] <= ids[-1] < shape.num_target_layers - 1:
        return []
    return [f"target_layer_ids {ids} are not strictly increasing below the target's last layer"]


def mask_faults(shape: DraftShape) -> list[str]:
    if 0 <= shape.mask_token_id < shape.vocab_size:
        return []
    return [f"mask_token_id {shape.mask_token_id} is outside the vocabulary of {shape.vocab_size}"]


def target_faults(shape: DraftShape, text: Any) -> list[str]:
    """Why a draft does not belong to a target with this config of its text decoder."""
    pairs = {
        "hidden size": (shape.hidden_size, text.hidden_size),
        "vocabulary": (shape.vocab_size, text.vocab_size),
        "number of target layers": (shape.num_target_layers, text.num_hidden_layers),
    }
    return [f"{name} {ours}, not {theirs}" for name, (ours, theirs) in pairs.items() if ours != theirs]


def variants(config: dict[str, Any], shape: DraftShape) -> list[str]:
    """What makes a draft another model than `DFlashDraftModel` computes, though engines may know it."""
    ours = to_config(shape, dtype="")
    inner, rope = config.get("dflash_config") or {}, config.get("rope_parameters") or {}
    found = {key: config.get(key) for key in ("layer_types", "hidden_act") if config.get(key) not in (None, ours[key])}
    found |= {key: config[key] for key in ("attention_bias", "is_causal", "rope_scaling") if config.get(key)}
    found |= {key: value for key, value in rope.items() if (ours | ours["rope_parameters"]).get(key) != value}
    found |= {key: value for key, value in inner.items() if key not in ours | ours["dflash_config"]}
    return [f"{key} {value}" for key, value in found.items()]


def refuse_mismatch(tensors: dict[str, torch.Tensor], shape: DraftShape, where: str = "these tensors") -> None:
    """Refuses a set of tensors that is not exactly a draft's.

    Raises:
        ValueError: naming what is missing, left over or of another shape.
    """
    _refuse_other({name: list(tensor.shape) for name, tensor in tensors.items()}, shape, where)


def _refuse_other(found: Sizes, shape: DraftShape, where: str) -> None:
    expected = tensor_shapes(shape)
    faults = [fault for rule in (missing, foreign, misshapen) for fault in rule(found, expected)]
    faults += layer_faults(shape) + mask_faults(shape)
    if faults:
        raise ValueError(f"{where}: not a draft that engines can serve: {'; '.join(sorted(faults))}")


def write_draft(
    folder: Path,
    shape: DraftShape,
    tensors: dict[str, torch.Tensor],
    dtype: str,
    speculators_of: tuple[str, list[str]] | None = None,
) -> None:
    """Writes config.json and the weights; checks them first.

    Args:
        speculators_of: name and architectures of the target, to write the speculators library's layout.
    """
    refuse_mismatch(tensors, shape, str(folder))
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.to(getattr(torch, dtype)).contiguous() for name, tensor in tensors.items()}
    metadata = {"format": "pt", SHAPE: json.dumps(dataclasses.asdict(shape))}
    save_file(weights, folder / WEIGHTS, metadata=metadata)
    config = to_config(shape, dtype)
    if speculators_of:
        config = to_speculators(config, *speculators_of)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def find_draft(name: str) -> Path:
    """A draft's folder; what the hub has under this id is downloaded.

    Raises:
        ValueError: there is no such draft.
    """
    if Path(name).exists() or not looks_like_hub_id(name):
        return Path(name)  # what it lacks is said by whoever reads it
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", MASK_EMBEDDING]))
    except (OSError, ValueError) as error:  # no such name, or no network
        raise ValueError(f"draft {name} could not be read, neither as a folder nor from the hub: {error}") from error


def read_config(folder: Path, target_layers: int | None = None) -> dict[str, Any]:
    """The `config.json` of a draft folder, in the published layout whichever it has.

    Args:
        target_layers: depth of the target, which drafts of the speculators library do not tell.

    Raises:
        ValueError: there is none, or it is no JSON object.
    """
    if not (folder / CONFIG).is_file():
        raise ValueError(f"draft folder {folder} holds no {CONFIG}: export a run there first")
    config = read_object(folder / CONFIG, AGAIN)
    if METHOD not in config:
        return config
    depth = {} if target_layers is None else {"num_target_layers": target_layers}
    return depth | from_speculators(config, str(folder / CONFIG))


def read_record(folder: Path) -> dict[str, Any]:
    """How a draft was trained, as `export` recorded it; empty where the draft comes without.

    Raises:
        ValueError: the record is damaged.
    """
    file = folder / TRAINING
    if not file.is_file():
        return {}
    record = read_object(file, AGAIN)
    check_fields(record, RECORD, str(file), AGAIN)
    check_day(record, "date", str(file), AGAIN)
    return record


def weight_files(folder: Path) -> list[Path]:
    """The files of a draft's weights: one, or the shards that an index names.

    Raises:
        ValueError: one of them is missing.
    """
    names = {WEIGHTS}
    if (folder / INDEX).is_file():
        names = set(read_shards(folder / INDEX, AGAIN).values())
    if lacking := sorted(name for name in names if not (folder / name).is_file()):
        raise ValueError(f"draft folder {folder} holds no {', '.join(lacking)}: export a run there first")
    return [folder / name for name in sorted(names)]


def read_headers(folder: Path) -> tuple[dict[str, tuple[list[int], str]], dict[str, Any] | None]:
    """Shapes and dtypes of the tensors, and the shape that they were trained in, from the weights' headers.

    Raises:
        ValueError: a file is missing or damaged.
    """
    tensors, trained = {}, None
    for file in weight_files(folder):
        with reading(str(file), AGAIN, partial(list, [file])), safe_open(file, "pt") as header:
            for name in header.keys():  # noqa: SIM118, it is no dict
                tensor = header.get_slice(name)
                tensors[name] = (tensor.get_shape(), tensor.get_dtype())
            if told := (header.metadata() or {}).get(SHAPE):
                trained = parse(told)
                check_fields({SHAPE: trained}, {SHAPE: dict[str, Any]}, str(file), AGAIN)
    return tensors, trained


def check_draft(folder: Path, target_layers: int | None = None) -> None:
    """Refuses what `read_draft` could not load, from the config and the weights' headers alone.

    Raises:
        ValueError: as `read_draft`.
    """
    shape = read_shape(folder, target_layers)
    tensors, _ = read_headers(folder)
    _refuse_other({name: size for name, (size, _) in tensors.items()}, shape, str(folder))


def read_shape(folder: Path, target_layers: int | None = None) -> DraftShape:
    """The shape of a draft folder; `target_layers` as `read_config` takes it.

    Raises:
        ValueError: its config is none, or one of a draft that does not train here.
    """
    config = read_config(folder, target_layers)
    shape = from_config(config, str(folder / CONFIG))
    if other := variants(config, shape):
        raise ValueError(f"{folder} is a draft that engines may serve but this program cannot: {'; '.join(other)}")
    return shape


def read_draft(
    folder: Path, dtype: torch.dtype, device: torch.device, target_layers: int | None = None
) -> DFlashDraftModel:
    """Loads a draft folder for decoding; `target_layers` as `read_config` takes it.

    Raises:
        ValueError: a file is missing, or what is there is not exactly a draft of the kind that trains here.
    """
    check_draft(folder, target_layers)
    shape, files = read_shape(folder, target_layers), weight_files(folder)
    with reading(f"the weights in {folder}", AGAIN, lambda: files):
        tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    draft = DFlashDraftModel(shape)
    draft.load_state_dict(tensors)
    return draft.to(device, dtype).eval().requires_grad_(False)
