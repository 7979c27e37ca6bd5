"""Loads the frozen target: only the layers that are needed, sharded over the ranks, each reading its own shard."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import inspect
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    GenerationConfig,
)
from transformers.distributed import DistributedConfig
from transformers.utils import cached_file

from dflash_dist.config import TargetConfig
from dflash_dist.kernels.target_attention_cpu import suit_device
from dflash_dist.ranks import World
from dflash_dist.reading import is_kind, shown
from dflash_dist.target.capture import HFDFlashTargetModel
from dflash_dist.target.folder import AGAIN, CONFIG, looks_like_hub_id, read_config, read_tokenizer, reading_target
from dflash_dist.target.head import check_head
from dflash_dist.target.rehearsal import REPORTING, end_names, quiet, reading_model, refuse_gaps, rehearse, skeleton


@dataclass(frozen=True)
class TargetInfo:
    """What is known of a target before its weights are read."""

    path: str
    revision: str
    config: Any  # the Hugging Face config of the whole model
    tokenizer: Any
    stop_ids: list[int]  # tokens that end an assistant's turn
    trust_remote_code: bool = False  # whether code that the target brings may run

    @property
    def text(self) -> Any:
        """The config of the text decoder, also of multimodal wrappers."""
        return self.config.get_text_config()


@dataclass(frozen=True)
class LoadedTarget:
    """The frozen target on this rank."""

    model: HFDFlashTargetModel
    embedding: torch.Tensor  # [V, H], a plain copy outside FSDP
    head: torch.Tensor  # [V, H]; the same tensor as `embedding` where the target ties them
    note: str  # as `Ends`


@dataclass(frozen=True)
class Ends:
    """What stands before and behind the target's layers, on this rank."""

    embedding: torch.Tensor  # [V, H]
    head: torch.Tensor  # [V, H]; the same tensor as `embedding` where the target ties them
    note: str  # what the target does to its logits besides; empty where it does nothing


def read_info(path: str, revision: str = "main", trust_remote_code: bool = False) -> TargetInfo:
    """Reads config and tokenizer of a local folder or a hub id.

    Args:
        trust_remote_code: run code that the target brings, if it does.

    Raises:
        ValueError: there is no such model, or what describes it is damaged or unknown here.
    """
    if not (Path(path) / CONFIG).is_file() and (Path(path).exists() or not looks_like_hub_id(path)):
        raise ValueError(f"target model folder {path} does not exist or holds no {CONFIG}")
    config = read_config(path, revision, trust_remote_code)
    tokenizer = read_tokenizer(path, revision, trust_remote_code)
    with reading_target("generation_config.json", path, revision):
        generation = None
        with contextlib.suppress(OSError):  # a model need not have a generation config
            generation = cached_file(path, "generation_config.json", revision=revision)
        of_config = getattr(config.get_text_config(), "eos_token_id", None)  # some wrappers' decoders know no such key
        stops = {"the tokenizer": tokenizer.eos_token_id, CONFIG: of_config}
        if generation:
            told = GenerationConfig.from_pretrained(path, revision=revision)
            stops["generation_config.json"] = told.eos_token_id
    for place, ids in stops.items():
        if not is_kind(ids, int | list[int] | None):
            raise ValueError(f"eos_token_id in {place} of {path} is {shown(ids)}, which is no token's id: {AGAIN}")
    stop_ids = sorted(set(_flat_ids(stops.values())))
    return TargetInfo(path, revision, config, tokenizer, stop_ids, trust_remote_code)


def _flat_ids(values: Iterable[Any]) -> Iterable[int]:
    for value in values:
        if isinstance(value, int):
            yield value
        elif value is not None:
            yield from value


def check_replicas(replicas: int, ranks: int) -> None:
    """Refuses copies of the target that the ranks do not divide into, naming the numbers that fit."""
    if ranks % replicas:
        fitting = ", ".join(str(count) for count in range(1, ranks + 1) if ranks % count == 0)
        raise ValueError(
            f"target.replicas {replicas} does not divide the {ranks} ranks of this run: set it to {fitting}"
        )


def expects_packing(text_config: Any) -> bool:
    """Whether documents in one row may stay apart if their positions restart, as far as a config tells: a guess where
    the target is not at hand. `probe_packing` finds out; features of earlier versions were laid out by this.
    """
    return not (_layer_kinds(text_config) - {"full_attention", "sliding_attention", "attention"})


def ordinary_tokens(info: TargetInfo) -> list[int]:
    """Ids of tokens that are nothing but text: none that the tokenizer adds, nor a placeholder that a config names."""
    added = {*info.tokenizer.added_tokens_decoder, *info.tokenizer.all_special_ids, *named_ids(info.config.to_dict())}
    return [i for i in range(min(len(info.tokenizer), info.text.vocab_size)) if i not in added]


def named_ids(config: dict[Any, Any]) -> Iterator[int]:
    """The tokens that a Hugging Face config names, such as those that stand for images."""
    for name, value in config.items():
        if isinstance(value, dict):
            yield from named_ids(value)
        elif str(name).endswith(("token_id", "token_index")) and isinstance(value, (int, list)):
            yield from _flat_ids([value])


def check_rollback(text_config: Any) -> None:
    """Refuses a target whose cache cannot be cut back to the tokens that were accepted, with a ValueError that names
    the kind of layer."""
    cut = {"full_attention", "sliding_attention", "chunked_attention", "attention"}
    if other := sorted(_layer_kinds(text_config) - cut):
        raise ValueError(
            "speculative decoding drops rejected tokens from the target's cache, which layers of the kind"
            f" {', '.join(other)} cannot: {text_config.model_type} is no target for it; choose one with attention only"
        )


def check_room(info: TargetInfo, prompt: Sequence[int]) -> None:
    """Refuses a prompt behind which no answer could be written, with a ValueError that names both lengths."""
    positions = info.text.max_position_embeddings
    if len(prompt) >= positions:
        raise ValueError(
            f"its {len(prompt)} tokens leave no room for an answer in the {positions} positions of {info.path}"
        )


def _layer_kinds(text_config: Any) -> set[str]:
    """The kinds of a decoder's layers that its config names; attention goes without saying."""
    kinds = [getattr(text_config, name, None) or [] for name in ("layer_types", "layers_block_type", "block_types")]
    sizes = ("state_size", "ssm_state_size", "mamba_d_state")
    state_space = {"state_space"} if any(getattr(text_config, name, None) for name in sizes) else set()
    return state_space.union(*kinds)


def load_target(info: TargetInfo, of: TargetConfig, world: World) -> LoadedTarget:
    """Loads the layers up to the deepest captured one, without the LM head, and shards them over the ranks.

    Args:
        of: how: all of it but where the target lies, which `info` says.

    Raises:
        ValueError: the ranks do not divide into replicas, or the checkpoint lacks the LM head.
    """
    check_replicas(of.replicas, world.size)
    options: dict[str, Any] = {"config": _as_deep(info.config, of), **_options(of)}
    if world.size > 1:
        options["distributed_config"] = _sharding(world.size, of.replicas)
    else:
        options["device_map"] = world.device  # tensor by tensor: never the whole model in host memory
    model = _from_pretrained(AutoModel, info, **options)
    model.requires_grad_(False)

    embedding = model.get_input_embeddings().weight
    # Gathered once, here: calling a sharded submodule outside the root's forward breaks the root.
    embedding = embedding.full_tensor() if hasattr(embedding, "full_tensor") else embedding
    embedding = embedding.detach().to(options["dtype"])
    ends = load_ends(info, options["dtype"], world.device)
    head = embedding if ends.head is ends.embedding else ends.head
    return LoadedTarget(HFDFlashTargetModel(model, of.layer_ids or []), embedding, head, ends.note)


def target_skeleton(config: Any, of: TargetConfig, world: World) -> Any:
    """The model that `load_target` would load and shard, without its weights: on torch's meta device.

    Args:
        config: the Hugging Face config of the whole model.
        of: how.
    """
    model = skeleton(AutoModel, _as_deep(config, of), of.trust_remote_code, **_options(of))
    if world.size > 1:
        sharding, _, mesh = model.prepare_distribute_model(_sharding(world.size, of.replicas))
        model = model.maybe_distribute_model(model, sharding, mesh)
    return model.eval().requires_grad_(False)


def _options(of: TargetConfig) -> dict[str, Any]:
    """For transformers."""
    return {"dtype": getattr(torch, of.dtype)} | ({"attn_implementation": of.attention} if of.attention else {})


def load_ends(info: TargetInfo, dtype: torch.dtype, device: torch.device) -> Ends:
    """What stands before and behind the target's layers: the whole model without any.

    transformers decides what the head is, from the config and from the weights that are there: a checkpoint may have a
    head of its own though its config says tied, and a wrapper's config may say otherwise than the decoder's.

    Raises:
        ValueError: the checkpoint lacks an end, or `check_head` refuses the target.
    """
    config = _shallow(info.config, 0)
    options = {"config": config, "dtype": dtype, "device_map": device}
    model = _from_pretrained(whole_class(config), info, ends_only=True, **options).eval()
    embedding, head = (end.weight.detach() for end in (model.get_input_embeddings(), model.get_output_embeddings()))
    tied = head.data_ptr() == embedding.data_ptr()
    return Ends(embedding, embedding if tied else head, check_head(info.path, model, head))


def name_weights(info: TargetInfo) -> str:
    """Names the target's weights: id and commit on the hub, or `digest_weights` of its folder."""
    if not Path(info.path).is_dir():
        return f"{info.path}@{getattr(info.config, '_commit_hash', None) or info.revision}"
    return digest_weights(Path(info.path))


def digest_weights(folder: Path) -> str:
    """Names a folder's weights, wherever it lies: a digest of their files' names, sizes and ends, since reading all of
    them would take minutes."""
    state = hashlib.sha256()
    for file in sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".bin")):
        size = file.stat().st_size
        state.update(f"{file.name} {size}".encode())
        with file.open("rb") as content:
            for begin in (0, size // 2, max(size - 2**20, 0)):
                content.seek(begin)
                state.update(content.read(2**20))
    return f"weights {state.hexdigest()[:16]}"


def load_whole(info: TargetInfo, dtype: torch.dtype, device: torch.device) -> Any:
    """The complete causal language model, unsharded, for generating text."""
    model = _from_pretrained(whole_class(info.config), info, dtype=dtype, device_map=device)
    return model.eval().requires_grad_(False)


def whole_class(config: Any) -> Any:
    """The class that gives a model with its LM head: some multimodal wrappers are no causal language models by name."""
    others = (AutoModelForImageTextToText, AutoModelForMultimodalLM)
    kinds = (kind for kind in (AutoModelForCausalLM, *others) if type(config) in kind._model_mapping)
    return next(kinds, AutoModelForCausalLM)


def check_loading(info: TargetInfo, of: TargetConfig) -> None:
    """Refuses what `load_target` could not load, as `rehearse` does, before anything long begins."""
    place = (info.path, info.revision, info.trust_remote_code)
    advice = AGAIN if of.full_depth else f"set target.full_depth=true, if a tensor is of all layers, or {AGAIN}"
    rehearse(AutoModel, _as_deep(info.config, of), *place, of.attention, advice=advice)
    rehearse(whole_class(info.config), _shallow(info.config, 0), *place, ends_only=True)


def check_loading_whole(info: TargetInfo) -> None:
    """The same of what `load_whole` loads."""
    config = copy.deepcopy(info.config)
    rehearse(whole_class(config), config, info.path, info.revision, info.trust_remote_code)


def _from_pretrained(auto_class: Any, info: TargetInfo, ends_only: bool = False, **options: Any) -> Any:
    """Loads weights without the report of the layers that were left out on purpose, but never with missing ones, or
    with no missing ends."""
    with quiet(), reading_model(info.path, info.revision):
        model, report = auto_class.from_pretrained(
            info.path, revision=info.revision, trust_remote_code=info.trust_remote_code, **options, **REPORTING
        )
    refuse_gaps(report, info.path, end_names(model) if ends_only else None)
    if "attn_implementation" not in options:
        suit_device(model)
    return model


def _as_deep(config: Any, of: TargetConfig) -> Any:
    """A copy of the target's config, as deep as it is loaded."""
    return copy.deepcopy(config) if of.full_depth else _shallow(config, max(of.layer_ids or [-1]) + 1)


def _shallow(config: Any, layers: int) -> Any:
    config = copy.deepcopy(config)
    truncate(config.get_text_config(), layers)
    return config


def truncate(text_config: Any, layers: int) -> None:
    """Leaves the first `layers` decoder layers in a config."""
    text_config.num_hidden_layers = layers
    if getattr(text_config, "layer_types", None):
        text_config.layer_types = text_config.layer_types[:layers]


def _sharding(ranks: int, replicas: int) -> DistributedConfig:
    if replicas == 1:
        return DistributedConfig(fsdp_size=ranks)
    if "dp_replicate_size" not in inspect.signature(DistributedConfig).parameters:
        raise ValueError("target.replicas needs a newer transformers, with DistributedConfig.dp_replicate_size")
    return DistributedConfig(fsdp_size=ranks // replicas, dp_replicate_size=replicas)
