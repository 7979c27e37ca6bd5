"""The target of a run, as its config names it: to be run on the spot, or its features that `capture` stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch

from dflash_dist.config import Config
from dflash_dist.data.packing import PackedRows
from dflash_dist.data.rows import Data
from dflash_dist.logs import say_phase
from dflash_dist.ranks import World
from dflash_dist.target.features import FeatureFolder, read_index, refuse_other
from dflash_dist.target.load import (
    LoadedTarget,
    TargetInfo,
    expects_packing,
    load_ends,
    load_target,
    name_weights,
    ordinary_tokens,
)
from dflash_dist.target.probe import probe_packing, refuse_lookahead
from dflash_dist.target.run import LiveTarget, StoredTarget, Target
from dflash_dist.training.setup import lay_out

TRAIN, HELD_OUT = "train", "held-out"
FINAL = "final state"  # beside the captured layers; a key of a feature folder's index, as the next one
PACKED = "packed rows"  # key of a feature folder's index


def describe_features(config: Config, info: TargetInfo, data: Data) -> dict[str, Any]:
    """All that features depend on: what must be the same where they are used."""
    parts = parts_of(data)
    return {
        "target": name_weights(info),
        "target.layer_ids": list(config.layer_ids),
        "target.dtype": config.target.dtype,
        "hidden size": info.text.hidden_size,
        "data.seq_len": config.data.seq_len,
        **({FINAL: True} if config.needs_final else {}),
        **{f"{name} rows": len(rows) for name, rows in parts.items()},
        **{f"{name} fingerprint": rows.fingerprint for name, rows in parts.items()},
    }


class Source(NamedTuple):
    """What a run learns from."""

    target: Target
    embedding: torch.Tensor  # [V, H], the target's
    head: torch.Tensor  # [V, H]
    data: Data  # in rows


def make_target(config: Config, info: TargetInfo, data: Data, world: World) -> Source:
    """The target that the config names, its embedding and LM head, and `data` in rows.

    Raises:
        ValueError: as `load_target`; or the stored features are of something else, or not all there.
    """
    if config.target.features is None:
        loaded, packs, told = load_probed(config, info, world)
        data = lay_out(data, packs, told, world)
        return Source(LiveTarget(loaded.model, packs), loaded.embedding, loaded.head, data)
    features, data = open_features(config, info, data, world)
    say_phase("loading the target's embedding and LM head")
    ends = load_ends(info, getattr(torch, config.target.dtype), world.device)
    if ends.note and world.is_main:
        print(ends.note)
    final = info.text.hidden_size if FINAL in features.index else 0
    stored = StoredTarget(features, config.data.seq_len, world.device, final)
    return Source(stored, ends.embedding, ends.head, data)


def open_features(config: Config, info: TargetInfo, data: Data, world: World) -> tuple[FeatureFolder, Data]:
    """The features that the config names, and `data` in the rows that they are of.

    Raises:
        ValueError: they are of something else, or not all there.
    """
    assert config.target.features, "the target is run"
    folder = Path(config.target.features)
    index = read_index(folder)
    data = lay_out(data, *stored_layout(index, folder, info), world)
    refuse_other(index, describe_features(config, info, data), folder)
    features = open_folder(folder, index, config, info, data)
    if lacking := features.lacking():
        names = ", ".join(shard.name for shard in lacking[:3])
        raise ValueError(
            f"{folder}: {len(lacking)} of {len(features.shards)} shards are missing or cut, such as {names}: run the"
            " same capture again, which fills the gaps"
        )
    if world.is_main:
        print(f"features: {show_bytes(features.bytes_of(features.shards))} in {folder}; the target is not run")
    return features, data


def load_probed(config: Config, info: TargetInfo, world: World) -> tuple[LoadedTarget, bool, str]:
    """The target as the config wants it, whether it keeps the documents of a row apart, and how that is said.

    Raises:
        ValueError: as `load_target`; or its features know later tokens.
    """
    say_phase("loading the target")
    loaded, tokens = load_target(info, config.target, world), ordinary_tokens(info)
    if loaded.note and world.is_main:
        print(loaded.note)
    say_phase("probing the target")
    refuse_lookahead(loaded.model, world, tokens)
    packing = probe_packing(loaded.model, world, tokens, config.data.seq_len, config.train.micro_batch_size)
    return loaded, packing.exact, packing.describe(info.path)


def stored_layout(index: dict[str, Any], folder: Path, info: TargetInfo) -> tuple[bool, str]:
    """Whether the rows that features are stored of hold several documents, and how that is said."""
    if PACKED in index:
        return index[PACKED], f"{folder} holds features of {'packed' if index[PACKED] else 'single'} documents"
    packs = expects_packing(info.text)
    told = "packed, although nobody tried whether the target keeps them apart: capture anew if in doubt"
    return packs, f"{folder} holds features of documents that an earlier version {told if packs else 'did not pack'}"


def open_folder(folder: Path, index: dict[str, Any], config: Config, info: TargetInfo, data: Data) -> FeatureFolder:
    """The folder for the rows of `data`; nothing is read or written yet."""
    filled = {name: rows.filled_tokens for name, rows in parts_of(data).items()}
    width = (len(config.layer_ids) + (FINAL in index)) * info.text.hidden_size
    return FeatureFolder(folder, index, filled, width, getattr(torch, config.target.dtype))


def parts_of(data: Data) -> dict[str, PackedRows]:
    """The parts of the data, by their names in a feature folder."""
    return dict(zip((TRAIN, HELD_OUT), data.parts().values()))


def show_bytes(count: float) -> str:
    return f"{count / 2**30:,.2f} GiB" if count >= 2**30 else f"{count / 2**20:,.2f} MiB"
