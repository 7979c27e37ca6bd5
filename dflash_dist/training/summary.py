"""What a run says of itself: before its first step, and at its end."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import torch

from dflash_dist.config import Config
from dflash_dist.data.packing import PackedRows
from dflash_dist.draft.base import Draft
from dflash_dist.ranks import World
from dflash_dist.target.load import TargetInfo
from dflash_dist.target.run import LiveTarget
from dflash_dist.training.checkpoint import BEST, CHECKPOINTS, best_step, step_folders
from dflash_dist.training.context import Source, show_bytes
from dflash_dist.training.curves import METRICS, Curve, read_curves, seconds_in_steps
from dflash_dist.training.metrics import BOARD
from dflash_dist.training.setup import planned_steps
from dflash_dist.training.workload import Workload

# What is told of a run's course -> its tag, and whether more of it is better.
TOLD = {
    "training loss": ("train/loss", False),
    "held-out loss": ("val/loss", False),
    "held-out tau": ("val/tau", True),
    "real tau": ("eval/tau", True),
}


def describe_begin(
    config: Config, world: World, info: TargetInfo, source: Source, draft: Draft, begun: list[str]
) -> Iterator[str]:
    """What is trained on what, a line a fact.

    Args:
        begun: what the draft begins as.
    """
    layers, block = draft.shape.num_layers, draft.shape.block_size
    parameters = sum(parameter.numel() for parameter in draft.parameters())
    yield f"target  {describe_target(config, info, source)}"
    yield f"draft   {config.draft.kind} of {layers} layers, {parameters:,} parameters, blocks of {block}"
    yield from (f"        {line}" for line in begun)
    device = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "CPU"
    yield f"ranks   {world.size} x {device}, the draft computes in {config.train.precision}"
    yield f"work    {describe_steps(config, source.data.train)}"
    yield f"mask    {describe_mask_token(config.mask_token_id, info, source.data.train)}"


def describe_target(config: Config, info: TargetInfo, source: Source) -> str:
    held, runs = [source.embedding, source.head], f"not run, its features are read from {config.target.features}"
    if isinstance(source.target, LiveTarget):
        decoder = source.target.model
        layers = len(decoder._get_transformer_layers())
        runs = f"{layers} of {info.text.num_hidden_layers} layers in {config.target.dtype}"
        held += [getattr(weight, "_local_tensor", weight) for weight in decoder.model.parameters()]
    size = sum({tensor.data_ptr(): tensor.nbytes for tensor in held}.values())  # ends may be those of the decoder
    return f"{info.path}: {runs}; {show_bytes(size)} a rank, embedding and LM head included"


def describe_steps(config: Config, rows: PackedRows) -> str:
    steps, batch = planned_steps(config, len(rows)), config.train.global_batch_size
    epochs = steps * batch / len(rows)
    return (
        f"{steps:,} steps of {batch} rows of {config.data.seq_len} tokens: {epochs * rows.tokens:,.0f} tokens,"
        f" {epochs:.3g} epochs of {len(rows):,} rows"
    )


def describe_mask_token(number: int, info: TargetInfo, rows: PackedRows) -> str:
    """What the mask token is, and whether it is one that no text contains."""
    name = info.tokenizer.convert_ids_to_tokens(number)
    found, looked_at = rows.count(number)
    of = f"{looked_at:,} tokens" + (" looked at" if looked_at < rows.tokens else "")
    seen = (
        f"FOUND {found:,} times in {of} of the data: choose one that no text contains"
        if found
        else f"in none of {of} of the data"
    )
    return f"token {number}, {name!r}, {seen}" if name else f"token {number}, none of the tokenizer's own, {seen}"


def describe_end(config: Config, work: Workload) -> Iterator[str]:
    """How far a finished run has come, where that lies, and what is next."""
    folder = Path(config.output_dir)
    curves, checkpoints = read_curves(folder), folder / CHECKPOINTS
    step, newest = max(step_folders(checkpoints).items())
    training = timedelta(seconds=round(seconds_in_steps(curves)))
    yield f"done        {step:,} steps in {training}, {work.tokens_seen(step):,} tokens seen"
    yield from describe_curves(curves)
    best = best_step(checkpoints)
    others = f"; the best by real tau is {checkpoints / BEST}, of step {best}" if best else ""
    yield f"checkpoint  {newest}" + (", the best by real tau" if best == step else others)
    yield f"curves      {folder / METRICS}; tensorboard --logdir {folder / BOARD}"
    command = ["export", "--run", str(folder), "--out", f"drafts/{folder.resolve().name}"]
    command += ["--step", "best"] if best not in (None, step) else []
    yield f"next        python -m dflash_dist {shlex.join(command)}"


def describe_curves(curves: dict[str, Curve]) -> Iterator[str]:
    """What a run learned, as a table; a warning where it knows less than in the beginning."""
    shown = {name: (dict(curves[tag]), more) for name, (tag, more) in TOLD.items() if tag in curves}
    if shown:
        yield f"{'':<16}{'begin':>9}{'best':>9}{'at step':>9}{'end':>9}"
    for name, (values, more) in shown.items():
        best = (max if more else min)(values, key=values.__getitem__)
        first, *_, last = [*values.values()] * 2
        yield f"{name:<16}{first:>9.3f}{values[best]:>9.3f}{best:>9}{last:>9.3f}"
    losses = [loss for _, loss in curves.get("val/loss", [])]
    if losses and losses[-1] > losses[0]:
        yield (
            f"WARNING: the held-out loss ends above its start ({losses[0]:.3f} -> {losses[-1]:.3f}), it unlearned:"
            " lower train.lr, or train on more data"
        )
