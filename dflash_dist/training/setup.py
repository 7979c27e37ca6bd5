"""What a run needs, made from its config: target, data, draft. Everything that can be refused is refused in this order,
cheapest first."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import platform
import signal
import typing
from collections.abc import Collection, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml

from dflash_dist import __version__
from dflash_dist.config import Config, DraftConfig, load_written, to_tree, values
from dflash_dist.contract.folder import check_draft, find_draft, read_draft, read_kind
from dflash_dist.data import regenerated
from dflash_dist.data.rows import Data, load_data, make_encoder
from dflash_dist.data.sources import find_sources
from dflash_dist.data.template import settle_day
from dflash_dist.draft.base import Draft
from dflash_dist.draft.kinds import kind_of
from dflash_dist.draft.shape import FULL_ATTENTION, SLIDING_ATTENTION, DraftShape
from dflash_dist.draft.visibility import VISIBILITY
from dflash_dist.files import locked, whole, writing
from dflash_dist.logs import say_phase, show_status
from dflash_dist.ranks import World
from dflash_dist.reading import is_kind
from dflash_dist.target.choices import Choice, check_capture, check_mask_token, layers_to_capture, mask_token
from dflash_dist.target.features import DATE, INDEX, read_index
from dflash_dist.target.folder import check_decoder
from dflash_dist.target.load import (
    TargetInfo,
    check_loading,
    check_replicas,
    read_info,
)
from dflash_dist.target.tiny import BUILTIN_CHAT, BUILTIN_TARGET, make_tiny_chats, make_tiny_target
from dflash_dist.target.warm_start import warm_start

# In the run folder; PREEMPTED is there after a run that was asked to stop before its end.
CONFIG, CHAT_TEMPLATE, PREEMPTED = "config.yaml", "chat_template.jinja", "PREEMPTED"


@contextlib.contextmanager
def claim_folder(folder: Path, world: World) -> Iterator[None]:
    """Makes the run folder and holds it while the run lasts, so that no second run writes to it.

    Raises:
        ValueError: the folder cannot be written to, or another run holds it.
    """

    def refuse(holder: str) -> None:
        raise ValueError(f"output_dir {folder} is in use by {holder}: choose another, or wait")

    with contextlib.ExitStack() as held:
        if world.is_main:
            with writing(f"output_dir {folder}"):
                held.enter_context(locked(folder / ".lock", refuse))
            (folder / PREEMPTED).unlink(missing_ok=True)
        yield


@contextlib.contextmanager
def stoppable(folder: Path, world: World) -> Iterator[None]:
    """Set-up may take hours and has nothing to save: in here SIGUSR1, which Slurm sends to every process ahead of its
    time limit, ends them at once, and as a run ends that is to go on. Not so SIGTERM: torchrun also sends it where
    another rank has failed."""

    def stop(_number: int, _frame: object) -> None:
        if world.is_main:
            (folder / PREEMPTED).touch()
            os.write(2, b"stopped before the first step; start the same command again to continue\n")
        os._exit(0)

    before = signal.signal(signal.SIGUSR1, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR1, before)


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
    """Refuses a world size that the batch or the copies of the target do not divide by.

    Raises:
        ValueError: with what fits.
    """
    if config.target.features is None:
        check_replicas(config.target.replicas, world.size)
    batch, micro = config.train.global_batch_size, config.train.micro_batch_size
    ranks = world.rows_size
    if batch % (micro * ranks):
        each, rest = divmod(batch, ranks)
        smaller = "" if rest else f", or a train.micro_batch_size that divides {each}"
        raise ValueError(
            f"train.global_batch_size {batch} does not divide by {ranks} ranks x train.micro_batch_size {micro}:"
            f" choose a multiple of {micro * ranks}, or a number of ranks that divides {batch // micro}{smaller}"
        )


def check_target(config: Config, world: World) -> tuple[Config, TargetInfo]:
    """Reads what is known of the target without its weights; the config with what it leaves to the target, said aloud.

    Raises:
        ValueError: the config does not fit the target.
    """
    target = config.target
    info = read_info(target.path, target.revision, target.trust_remote_code)
    ids, token = choose(config, info)
    check_capture(info, ids.value)
    check_mask_token(info, token.value)
    if world.is_main:
        for name, choice in (("target.layer_ids", ids), ("draft.mask_token_id", token)):
            if choice.why:
                print(f"{name}: {choice.value}, {choice.why}")
        for line in unpublished(config):
            print(line)
    return config.filled_in(ids.value, token.value), info


def unpublished(config: Config) -> list[str]:
    """How this run differs from what the draft's kind was published with, a line a knob."""
    ours, kind = values(config), kind_of(config.draft.kind)
    return [
        f"{name}: {ours[name]}; draft.kind {config.draft.kind} was published with {theirs}"
        for name, theirs in kind.published.items()
        if ours[name] != theirs
    ]


def choose(config: Config, info: TargetInfo, found: Collection[int] = ()) -> tuple[Choice, Choice]:
    """The layers to capture and the mask token: as stated, as those of the draft to begin from, or what suits the
    target.

    Args:
        found: tokens that the data holds.

    Raises:
        ValueError: no token is left.
    """
    ids, token = Choice(config.target.layer_ids, ""), Choice(config.draft.mask_token_id, "")
    layers, begun_from = info.text.num_hidden_layers, None
    if None in (ids.value, token.value) and (folder := draft_to_begin_from(config)):
        begun_from = read_kind(folder, layers)[1]
    if ids.value is None and begun_from:
        ids = Choice(begun_from.target_layer_ids, f"as {config.draft.init}")
    elif ids.value is None:
        spread = layers_to_capture(layers)
        ids = Choice(spread, f"{len(spread)} of {layers}, spread evenly from the 2nd to the 3rd-from-last")
    if token.value is None and begun_from:
        token = Choice(begun_from.mask_token_id, f"as {config.draft.init}")
    elif token.value is None and not (token := mask_token(info, found) or token).why:
        raise ValueError(
            f"draft.mask_token_id is not set, and every token of {info.path} may stand in a text: name one that your"
            " data does not hold"
        )
    return ids, token


def check_models(config: Config, info: TargetInfo) -> None:
    """Refuses weights of the target and of a draft to begin from that could not be loaded, before the data is read.

    Raises:
        ValueError: as `check_loading`, `draft_shape`, `check_draft` and `read_index`. Where stored features take the
            target's place, a draft that does not begin as the target needs few of its weights.
    """
    target = config.target
    if target.features is not None:
        read_index(Path(target.features))
    if target.features is None or config.draft.init == "target":
        check_loading(info, target)
    shape = draft_shape(config, info.text, info.path)
    if folder := draft_to_begin_from(config):
        check_draft(folder, shape.num_target_layers)


def fix_date(config: Config, info: TargetInfo, world: World, features: Path | None = None) -> Config:
    """Settles which day the chat template writes, where it writes one and the config leaves that open: the day of the
    features that are read or continued, of the run that this folder holds already, or today. The same on all ranks.

    Args:
        features: the folder that a capture writes to.

    Raises:
        ValueError: as `make_encoder`.
    """
    if config.data.date or not make_encoder(config.data, info.tokenizer, info.stop_ids).writes_date:
        return config
    stored = features or (Path(config.target.features) if config.target.features else None)
    known = _date_of_features(stored) if stored else None
    date = settle_day(world.agree_on_day, known, _date_of_run(Path(config.output_dir)))
    return dataclasses.replace(config, data=dataclasses.replace(config.data, date=date))


def _date_of_features(folder: Path) -> str | None:
    return read_index(folder).get(DATE) if (folder / INDEX).exists() else None


def _date_of_run(folder: Path) -> str | None:
    with contextlib.suppress(OSError, ValueError):  # there is none, or half of it, of a run that was killed early
        return load_written(folder / CONFIG).data.date
    return None


def read_data(config: Config, info: TargetInfo, world: World) -> Data:
    """The documents that the run learns from and those held out, one a row until it is known whether the target keeps
    more of them apart; says what became of the data.

    Raises:
        ValueError: as `load_data`; or the ranks read different data.
    """
    if config.eval.every and config.eval.prompts:
        find_sources(config.eval.prompts)  # refuses what is not there before hours of tokenising
    say_phase("reading and tokenising the data")
    encoder = make_encoder(config.data, info.tokenizer, info.stop_ids, info.text.vocab_size)
    if world.is_main:
        for line in regenerated.warnings(config):
            print(line)
    data = load_data(config.data, encoder, config.train.seed, pack=False)
    if not world.agrees_on(int(data.train.fingerprint[:12], 16)):
        raise ValueError("the ranks read different data: every node must see the same files under data.path")
    if world.is_main:
        for line in data.describe():
            print(line)
        if encoder.writes_date:
            print(f"the chat template writes a date, in this run {encoder.date} (data.date)")
    return data


def lay_out(data: Data, packs: bool, told: str, world: World) -> Data:
    """The rows of the run: documents packed, or one a row; says so, and `told`, why."""
    show_status("packing the documents into rows")
    data = data.packed() if packs else data
    if world.is_main:
        for line in (told, *data.describe_rows()):
            print(line)
    return data


def planned_steps(config: Config, num_rows: int) -> int:
    """Optimiser steps of the run: as stated, or as many as its epochs ask for."""
    train = config.train
    if train.max_steps is not None:
        return train.max_steps
    return math.ceil(train.epochs * num_rows / train.global_batch_size)


def draft_shape(config: Config, text: Any, path: str) -> DraftShape:
    """The draft's shape: as stated, and otherwise as that of the draft that it begins from, or of the target's `text`
    decoder at `path`.

    The draft always trains with plain rotary positions, at the target's base frequency, so that none of the target's
    rotary scaling belongs into its config.

    Raises:
        ValueError: as `check_decoder`, or the stated numbers do not fit it or the draft to begin from.
    """
    draft = config.draft
    check_decoder(text, path)
    inherited: dict[str, Any] = {
        "num_attention_heads": text.num_attention_heads,
        "num_key_value_heads": text.num_key_value_heads,
        "head_dim": getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        "intermediate_size": text.intermediate_size,
        "rms_norm_eps": text.rms_norm_eps,
        "rope_theta": _rope_theta(text),
        "max_position_embeddings": text.max_position_embeddings,
    }
    folder = draft_to_begin_from(config)
    kind, begun_from = kind_of(draft.kind), None
    if folder:
        of_folder, begun_from = read_kind(folder, text.num_hidden_layers)
        if of_folder not in (kind, kind_of("dflash")):  # of which every kind can begin
            raise ValueError(f"draft.init: {draft.init} is of another kind than draft.kind {draft.kind}")
    inherited |= _visibility(draft)
    if begun_from:
        inherited |= {name: getattr(begun_from, name) for name in inherited if name not in VISIBILITY}
        inherited |= {name: getattr(begun_from, name) for name in kind.Shape.of_kind() if hasattr(begun_from, name)}
    inherited |= _options(draft, kind)
    if begun_from and draft.window is None and not draft.causal:  # unless another one is asked for
        inherited |= {name: getattr(begun_from, name) for name in inherited if name in VISIBILITY}
    stated = {name: getattr(draft, name, None) for name in inherited}
    shape = kind.Shape(
        hidden_size=text.hidden_size,
        num_layers=draft.num_layers,
        block_size=draft.block_size,
        mask_token_id=config.mask_token_id,
        target_layer_ids=list(config.layer_ids),
        num_target_layers=text.num_hidden_layers,
        vocab_size=text.vocab_size,
        **inherited | {name: value for name, value in stated.items() if value is not None},
    )
    if begun_from:
        _refuse_another(shape, begun_from, draft.init)
    if shape.num_attention_heads % shape.num_key_value_heads:
        raise ValueError(
            f"draft.num_attention_heads {shape.num_attention_heads} must be a multiple of draft.num_key_value_heads"
            f" {shape.num_key_value_heads}"
        )
    if config.data.seq_len > shape.max_position_embeddings:
        raise ValueError(
            f"data.seq_len {config.data.seq_len} is above the {shape.max_position_embeddings} positions of"
            f" {draft.init if begun_from else path}: set it to at most that"
        )
    return shape


def _options(draft: DraftConfig, kind: type[Draft]) -> dict[str, Any]:
    """What the config says of what only this kind has."""
    types = typing.get_type_hints(kind.Shape)
    for name, value in draft.options.items():
        if name not in kind.Shape.of_kind():
            has = ", ".join(kind.Shape.of_kind()) or "none"
            raise ValueError(f"draft.options: {name!r} is none of what draft.kind {draft.kind} has: {has}")
        kind_of_value = types[name]
        if not is_kind(value, kind_of_value) or (is_kind(value, int) and value < 1):
            shown = getattr(kind_of_value, "__name__", kind_of_value)
            raise ValueError(f"draft.options: {name} must be a {shown}, found {value!r}")
    return draft.options


def _visibility(draft: DraftConfig) -> dict[str, Any]:
    """What the config says of what layers see, as a draft's shape has it."""
    if draft.window is None:
        return {"layer_types": None, "sliding_window": None, "is_causal": draft.causal}
    full = [number in draft.full_layers for number in range(draft.num_layers)]
    types = [FULL_ATTENTION if sees_all else SLIDING_ATTENTION for sees_all in full]
    window = None if all(full) else draft.window
    return {"layer_types": types if window else None, "sliding_window": window, "is_causal": draft.causal}


def draft_to_begin_from(config: Config) -> Path | None:
    """The folder of the draft that `draft.init` names, if it names one.

    Raises:
        ValueError: there is no such draft.
    """
    init = config.draft.init
    if not config.draft.begins_trained:
        return None
    folder = find_draft(init)
    if not folder.is_dir():
        raise ValueError(f"draft.init: {init!r} is neither random nor target, nor the folder or hub id of a draft")
    return folder


def _refuse_another(shape: DraftShape, begun_from: DraftShape, name: str) -> None:
    """Refuses to begin from a draft that is not of the shape that this run trains."""
    ours, theirs = (
        {k: v for k, v in dataclasses.asdict(of).items() if k not in VISIBILITY} for of in (shape, begun_from)
    )
    knobs = {"target_layer_ids": "target.layer_ids"} | {
        key: f"the target's {key}" for key in ("hidden_size", "vocab_size", "num_target_layers")
    }
    knobs |= {key: f"draft.options {key}" for key in type(shape).of_kind()}
    others = [
        f"{knobs.get(key, f'draft.{key}')} is {ours[key]}, its own {theirs[key]}"
        for key in ours
        if key in theirs and ours[key] != theirs[key]
    ]
    if others:
        raise ValueError(f"draft.init: {name} is another draft than this config describes: {'; '.join(others)}")


def _rope_theta(text: Any) -> float:
    rope: Any = getattr(text, "rope_parameters", None) or {}
    rope = rope.get("full_attention") or rope.get("sliding_attention") or rope  # some give it for each kind of layer
    return float(rope.get("rope_theta") or getattr(text, "rope_theta", 10_000.0))


def make_draft(config: Config, info: TargetInfo) -> tuple[Draft, list[str]]:
    """The draft in float32 on the host, the same on every rank; and what it begins as, a line a fact."""
    shape = draft_shape(config, info.text, info.path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.train.seed)
        draft = kind_of(config.draft.kind)(shape, config.train.gradient_checkpointing)
    if config.draft.init == "target":
        say_phase("comparing the target's layers with the draft's")
        return draft, warm_start(draft, info)
    if folder := draft_to_begin_from(config):
        begun_from = read_draft(folder, torch.float32, torch.device("cpu"), shape.num_target_layers)
        # Of a plain draft, the rest stays as it begins: not there, as far as proposals go.
        draft.load_state_dict(draft.state_dict() | begun_from.state_dict())
        return draft, [f"the draft begins as {config.draft.init}"]
    return draft, ["the draft begins with random weights"]


def describe_run(config: Config) -> str:
    """Writes the resolved config, the versions and a chat template of the run's own into the run folder; returns the
    config as YAML."""
    folder = Path(config.output_dir)
    text = yaml.safe_dump(to_tree(config), sort_keys=False)
    packages = ("torch", "transformers", "tokenizers", "safetensors")
    versions = {"dflash_dist": __version__, "python": platform.python_version()}
    versions |= {name: version(name) for name in packages}
    with writing(folder):
        contents = {CONFIG: text, "versions.json": json.dumps(versions, indent=2)}
        if config.data.chat_template:
            contents[CHAT_TEMPLATE] = Path(config.data.chat_template).read_text(encoding="utf-8")
        for name, content in contents.items():
            with whole(folder / name) as file:
                file.write_text(content)
    return text
