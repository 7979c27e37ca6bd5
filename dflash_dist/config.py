"""Every knob of a run on one page: its default, its meaning and its unit.

A run is described by a YAML file with the sections below and by `section.name=value` overrides on the command line.
Whatever is unknown or impossible is refused here, before any model loads.
"""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import math
import operator
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dflash_dist.typed_yaml import knobs, read_dataclass

Dtype = Literal["float32", "bfloat16"]

# Decay of the loss weights by block size (arXiv 2602.06036, A.1).
PUBLISHED_GAMMA = {16: 7.0, 10: 5.0, 8: 4.0}
LIGHTEST = math.log(1e9)  # a slot that weighs a billionth of the first one would never be learned


# What becomes of a knob that is changed where a run goes on from a checkpoint. FIXED: it would be another run, which is
# refused. FREE: what is learned stays the same but for rounding, or is meant to change, which is said. Any other word
# names the entry in the run's identity (training/identity.py) that must be the same, however the knob spells it.
FIXED, FREE = "fixed", "free"


def knob(default: Any, meaning: str, resume: str, path: bool = False) -> Any:
    """A dataclass field that carries its meaning, what a resumed run may do with it, and whether it is a path."""
    metadata = {"meaning": meaning, "resume": resume, "path": path}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: default.copy(), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class TargetConfig:
    path: str = knob(
        "",
        "Hugging Face folder or hub id of the frozen target, or builtin:tiny (random, made on the spot)",
        "target weights",
        path=True,
    )
    revision: str = knob("main", "branch, tag or commit when path is a hub id", "target weights")
    trust_remote_code: bool = knob(
        False, "run Python code that the model brings: for architectures that transformers does not know", FIXED
    )
    layer_ids: list[int] = knob(
        [],
        "decoder layers whose outputs are captured, strictly increasing, never the last layer",
        "draft.target_layer_ids",
    )
    dtype: Dtype = knob("bfloat16", "dtype of the target's weights and of the captured features", FIXED)
    replicas: int = knob(
        1, "hybrid sharding: copies of the target, each sharded over world size / replicas ranks", FREE
    )
    full_depth: bool = knob(False, "load every layer, also those above the deepest captured one", FREE)
    attention: str | None = knob(None, "transformers attention implementation of the target; null: its default", FREE)
    features: str | None = knob(
        None,
        "folder of features that `capture` stored, to read instead of running the target; replicas, full_depth and"
        " attention then do nothing",
        FREE,
        path=True,
    )


@dataclass
class DataConfig:
    path: str | dict[str, float] = knob(
        "",
        "chats: a JSONL or Parquet file, a folder of these, a hub dataset org/name[/subset][:split][@revision], or"
        " builtin:chat (synthetic); several as a mapping of path to weight, where 2 counts a source twice an epoch",
        "data fingerprint",
        path=True,
    )
    val_path: str | None = knob(
        None, "held-out conversations, in any form that path may have", "held-out fingerprint", path=True
    )
    val_conversations: int = knob(
        0, "without val_path: how many conversations, spread over all, are held out", "data fingerprint"
    )
    seq_len: int = knob(3072, "length of a packed row [tokens]; longer conversations are cut at the end", FIXED)
    max_bad_rows: float = knob(
        0.0, "bad rows that are skipped before the data is refused: a count, or below 1 a share", FREE
    )
    chat_template: str | None = knob(
        None, "file with a chat template in Jinja; null: the target's own", "chat template", path=True
    )
    template_args: dict[str, Any] = knob({}, "arguments of the chat template, such as enable_thinking: false", FIXED)
    date: str | None = knob(
        None,
        "the day that a chat template writes, if it writes one (YYYY-MM-DD); null: the day on which the run began",
        "data fingerprint",
    )
    last_turn_only: bool = knob(False, "supervise only the assistant's last turn of a conversation", FIXED)
    drop_reasoning: bool = knob(False, "leave out the thinking before answers, for a target served without", FIXED)
    cache_dir: str | None = knob(
        None, "folder of tokenised data, shared by runs; null: ~/.cache/dflash_dist", FREE, path=True
    )


@dataclass
class DraftConfig:
    kind: str = knob("dflash", "kind of draft", FIXED)
    mask_token_id: int | None = knob(
        None, "id of the mask token: reserved, inside the vocabulary, not pad, eos or bos", FIXED
    )
    block_size: int = knob(16, "slots of a block, the anchor included [tokens]; serve with the same", FIXED)
    num_layers: int = knob(5, "decoder layers of the draft", FIXED)
    intermediate_size: int | None = knob(
        None, "width of the draft's MLP; null: as the target", "draft.intermediate_size"
    )
    num_attention_heads: int | None = knob(None, "query heads; null: as the target", "draft.num_attention_heads")
    num_key_value_heads: int | None = knob(None, "key/value heads; null: as the target", "draft.num_key_value_heads")
    head_dim: int | None = knob(None, "size of a head; null: as the target", "draft.head_dim")
    init: str = knob(
        "target",
        "a warm start from the target's own top layers, where a copy computes what they do; random: random weights; or"
        " folder or hub id of a draft to go on training, from which comes what is null above",
        "draft.init",
        path=True,
    )

    @property
    def proposals(self) -> int:
        """Tokens that a block proposes: all but the anchor."""
        return self.block_size - 1


@dataclass
class LossConfig:
    anchors: int = knob(512, "blocks sampled from a packed row, at most", FIXED)
    objective: Literal["decay", "dpace"] = knob(
        "dpace",
        "weights of a block's slots: a fixed decay, or by what the draft already gets right (arXiv 2605.18810)",
        FIXED,
    )
    alpha: float = knob(0.5, "dpace: what a slot counts behind one that is never right, from 0 to 1", FIXED)
    gamma: float | None = knob(
        None,
        "decay of the weights exp(-(k-1)/gamma), of logged losses always; null: 7, 5, 4 for blocks of 16, 10, 8",
        "loss.gamma",
    )
    chunk: int | None = knob(None, "slots whose logits exist at once; null: what suits the device", FREE)


@dataclass
class TrainConfig:
    max_steps: int | None = knob(None, "optimiser steps; null: as many as epochs ask for", FREE)
    epochs: float = knob(6.0, "passes over the packed rows, where max_steps is null", FREE)
    seed: int = knob(0, "seed of row order, anchors and initial weights", FIXED)
    global_batch_size: int = knob(64, "packed rows a step, over all ranks and micro-batches", FIXED)
    micro_batch_size: int = knob(1, "packed rows a rank runs at once", FREE)
    lr: float = knob(6e-4, "peak learning rate", FREE)
    warmup: float = knob(0.04, "share of the steps over which the learning rate rises linearly", FREE)
    final_lr: float = knob(0.1, "learning rate at the end of the cosine, as a share of lr", FREE)
    betas: list[float] = knob([0.9, 0.95], "AdamW's two decay rates", FREE)
    weight_decay: float = knob(0.0, "AdamW's decoupled weight decay", FREE)
    clip_norm: float = knob(1.0, "largest global norm of the gradient", FREE)
    precision: Dtype = knob(
        "bfloat16", "dtype of the draft's compute; parameters and optimiser are always float32", FIXED
    )
    shard_optimizer: bool = knob(
        False,
        "each rank keeps its share of AdamW's moments only (ZeRO-1): less memory, the new weights sent every step",
        FREE,
    )
    gradient_checkpointing: bool = knob(False, "recompute the draft's layers in backward: less memory, more time", FREE)
    compile: bool = knob(
        False, "torch.compile the draft's layers, before the first step; `bench --compile` tells what it gains", FREE
    )
    hang_timeout: float = knob(
        600.0,
        "how long [s] a rank may give no sign of life, or all ranks of a training get nowhere, before the others end"
        " with a message that names it; 0: for ever",
        FREE,
    )


@dataclass
class ValidateConfig:
    every: int = knob(0, "steps between validations on the held-out rows, also after the last step; 0: never", FREE)


@dataclass
class EvalConfig:
    every: int = knob(
        0,
        "steps between real decodings of a few prompts, also after the last step; the best checkpoint by their"
        " acceptance length is kept; needs target.full_depth; 0: never",
        FREE,
    )
    prompts: str | None = knob(
        None,
        "conversations whose last answer is decoded, in any form that data.path may have; null: those held out, spread"
        " over all",
        "decoded prompts",
        path=True,
    )
    count: int = knob(32, "prompts decoded, over all ranks", "decoded prompts")
    max_new_tokens: int = knob(256, "longest answer [tokens]", "decoded prompts")


@dataclass
class CheckpointConfig:
    every: int = knob(500, "steps between checkpoints; one is also saved at the end and on SIGTERM or SIGINT", FREE)
    keep: int = knob(2, "newest checkpoints kept, besides the best by eval", FREE)


@dataclass
class LogConfig:
    every: int = knob(10, "steps between logged steps", FREE)


@dataclass
class Config:
    output_dir: str = knob("", "folder of the run: resolved config, metrics, TensorBoard, checkpoints", FREE, path=True)
    target: TargetConfig = field(default_factory=TargetConfig)
    data: DataConfig = field(default_factory=DataConfig)
    draft: DraftConfig = field(default_factory=DraftConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    validate: ValidateConfig = field(default_factory=ValidateConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)

    @property
    def mask_token_id(self) -> int:
        assert self.draft.mask_token_id is not None, "load_config refuses a missing mask token"
        return self.draft.mask_token_id

    @property
    def gamma(self) -> float:
        """The decay in force: the stated one, or the published one for this block size."""
        return self.loss.gamma if self.loss.gamma is not None else PUBLISHED_GAMMA[self.draft.block_size]


KNOBS = knobs(Config)  # by dotted name


def load_config(path: str | Path, overrides: typing.Sequence[str] = ()) -> Config:
    """Reads a YAML file, applies `a.b=c` overrides and refuses what is unknown or impossible.

    Raises:
        ValueError: naming the file and the key, and what to write instead.
    """
    config = read_dataclass(Config, _there(path), overrides)
    _refuse_impossible(config)
    return config


def load_written(path: Path) -> Config:
    """Reads the config that a run wrote into its folder. Whether it is possible was asked when the run began.

    Raises:
        ValueError: naming the file, and what in it is damaged.
    """
    return read_dataclass(Config, _there(path))


def _there(path: str | Path) -> Path:
    if not Path(path).is_file():
        raise ValueError(f"config file {path} does not exist")
    return Path(path)


def values(config: Config) -> dict[str, Any]:
    """Every knob's value, by dotted name."""
    return {name: operator.attrgetter(name)(config) for name in KNOBS}


def to_tree(config: Config) -> dict[str, Any]:
    """The config as nested plain values, ready for YAML."""
    return dataclasses.asdict(config)


def describe() -> str:
    """All knobs with defaults and meanings, for `train --help`."""
    defaults = values(Config())
    return "\n".join(f"  {name} = {defaults[name]!r}: {knob.metadata['meaning']}" for name, knob in KNOBS.items())


def is_day(text: str) -> bool:
    """Whether a text is a day as YYYY-MM-DD."""
    try:
        return datetime.date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


def _refuse_impossible(config: Config) -> None:
    """Raises a ValueError for values that no target could make possible."""
    target, data, draft, loss, train = config.target, config.data, config.draft, config.loss, config.train

    def require(holds: bool, message: str) -> None:
        if not holds:
            raise ValueError(message)

    require(bool(config.output_dir), "output_dir is not set: name the folder that this run writes to")
    require(bool(target.path), "target.path is not set: name the model folder or hub id of the frozen target")
    require(bool(data.path), "data.path is not set: name a file, folder or hub dataset of conversations")
    if isinstance(data.path, dict):
        require(
            all(weight > 0 for weight in data.path.values()),
            f"data.path: the weight of a source must be positive, found {data.path}",
        )
    ids = target.layer_ids
    require(bool(ids), "target.layer_ids is empty: list the decoder layers to capture, such as [1, 9, 17, 25, 33]")
    require(ids[0] >= 0, f"target.layer_ids {ids}: ids count from 0, the first decoder layer")
    require(
        all(a < b for a, b in itertools.pairwise(ids)),
        f"target.layer_ids {ids} must be strictly increasing: serving engines sort them",
    )
    require(target.replicas >= 1, f"target.replicas must be at least 1, found {target.replicas}")
    require(
        draft.mask_token_id is not None,
        "draft.mask_token_id is not set: choose a reserved token of the target's vocabulary that no text contains",
    )
    require(
        draft.block_size >= 2,
        f"draft.block_size must be at least 2 (the anchor and one slot), found {draft.block_size}",
    )
    require(draft.num_layers >= 1, f"draft.num_layers must be at least 1, found {draft.num_layers}")
    for name in ("intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim"):
        size = getattr(draft, name)
        require(size is None or size >= 1, f"draft.{name} must be at least 1, or null for the target's, found {size}")
    require(draft.head_dim is None or draft.head_dim % 2 == 0, f"draft.head_dim must be even, found {draft.head_dim}")
    require(
        not (target.attention or "").startswith("flash_attention") or train.micro_batch_size == 1,
        "target.attention: flash_attention keeps packed documents apart in a single row only: set"
        " train.micro_batch_size to 1, or leave target.attention unset",
    )
    require(data.seq_len > 2, f"data.seq_len must be above 2 tokens, found {data.seq_len}")
    require(data.val_conversations >= 0, f"data.val_conversations must not be negative, found {data.val_conversations}")
    require(data.max_bad_rows >= 0, f"data.max_bad_rows must not be negative, found {data.max_bad_rows:g}")
    require(
        data.date is None or is_day(data.date), f"data.date must be a day as YYYY-MM-DD, or null, found {data.date!r}"
    )
    require(loss.anchors >= 1, f"loss.anchors must be at least 1, found {loss.anchors}")
    require(loss.chunk is None or loss.chunk >= 1, f"loss.chunk must be at least 1 slot, found {loss.chunk}")
    require(
        loss.gamma is not None or draft.block_size in PUBLISHED_GAMMA,
        f"loss.gamma has no published value for draft.block_size {draft.block_size}: set it (16 was trained with 7,"
        " 8 with 4)",
    )
    require(0 <= loss.alpha <= 1, f"loss.alpha is a share, from 0 to 1, found {loss.alpha}")
    require(loss.gamma is None or loss.gamma > 0, f"loss.gamma must be positive, found {loss.gamma}")
    require(
        (draft.block_size - 2) / config.gamma < LIGHTEST,
        f"loss.gamma {loss.gamma} leaves the last slot of a block of {draft.block_size} without weight: set it to at"
        f" least {math.ceil((draft.block_size - 2) / LIGHTEST)}",
    )
    require(
        train.max_steps is None or train.max_steps >= 0,
        f"train.max_steps must not be negative, found {train.max_steps}",
    )
    require(train.epochs > 0, f"train.epochs must be positive, found {train.epochs}")
    require(train.micro_batch_size >= 1, f"train.micro_batch_size must be at least 1, found {train.micro_batch_size}")
    require(
        train.global_batch_size >= 1 and train.global_batch_size % train.micro_batch_size == 0,
        f"train.global_batch_size {train.global_batch_size} must be a multiple of"
        f" train.micro_batch_size {train.micro_batch_size}",
    )
    require(train.lr > 0, f"train.lr must be positive, found {train.lr}")
    require(train.seed >= 0, f"train.seed must not be negative, found {train.seed}")
    require(
        0 <= train.warmup < 1, f"train.warmup is a share of the steps, at least 0 and below 1, found {train.warmup}"
    )
    require(0 <= train.final_lr <= 1, f"train.final_lr is a share of train.lr, from 0 to 1, found {train.final_lr}")
    require(
        len(train.betas) == 2 and all(0 <= beta < 1 for beta in train.betas),
        f"train.betas must be two numbers from 0 to below 1, found {train.betas}",
    )
    require(train.weight_decay >= 0, f"train.weight_decay must not be negative, found {train.weight_decay}")
    require(train.clip_norm > 0, f"train.clip_norm must be positive, found {train.clip_norm}")
    require(
        train.hang_timeout >= 0,
        f"train.hang_timeout must be a number of seconds, or 0 for none, found {train.hang_timeout}",
    )
    require(config.validate.every >= 0, f"validate.every must not be negative, found {config.validate.every}")
    require(
        config.validate.every == 0 or data.val_path is not None or data.val_conversations > 0,
        "validate.every is set but nothing is held out: set data.val_path or data.val_conversations",
    )
    require(config.eval.every >= 0, f"eval.every must not be negative, found {config.eval.every}")
    require(config.eval.count >= 1, f"eval.count must be at least 1, found {config.eval.count}")
    require(
        config.eval.max_new_tokens >= 2,
        "eval.max_new_tokens must be at least 2, since the first token comes without a draft, found"
        f" {config.eval.max_new_tokens}",
    )
    if config.eval.every:
        require(
            config.eval.prompts is not None or data.val_path is not None or data.val_conversations > 0,
            "eval.every is set but there is nothing to decode: set eval.prompts, data.val_path or"
            " data.val_conversations",
        )
        require(
            target.features is None,
            "eval.every is set but target.features takes the target's place: real decoding runs the target, so unset"
            " one of them; `evaluate` can measure the exports of such a run",
        )
        require(
            target.full_depth,
            "eval.every is set but only the captured layers of the target are loaded: real decoding needs all, so set"
            " target.full_depth to true",
        )
    require(config.checkpoint.every >= 1, f"checkpoint.every must be at least 1, found {config.checkpoint.every}")
    require(config.checkpoint.keep >= 1, f"checkpoint.keep must be at least 1, found {config.checkpoint.keep}")
    require(config.log.every >= 1, f"log.every must be at least 1, found {config.log.every}")
