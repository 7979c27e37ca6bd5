"""What a run needs, made from its config: target, data, draft. Everything that can be refused is refused in this order,
cheapest first."""

from __future__ import annotations

import dataclasses
import json
import platform
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml

from dflash_dist import __version__
from dflash_dist.config import Config, to_tree
from dflash_dist.data.chat import ChatEncoder, Message, encode_all, read_conversations
from dflash_dist.data.packing import PackedRows
from dflash_dist.draft.model import DFlashDraftModel, DraftShape
from dflash_dist.ranks import World
from dflash_dist.target.load import TargetInfo, check_capture, check_mask_token, read_info
from dflash_dist.target.tiny import BUILTIN_CHAT, BUILTIN_TARGET, make_tiny_chats, make_tiny_target
from dflash_dist.target.warm_start import warm_start


def make_builtins(config: Config, world: World) -> Config:
    """Writes the built-in target and data that the config names into the run folder, and names them instead."""
    folder = Path(config.output_dir) / "builtin"
    target, data = config.target, config.data
    if target.path == BUILTIN_TARGET:
        target = dataclasses.replace(target, path=str(folder / "target"))
        if world.is_main:
            make_tiny_target(folder / "target")
    if data.path == BUILTIN_CHAT:
        data = dataclasses.replace(data, path=str(folder / "chat.jsonl"))
        if world.is_main:
            make_tiny_chats(folder / "chat.jsonl")
    world.barrier()
    return dataclasses.replace(config, target=target, data=data)


def check_world(config: Config, world: World) -> None:
    """Refuses a world size that the batch does not divide by.

    Raises:
        ValueError: with world sizes that fit.
    """
    batch, micro = config.train.global_batch_size, config.train.micro_batch_size
    if batch % (micro * world.size):
        raise ValueError(
            f"train.global_batch_size {batch} does not divide by {world.size} ranks x train.micro_batch_size {micro}:"
            f" choose a multiple of {micro * world.size}, or another number of ranks"
        )


def check_target(config: Config) -> TargetInfo:
    """Reads what is known of the target without its weights, and refuses a config that does not fit it."""
    info = read_info(config.target.path, config.target.revision)
    check_capture(info, config.target.layer_ids)
    check_mask_token(info, config.mask_token_id)
    return info


def make_rows(config: Config, info: TargetInfo, world: World) -> tuple[PackedRows, PackedRows | None]:
    """Training rows, and held-out rows where the config holds any out."""
    data = config.data
    conversations, skipped = read_conversations(data.path, data.max_bad_rows, finished_only=True)
    held_out: list[list[Message]] = []
    held_out_skipped = Counter[str]()
    if data.val_path:
        held_out, held_out_skipped = read_conversations(data.val_path, data.max_bad_rows, finished_only=True)
    elif data.val_conversations:
        if data.val_conversations >= len(conversations):
            raise ValueError(
                f"data.val_conversations {data.val_conversations} leaves nothing to train on:"
                f" {data.path} holds {len(conversations)} conversations"
            )
        conversations, held_out = conversations[: -data.val_conversations], conversations[-data.val_conversations :]

    encoder = ChatEncoder(info.tokenizer, info.stop_ids, data.template_args)

    def pack(name: str, part: list[list[Message]], skipped: Counter[str], path: str) -> PackedRows:
        try:
            documents, causes = encode_all(encoder, part, data.seq_len)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        rows = PackedRows(documents, data.seq_len, encoder.pad_id)
        if world.is_main:
            supervised = rows.loss_mask.mean()
            print(
                f"{name}: {len(part)} conversations -> {len(documents)} documents, {len(rows.input_ids):,} tokens"
                f" ({supervised:.0%} supervised) -> {len(rows)} rows of {data.seq_len}, {rows.filled:.1%} filled"
            )
            for cause, count in (causes + skipped).items():
                print(f"{name}: {count} x {cause}")
        return rows

    rows = pack("train", conversations, skipped, data.path)
    return rows, pack("held out", held_out, held_out_skipped, data.val_path or data.path) if held_out else None


def draft_shape(config: Config, info: TargetInfo) -> DraftShape:
    """The draft's shape: as stated, and otherwise as the target's. The draft always trains with plain rotary positions
    at the target's base frequency, so that none of the target's rotary scaling belongs into its config."""
    draft, text = config.draft, info.text
    missing = [name for name in ("rms_norm_eps", "intermediate_size", "num_key_value_heads") if not hasattr(text, name)]
    if missing:
        raise ValueError(f"{info.path} is no Llama-like decoder: its config has no {', '.join(missing)}")
    heads = draft.num_attention_heads or text.num_attention_heads
    shape = DraftShape(
        hidden_size=text.hidden_size,
        num_layers=draft.num_layers,
        num_attention_heads=heads,
        num_key_value_heads=draft.num_key_value_heads or text.num_key_value_heads,
        head_dim=draft.head_dim or getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        intermediate_size=draft.intermediate_size or text.intermediate_size,
        rms_norm_eps=text.rms_norm_eps,
        rope_theta=_rope_theta(text),
        block_size=draft.block_size,
        mask_token_id=config.mask_token_id,
        target_layer_ids=list(config.target.layer_ids),
        num_target_layers=text.num_hidden_layers,
        vocab_size=text.vocab_size,
        max_position_embeddings=text.max_position_embeddings,
    )
    if heads % shape.num_key_value_heads:
        raise ValueError(
            f"draft.num_attention_heads {heads} must be a multiple of draft.num_key_value_heads"
            f" {shape.num_key_value_heads}"
        )
    if config.data.seq_len > shape.max_position_embeddings:
        raise ValueError(
            f"data.seq_len {config.data.seq_len} is above the {shape.max_position_embeddings} positions of {info.path}"
        )
    return shape


def _rope_theta(text: Any) -> float:
    rope = getattr(text, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope)
    return float(rope.get("rope_theta") or getattr(text, "rope_theta", 10_000.0))


def make_draft(config: Config, info: TargetInfo) -> DFlashDraftModel:
    """The draft in float32 on the host, the same on every rank."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.train.seed)
        draft = DFlashDraftModel(draft_shape(config, info), config.train.gradient_checkpointing)
    if config.draft.init == "target":
        warm_start(draft, info)
    return draft


def describe_run(config: Config) -> str:
    """Writes the resolved config and the versions into the run folder; returns the config as YAML."""
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(to_tree(config), sort_keys=False)
    (folder / "config.yaml").write_text(text)
    packages = ("torch", "transformers", "tokenizers", "safetensors")
    versions = {"dflash_dist": __version__, "python": platform.python_version()}
    versions |= {name: version(name) for name in packages}
    (folder / "versions.json").write_text(json.dumps(versions, indent=2))
    return text
