"""Stores the target's features of all rows: `python -m dflash_dist capture --config C.yaml --out DIR [a.b=c ...]`.

Alone or under torchrun. Training then reads them with `target.features=DIR` and never loads the target. A capture that
was interrupted keeps its finished shards and continues with the same command, also on another number of ranks.
"""

from __future__ import annotations

import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from dflash_dist.config import Config
from dflash_dist.data.packing import PackedRows
from dflash_dist.files import writing
from dflash_dist.logs import LOGS, keep_logs
from dflash_dist.options import ConfigOptions, option, parse
from dflash_dist.ranks import World, join_world
from dflash_dist.target.features import DATE, EACH, INDEX, FeatureFolder, Shard, read_index, refuse_other
from dflash_dist.target.load import check_loading
from dflash_dist.target.run import LiveTarget
from dflash_dist.training import setup
from dflash_dist.training.context import (
    PACKED,
    describe_features,
    load_probed,
    open_folder,
    parts_of,
    show_bytes,
    stored_layout,
)


@dataclass(frozen=True, kw_only=True)
class CaptureOptions(ConfigOptions):
    config: str = option("YAML file of the training run; see configs/")
    out: Path = option("folder of the features, on a disk that all ranks share")
    shard_mib: float = option("size of a shard [MiB]; a rank holds two of them", 1024)


def main(argv: list[str]) -> None:
    options = parse(CaptureOptions, "capture", __doc__, argv)
    config = options.load()
    folder = Path(config.output_dir)
    with keep_logs(folder), join_world(config.train.hang_timeout, folder / LOGS) as world:
        capture(config, options.out, world, options.shard_mib)


def capture(config: Config, out: Path, world: World, shard_mib: float = 1024) -> None:
    """Captures the features that are not in `out` yet.

    Raises:
        ValueError: as for training; or `out` holds other features, is not shared, or has too little room.
    """
    config = setup.make_builtins(config, world)
    config, info = setup.check_target(config, world)
    check_loading(info, config.target)
    config = setup.fix_date(config, info, world, out)
    data = setup.read_data(config, info, world)
    data.refuse_unsupervised()
    token_bytes = (
        (len(config.layer_ids) + config.needs_final)
        * info.text.hidden_size
        * getattr(torch, config.target.dtype).itemsize
    )
    size = sum(rows.tokens for rows in parts_of(data).values()) * token_bytes
    loaded, stored = None, share_folder(out, world)
    if stored is None:
        check_room(out, size, world)
        loaded, packs, told = load_probed(config, info, world)
    else:
        packs, told = stored_layout(stored, out, info)
    data = setup.lay_out(data, packs, told, world)
    rows_per_shard = max(1, int(shard_mib * 2**20) // (token_bytes * config.data.seq_len))
    index = describe_features(config, info, data) | {EACH: rows_per_shard, "bytes": size}
    if stored is None or PACKED in stored:
        index[PACKED] = packs
    if config.data.date and (stored is None or DATE in stored):
        index[DATE] = config.data.date  # so that the capture goes on with it, and training takes the same
    features = open_folder(out, index, config, info, data)
    if stored is not None:
        refuse_other(stored, dict.fromkeys(stored) | index, out)
    if world.is_main:
        features.begin()
    lacking = agree_on_lacking(features, world)
    if world.is_main:
        print(
            f"features: {show_bytes(size)} in {len(features.shards)} shards,"
            f" {show_bytes(features.bytes_of(lacking))} in {len(lacking)} still to capture"
        )
    check_room(out, features.bytes_of(lacking), world)
    if lacking:
        if loaded is None:
            loaded, exact, told = load_probed(config, info, world)
            if packs and not exact:
                raise ValueError(f"{out} holds features of packed rows, but {told}. Capture into another folder")
        rows = parts_of(data)
        run(
            features,
            lacking,
            LiveTarget(loaded.model, data.packs),
            rows,
            config.train.micro_batch_size,
            world,
            config.needs_final,
        )
    lacking = agree_on_lacking(features, world)
    if lacking:
        raise ValueError(f"{out} lacks {lacking[0].name}, which was just written: is it one folder for all ranks?")
    if world.is_main:
        print(f"captured: {show_bytes(features.bytes_of(features.shards))}; train with target.features={out}")


def share_folder(out: Path, world: World) -> dict[str, Any] | None:
    """Makes the folder, on the disk that all ranks share; returns the index that it holds already, if any.

    Raises:
        ValueError: it cannot be made, or some rank does not see it.
    """
    if world.is_main:
        with writing(f"the feature folder {out}"):
            out.mkdir(parents=True, exist_ok=True)
    world.barrier()
    folders, indices = world.sum_numbers(out.is_dir(), (out / INDEX).exists())
    refuse_unshared(folders, out, world)
    if indices:
        refuse_unshared(indices, out, world)
    return read_index(out) if indices else None


def agree_on_lacking(features: FeatureFolder, world: World) -> list[Shard]:
    """The shards that some rank does not see; the same list for all ranks.

    Raises:
        ValueError: the ranks do not share the folder.
    """
    world.barrier()
    lacking = set(features.lacking())
    there = (features.folder / INDEX).exists()
    ranks, *counts = world.sum_numbers(there, *(shard in lacking for shard in features.shards))
    refuse_unshared(ranks, features.folder, world)
    return [shard for shard, count in zip(features.shards, counts) if count]


def refuse_unshared(ranks: float, folder: Path, world: World) -> None:
    if ranks < world.size:
        raise ValueError(f"only {ranks:.0f} of {world.size} ranks see {folder}: put --out on a shared disk")


def check_room(out: Path, needed: int, world: World) -> None:
    """Says what room the disk has.

    Raises:
        ValueError: on all ranks, where `needed` [bytes] do not fit.
    """
    free = shutil.disk_usage(out).free
    if world.sum_numbers(world.is_main and needed > free)[0]:  # rank 0 decides: others read another number
        raise ValueError(
            f"the features take {show_bytes(needed)}, but {out} has {show_bytes(free)} free: choose another --out,"
            " fewer conversations or fewer target.layer_ids, or train without target.features"
        )


def run(
    features: FeatureFolder,
    lacking: list[Shard],
    target: LiveTarget,
    parts: dict[str, PackedRows],
    micro_batch_size: int,
    world: World,
    final: bool = False,
) -> None:
    """Captures and writes this rank's share of the shards; with `final`, the final state behind the layers."""
    held: dict[int, torch.Tensor] = {}
    mine = share(lacking, micro_batch_size, world)
    # A shard is written in the background while the next one is captured.
    with ThreadPoolExecutor(1) as writer:
        behind: Future[None] | None = None
        for shard, numbers in tqdm(mine, desc="capturing", unit=" micro-batches", disable=not world.is_main):
            rows = parts[shard.part]
            # As many rows as in training, so that the same kernels run and give the same bits.
            padding = [len(rows)] * (micro_batch_size - len(numbers))
            with world.expects_progress():  # not where it waits for a slow disk
                output = target.run(rows.batch([*numbers, *padding]).to(world.device), final)
                hidden = output.features if output.final is None else torch.cat([output.features, output.final], dim=-1)
            for row, states in zip(numbers, hidden):
                held[row] = states[: features.filled[shard.part][row]].to("cpu", copy=True)
            if len(held) == len(shard.rows):
                if behind:
                    behind.result()
                behind, held = writer.submit(features.write, shard, held), {}
        if behind:
            behind.result()


def share(lacking: list[Shard], micro_batch_size: int, world: World) -> list[tuple[Shard, list[int]]]:
    """This rank's shards, in micro-batches. The sharded target's forward is collective, so that all ranks get as many:
    a rank with fewer rows ends with micro-batches of none."""
    of_ranks = [
        [
            (shard, list(shard.rows[i : i + micro_batch_size]))
            for shard in lacking[rank :: world.size]
            for i in range(0, len(shard.rows), micro_batch_size)
        ]
        for rank in range(world.size)
    ]
    mine = of_ranks[world.rank]
    return mine + [(lacking[0], [])] * (max(map(len, of_ranks)) - len(mine))
