"""Where the draft's context comes from: the target, run on the spot, or features that `capture` stored."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F

from dflash_dist.config import Config
from dflash_dist.data.packing import PackedBatch
from dflash_dist.data.rows import Data, Part
from dflash_dist.ranks import World
from dflash_dist.target.capture import HFDFlashTargetModel
from dflash_dist.target.features import FeatureFolder, read_index, refuse_other
from dflash_dist.target.load import (
    Target,
    TargetInfo,
    expects_packing,
    load_ends,
    load_target,
    name_weights,
    ordinary_tokens,
)
from dflash_dist.target.probe import probe_packing, refuse_lookahead
from dflash_dist.training.setup import lay_out

TRAIN, HELD_OUT = "train", "held-out"
PACKED = "packed rows"  # key of a feature folder's index
Place = tuple[str, list[int]]  # part and numbers of the rows of a micro-batch


class ContextSource(Protocol):
    def expect(self, places: Iterable[Place]) -> None:
        """What will be asked for from now on, in this order."""

    def of(self, place: Place, batch: PackedBatch) -> torch.Tensor:
        """[B, S, L * H] in the target's dtype, for a batch on the device."""


class TargetContext:
    """Runs the target.

    Args:
        alone: tokens of each row by part, where a row holds one document that the target runs by itself, without the
            row's padding: nothing can disturb it then. None: packed rows, all at once.
    """

    def __init__(self, target: HFDFlashTargetModel, alone: dict[str, np.ndarray] | None = None):
        self.target, self.alone = target, alone

    def expect(self, places: Iterable[Place]) -> None:
        pass

    def of(self, place: Place, batch: PackedBatch) -> torch.Tensor:
        if self.alone is None:
            return self.target.generate_batch(
                batch.input_ids, batch.attention_mask, batch.loss_mask, batch.position_ids
            ).hidden_states
        part, rows = place
        filled = [int(self.alone[part][row]) if row < len(self.alone[part]) else 0 for row in rows]
        filled += [0] * (len(batch.input_ids) - len(rows))
        # A sharded forward is one of all ranks: a row of padding runs one token.
        found = [
            self.target.generate_batch(ids[None, : max(length, 1)], None, None).hidden_states[0, :length]
            for ids, length in zip(batch.input_ids, filled)
        ]
        padding = batch.input_ids.shape[1]
        return torch.stack([F.pad(states, (0, 0, 0, padding - len(states))) for states in found])


class StoredContext:
    """Reads stored features, one micro-batch ahead, in a thread."""

    def __init__(self, features: FeatureFolder, seq_len: int, device: torch.device):
        cuda = device.type == "cuda"
        # A new thread would pin its memory through GPU 0, whichever GPU this rank has.
        self._reader = ThreadPoolExecutor(1, "features", (lambda: torch.cuda.set_device(device)) if cuda else None)
        self._read = lambda part, rows: features.read(part, rows, seq_len, pin=cuda)
        self._coming: deque[Place] = deque()
        self._next: Future[torch.Tensor] | None = None

    def expect(self, places: Iterable[Place]) -> None:
        self._coming = deque(places)  # of a step that was not run, nothing is left
        self._read_next()

    def of(self, place: Place, batch: PackedBatch) -> torch.Tensor:
        assert self._next and self._coming[0] == place, "micro-batches are run in the order they were sampled in"
        features = self._next.result()
        self._coming.popleft()
        self._read_next()
        return features.to(batch.input_ids.device, non_blocking=True)

    def _read_next(self) -> None:
        self._next = self._reader.submit(self._read, *self._coming[0]) if self._coming else None


def describe_features(config: Config, info: TargetInfo, data: Data) -> dict[str, Any]:
    """All that features depend on: what must be the same where they are used."""
    parts = parts_of(data)
    return {
        "target": name_weights(info),
        "target.layer_ids": list(config.target.layer_ids),
        "target.dtype": config.target.dtype,
        "hidden size": info.text.hidden_size,
        "data.seq_len": config.data.seq_len,
        **{f"{name} rows": len(part.rows) for name, part in parts.items()},
        **{f"{name} fingerprint": part.fingerprint for name, part in parts.items()},
    }


class Source(NamedTuple):
    """What a run reads its context from, and the rows that it reads."""

    context: ContextSource
    embedding: torch.Tensor  # [V, H], the target's
    head: torch.Tensor  # [V, H]
    data: Data  # in rows


def make_context(config: Config, info: TargetInfo, data: Data, world: World) -> Source:
    """The source of the context that the config names, the target's embedding and LM head, and `data` in rows.

    Raises:
        ValueError: as `load_target`; or the stored features are of something else, or not all there.
    """
    if config.target.features is None:
        loaded, packs, told = load_probed(config, info, world)
        data = lay_out(data, packs, told, world)
        return Source(run_target(loaded, data), loaded.embedding, loaded.head, data)
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
    ends = load_ends(info, getattr(torch, config.target.dtype), world.device)
    if ends.note and world.is_main:
        print(ends.note)
    context = StoredContext(features, config.data.seq_len, world.device)
    return Source(context, ends.embedding, ends.head, data)


def load_probed(config: Config, info: TargetInfo, world: World) -> tuple[Target, bool, str]:
    """The target as the config wants it, whether it keeps the documents of a row apart, and how that is said.

    Raises:
        ValueError: as `load_target`; or its features know later tokens.
    """
    target, tokens = config.target, ordinary_tokens(info)
    loaded = load_target(
        info,
        target.layer_ids,
        getattr(torch, target.dtype),
        world,
        target.replicas,
        target.full_depth,
        target.attention,
    )
    if loaded.note and world.is_main:
        print(loaded.note)
    refuse_lookahead(loaded.model, world, tokens)
    packing = probe_packing(loaded.model, world, tokens, config.data.seq_len, config.train.micro_batch_size)
    return loaded, packing.exact, packing.describe(info.path)


def run_target(loaded: Target, data: Data) -> TargetContext:
    """The context of `data`, whose rows are laid out as the target wants them."""
    parts = parts_of(data)
    alone = None if data.packs else {name: part.rows.filled_tokens for name, part in parts.items()}
    return TargetContext(loaded.model, alone)


def stored_layout(index: dict[str, Any], folder: Path, info: TargetInfo) -> tuple[bool, str]:
    """Whether the rows that features are stored of hold several documents, and how that is said."""
    if PACKED in index:
        return index[PACKED], f"{folder} holds features of {'packed' if index[PACKED] else 'single'} documents"
    packs = expects_packing(info.text)
    told = "packed, although nobody tried whether the target keeps them apart: capture anew if in doubt"
    return packs, f"{folder} holds features of documents that an earlier version {told if packs else 'did not pack'}"


def open_folder(folder: Path, index: dict[str, Any], config: Config, info: TargetInfo, data: Data) -> FeatureFolder:
    """The folder for the rows of `data`; nothing is read or written yet."""
    filled = {name: part.rows.filled_tokens for name, part in parts_of(data).items()}
    width = len(config.target.layer_ids) * info.text.hidden_size
    return FeatureFolder(folder, index, filled, width, getattr(torch, config.target.dtype))


def parts_of(data: Data) -> dict[str, Part]:
    return {TRAIN: data.train} | ({HELD_OUT: data.held_out} if data.held_out else {})


def show_bytes(count: float) -> str:
    return f"{count / 2**30:,.2f} GiB" if count >= 2**30 else f"{count / 2**20:,.2f} MiB"
