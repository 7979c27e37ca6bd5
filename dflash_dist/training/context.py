"""Where the draft's context comes from: the target, run on the spot, or features that `capture` stored."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import torch

from dflash_dist.config import Config
from dflash_dist.data.packing import PackedBatch
from dflash_dist.data.rows import Data, Part
from dflash_dist.ranks import World
from dflash_dist.target.capture import HFDFlashTargetModel
from dflash_dist.target.features import FeatureFolder, read_index, refuse_other
from dflash_dist.target.load import TargetInfo, load_ends, load_target, name_weights

TRAIN, HELD_OUT = "train", "held-out"
Place = tuple[str, list[int]]  # part and numbers of the rows of a micro-batch


class ContextSource(Protocol):
    def expect(self, places: Iterable[Place]) -> None:
        """What will be asked for from now on, in this order."""

    def of(self, place: Place, batch: PackedBatch) -> torch.Tensor:
        """[B, S, L * H] in the target's dtype, for a batch on the device."""


class TargetContext:
    """Runs the target."""

    def __init__(self, target: HFDFlashTargetModel):
        self.target = target

    def expect(self, places: Iterable[Place]) -> None:
        pass

    def of(self, place: Place, batch: PackedBatch) -> torch.Tensor:
        return self.target.generate_batch(
            batch.input_ids, batch.attention_mask, batch.loss_mask, batch.position_ids
        ).hidden_states


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


def make_context(
    config: Config, info: TargetInfo, data: Data, world: World
) -> tuple[ContextSource, torch.Tensor, torch.Tensor]:
    """The source of the context that the config names, and the target's embedding and LM head.

    Raises:
        ValueError: as `load_target`; or the stored features are of something else, or not all there.
    """
    target, dtype = config.target, getattr(torch, config.target.dtype)
    if target.features is None:
        loaded = load_target(info, target.layer_ids, dtype, world, target.replicas, target.full_depth, target.attention)
        if loaded.note and world.is_main:
            print(loaded.note)
        return TargetContext(loaded.model), loaded.embedding, loaded.head
    folder = Path(target.features)
    index = read_index(folder)
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
    ends = load_ends(info, dtype, world.device)
    if ends.note and world.is_main:
        print(ends.note)
    return StoredContext(features, config.data.seq_len, world.device), ends.embedding, ends.head


def open_folder(folder: Path, index: dict[str, Any], config: Config, info: TargetInfo, data: Data) -> FeatureFolder:
    """The folder for the rows of `data`; nothing is read or written yet."""
    filled = {name: part.rows.filled_tokens for name, part in parts_of(data).items()}
    width = len(config.target.layer_ids) * info.text.hidden_size
    return FeatureFolder(folder, index, filled, width, getattr(torch, config.target.dtype))


def parts_of(data: Data) -> dict[str, Part]:
    return {TRAIN: data.train} | ({HELD_OUT: data.held_out} if data.held_out else {})


def show_bytes(count: float) -> str:
    return f"{count / 2**30:,.2f} GiB" if count >= 2**30 else f"{count / 2**20:,.2f} MiB"
