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
from safetensors.torch import load_file

from dflash_dist.contract.speculators import METHOD, from_speculators, to_speculators
from dflash_dist.data.template import check_day
from dflash_dist.draft.base import Draft
from dflash_dist.draft.kinds import KINDS
from dflash_dist.draft.shape import DraftShape
from dflash_dist.draft.visibility import VISIBILITY, from_keys
from dflash_dist.files import remove_leftovers, whole, write_safetensors
from dflash_dist.reading import check_fields, parse, read_object, read_shards, reading, shown
from dflash_dist.target.folder import looks_like_hub_id

WEIGHTS, CONFIG, TRAINING = "model.safetensors", "config.json", "training.json"
INDEX = f"{WEIGHTS}.index.json"
MASK_EMBEDDING = "mask_embedding.pt"  # of some published drafts; none of ours has one
CARD = "README.md"
AGAIN = "export or download the draft again"
SHAPE = "dflash_shape"  # in the metadata of the weights: the shape they were trained in, as JSON

Sizes = dict[str, list[int]]  # tensor name -> shape

RECORD = {
    "template_args": dict[str, Any],
    "chat_template": str | None,
    "drop_reasoning": bool | None,
    "step": int | None,
    "tau_curve": list[list[float]] | None,
}
# Tensors are listed by layer, and their sizes multiplied; what rules of their own are about may be any number.
MOST = {"num_layers": 1000, "vocab_size": 2**31 - 1, "max_position_embeddings": 2**31 - 1}
WIDEST = 2**20
# What engines take where a config does not say it, among what is the same in all drafts of a kind.
TAKEN_FOR_GRANTED = {
    "hidden_act": "silu",
    "sample_from_anchor": True,
    "shift_label": None,
    "pure_draft_prefix_len": None,
}


def expected_tensors(kind: type[Draft], shape: DraftShape, attention_bias: bool = False) -> Sizes:
    """Every tensor of a draft by name. Drafts trained elsewhere may have biases in attention, 4 more a layer."""
    tensors = kind.tensors(shape)
    if not attention_bias:
        return tensors
    projections = [name for name in tensors if name.endswith(tuple(f"self_attn.{x}_proj.weight" for x in "qkvo"))]
    return tensors | {f"{name.removesuffix('weight')}bias": tensors[name][:1] for name in projections}


def kind_of_config(config: dict[str, Any]) -> type[Draft]:
    """The kind of draft that a `config.json` names by its architecture; plain DFlash where it names none of ours, so
    that what differs can be told."""
    inner = config.get("dflash_config")
    named = config.get("architectures"), inner.get("projector_type") if isinstance(inner, dict) else None
    return next((kind for kind in KINDS.values() if ([kind.architecture], kind.projector) == named), KINDS["dflash"])


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
    shape = kind_of_config(config).Shape
    for name, type_of in typing.get_type_hints(shape).items():
        if name in VISIBILITY:
            continue  # each in several places
        key = "num_hidden_layers" if name == "num_layers" else name
        place = next((place for place in (inner, rope) if key in place), config)
        check_fields(place, {key: type_of}, where, AGAIN)
        values[name] = value = place.get(key)
        counts = type_of in (int, int | None) and name != "mask_token_id"
        if counts and value is not None and not 1 <= value <= MOST.get(name, WIDEST):
            raise ValueError(f"{name} in {where} is {shown(values[name])}, which is no size: {AGAIN}")
    for place in (config, inner):
        check_fields(place, VISIBILITY, where, AGAIN)
    return shape(**values, **from_keys(config, values["num_layers"]))


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
    """What makes a draft another model than its kind computes here, though engines may know it."""
    ours = kind_of_config(config).to_config(shape, dtype="")
    inner, rope = config.get("dflash_config") or {}, config.get("rope_parameters") or {}
    found: dict[str, Any] = {}
    for key, default in TAKEN_FOR_GRANTED.items():
        fixed, stated = (ours, config) if key in ours else (ours["dflash_config"], inner)
        if key in fixed and stated.get(key, default) != fixed[key]:
            found[key] = stated.get(key, default)
    found |= {key: config[key] for key in ("attention_bias", "rope_scaling") if config.get(key)}
    found |= {key: value for key, value in rope.items() if (ours | ours["rope_parameters"]).get(key) != value}
    found |= {key: value for key, value in inner.items() if key not in ours | ours["dflash_config"] | VISIBILITY}
    return [f"{key} {value}" for key, value in found.items()]


def refuse_mismatch(
    tensors: dict[str, torch.Tensor], kind: type[Draft], shape: DraftShape, where: str = "these tensors"
) -> None:
    """Refuses a set of tensors that is not exactly a draft's.

    Raises:
        ValueError: naming what is missing, left over or of another shape.
    """
    _refuse_other({name: list(tensor.shape) for name, tensor in tensors.items()}, kind, shape, where)


def _refuse_other(found: Sizes, kind: type[Draft], shape: DraftShape, where: str) -> None:
    expected = kind.tensors(shape)
    faults = [fault for rule in (missing, foreign, misshapen) for fault in rule(found, expected)]
    faults += layer_faults(shape) + mask_faults(shape)
    if faults:
        raise ValueError(f"{where}: not a draft that engines can serve: {'; '.join(sorted(faults))}")


def write_draft(
    folder: Path,
    kind: type[Draft],
    shape: DraftShape,
    tensors: dict[str, torch.Tensor],
    dtype: str,
    speculators_of: tuple[str, list[str]] | None = None,
) -> None:
    """Writes config.json and the weights, the same bytes each time; checks them first.

    Args:
        speculators_of: name and architectures of the target, to write the speculators library's layout.
    """
    refuse_mismatch(tensors, kind, shape, str(folder))
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    weights = {name: tensors[name].to("cpu", getattr(torch, dtype)).contiguous() for name in sorted(tensors)}
    with whole(folder / WEIGHTS) as file:
        write_safetensors(file, weights, {"format": "pt", SHAPE: json.dumps(dataclasses.asdict(shape))})
    config = kind.to_config(shape, dtype)
    if speculators_of:
        config = to_speculators(config, *speculators_of)
    with whole(folder / CONFIG) as file:
        file.write_text(json.dumps(config, indent=2) + "\n")


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
        if beside := sorted(path.name for path in Path(name).parent.glob("*/") if "/" in name):
            raise ValueError(
                f"there is no draft folder {name}: in {Path(name).parent} are {', '.join(beside)}; nor did the hub give"
                f" it: {error}"
            ) from error
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
        if "dflash_config" not in config and "block_size" not in config:
            raise ValueError(f"{folder} holds {config.get('architectures') or 'something'}, which is no draft")
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
    kind, shape = read_kind(folder, target_layers)
    tensors, _ = read_headers(folder)
    _refuse_other({name: size for name, (size, _) in tensors.items()}, kind, shape, str(folder))


def read_kind(folder: Path, target_layers: int | None = None) -> tuple[type[Draft], DraftShape]:
    """The kind and the shape of a draft folder; `target_layers` as `read_config` takes it.

    Raises:
        ValueError: its config is none, or one of a draft that does not train here.
    """
    config = read_config(folder, target_layers)
    shape = from_config(config, str(folder / CONFIG))
    if other := variants(config, shape):
        raise ValueError(f"{folder} is a draft that engines may serve but this program cannot: {'; '.join(other)}")
    return kind_of_config(config), shape


def read_draft(folder: Path, dtype: torch.dtype, device: torch.device, target_layers: int | None = None) -> Draft:
    """Loads a draft folder for decoding; `target_layers` as `read_config` takes it.

    Raises:
        ValueError: a file is missing, or what is there is not exactly a draft of the kind that trains here.
    """
    check_draft(folder, target_layers)
    (kind, shape), files = read_kind(folder, target_layers), weight_files(folder)
    with reading(f"the weights in {folder}", AGAIN, lambda: files):
        tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    draft = kind(shape)
    draft.load_state_dict(tensors)
    return draft.to(device, dtype).eval().requires_grad_(False)
