"""Every knob of a run on one page: its default, its meaning and its unit.

A run is described by a YAML file with the sections below and by `section.name=value` overrides on the command line.
Whatever is unknown or impossible is refused here, before any model loads.
"""

import dataclasses
import datetime
import itertools
import json
import math
import operator
import shutil
import textwrap
import typing
from collections.abc import Iterator, Sequence
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, TypeAdapter
from pydantic.dataclasses import dataclass

from dflash_dist.typed_yaml import Section, knobs, read

# Decay of the loss weights by block size (arXiv 2602.06036, A.1).
PUBLISHED_GAMMA = {16: 7.0, 10: 5.0, 8: 4.0}
# Peak learning rates: the paper's, and for a draft that is trained already, which the former would first undo. AdamW's
# moments begin anew for that one, too: its first steps would be the largest.
PUBLISHED_LR, FINE_TUNING_LR, FINE_TUNING_WARMUP = 6e-4, 6e-5, 20
LIGHTEST = math.log(1e9)  # a slot that weighs a billionth of the first one would never be learned


# What becomes of a knob that is changed where a run goes on from a checkpoint. FIXED: it would be another run, which is
# refused. FREE: what is learned stays the same but for rounding, or is meant to change, which is said. Any other word
# names the entry in the run's identity (training/identity.py) that must be the same, however the knob spells it.
FIXED, FREE = "fixed", "free"


def knob(default: Any, meaning: str, resume: str, path: bool = False, **bounds: Any) -> Any:
    """A dataclass field that carries its meaning, what a resumed run may do with it, whether it is a path, and the
    bounds of its value (pydantic's: ge, gt, le, lt, multiple_of, ...)."""
    metadata = {"description": meaning, "resume": resume, "path": path, **bounds}
    if isinstance(default, (list, dict)):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def is_day(text: str) -> bool:
    """Whether a text is a day as YYYY-MM-DD."""
    try:
        return datetime.date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


def _day(text: str) -> str:
    if not is_day(text):
        raise ValueError(f" must be a day as YYYY-MM-DD, found {text!r}")
    return text


Dtype = Literal["float32", "bfloat16"]
DistanceName = Literal["ce", "kl", "tv", "lk"]
Day = Annotated[str, AfterValidator(_day)]
Id = Annotated[int, Field(ge=0)]
Weight = Annotated[float, Field(gt=0)]
Rate = Annotated[float, Field(ge=0, lt=1)]


@dataclass
class TargetConfig(Section):
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
    layer_ids: list[Id] | None = knob(
        None,
        "decoder layers whose outputs are captured, strictly increasing, never the last layer; null: five,"
        " evenly from the second to the third from last, or those of the draft to go on with",
        "draft.target_layer_ids",
    )
    dtype: Dtype = knob("bfloat16", "dtype of the target's weights and of the captured features", FIXED)
    replicas: int = knob(
        1, "hybrid sharding: copies of the target, each sharded over world size / replicas ranks", FREE, ge=1
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
class DataConfig(Section):
    path: str | dict[str, Weight] = knob(
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
        0, "without val_path: how many conversations, spread over all, are held out", "data fingerprint", ge=0
    )
    seq_len: int = knob(3072, "length of a packed row [tokens]; longer conversations are cut at the end", FIXED, gt=2)
    max_bad_rows: float = knob(
        0.0, "bad rows that are skipped before the data is refused: a count, or below 1 a share", FREE, ge=0
    )
    chat_template: str | None = knob(
        None, "file with a chat template in Jinja; null: the target's own", "chat template", path=True
    )
    template_args: dict[str, Any] = knob({}, "arguments of the chat template, such as enable_thinking: false", FIXED)
    date: Day | None = knob(
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
class DraftConfig(Section):
    kind: str = knob("dflash", "kind of draft: dflash, dflash2, dspark, lilicorr or domino", FIXED)
    options: dict[str, Any] = knob(
        {}, "what only this kind has, by the names in its config.json, such as markov_rank: 64 of dspark", FIXED
    )
    mask_token_id: int | None = knob(
        None,
        "id of the mask token: reserved, inside the vocabulary, not pad, eos or bos; null: the first token that no text"
        " contains, or that of the draft to go on with",
        FIXED,
    )
    block_size: int = knob(16, "slots of a block, the anchor included [tokens]; serve with the same", FIXED, ge=2)
    num_layers: int = knob(5, "decoder layers of the draft", FIXED, ge=1)
    intermediate_size: int | None = knob(
        None, "width of the draft's MLP; null: as the target", "draft.intermediate_size", ge=1
    )
    num_attention_heads: int | None = knob(None, "query heads; null: as the target", "draft.num_attention_heads", ge=1)
    num_key_value_heads: int | None = knob(
        None, "key/value heads; null: as the target", "draft.num_key_value_heads", ge=1
    )
    head_dim: int | None = knob(None, "size of a head; null: as the target", "draft.head_dim", ge=2, multiple_of=2)
    window: int | None = knob(
        None,
        "tokens that a layer sees, itself included, so that serving costs no more with longer texts; null: all before"
        " the anchor, or as the draft to go on with",
        FIXED,
        ge=2,
    )
    full_layers: list[Id] = knob([], "layers without the window, such as [4]: the last of five", FIXED)
    causal: bool = knob(
        False, "slots of a block see those before them only; without window and this, as the draft to go on with", FIXED
    )
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

    @property
    def begins_trained(self) -> bool:
        """Whether `init` names a draft to go on training."""
        return self.init not in ("random", "target")


@dataclass
class LossConfig(Section):
    anchors: int = knob(512, "blocks sampled from a packed row, at most", FIXED, ge=1)
    objective: Literal["decay", "dpace"] = knob(
        "dpace",
        "weights of a block's slots: a fixed decay, or by what the draft already gets right (arXiv 2605.18810)",
        FIXED,
    )
    distance: DistanceName | dict[DistanceName, Weight] = knob(
        "ce",
        "what a slot's loss is: ce, cross-entropy of the data's token; or how far the draft is from all that the target"
        " foresees there, by KL divergence (kl), total variation (tv), or from the former to the latter as they overlap"
        " (lk, arXiv 2602.23881); several as a mapping of name to weight. All but ce run the target to its end",
        FIXED,
    )
    temperature: float = knob(
        1.0, "at which kl, tv and lk compare the draft with the target: that of serving, if it is sampled", FIXED, gt=0
    )
    alpha: float = knob(0.5, "dpace: what a slot counts behind one that is never right, from 0 to 1", FIXED, ge=0, le=1)
    gamma: float | None = knob(
        None,
        "decay of the weights exp(-(k-1)/gamma), of logged losses always; null: 7, 5, 4 for blocks of 16, 10, 8",
        "loss.gamma",
        gt=0,
    )
    head_weight: float = knob(
        1.0,
        "what the loss of a kind's own scores counts beside the cross-entropy, in kinds that have some",
        FIXED,
        ge=0,
    )
    chunk: int | None = knob(None, "slots whose logits exist at once; null: what suits the device", FREE, ge=1)


@dataclass
class TrainConfig(Section):
    max_steps: int | None = knob(None, "optimiser steps; null: as many as epochs ask for", FREE, ge=0)
    epochs: float = knob(6.0, "passes over the packed rows, where max_steps is null", FREE, gt=0)
    seed: int = knob(0, "seed of row order, anchors and initial weights", FIXED, ge=0)
    global_batch_size: int = knob(64, "packed rows a step, over all ranks and micro-batches", FIXED, ge=1)
    micro_batch_size: int = knob(1, "packed rows a rank runs at once", FREE, ge=1)
    lr: float | None = knob(
        None,
        f"peak learning rate; null: {PUBLISHED_LR:g}, or {FINE_TUNING_LR:g} where draft.init names a draft",
        FREE,
        gt=0,
    )
    warmup: float = knob(
        0.04,
        "share of the steps over which the learning rate rises linearly; above 0, at least"
        f" {FINE_TUNING_WARMUP} steps where draft.init names a draft",
        FREE,
        ge=0,
        lt=1,
    )
    final_lr: float = knob(0.1, "learning rate at the end of the cosine, as a share of lr", FREE, ge=0, le=1)
    betas: list[Rate] = knob([0.9, 0.95], "AdamW's two decay rates", FREE, min_length=2, max_length=2)
    weight_decay: float = knob(0.0, "AdamW's decoupled weight decay", FREE, ge=0)
    clip_norm: float = knob(1.0, "largest global norm of the gradient", FREE, gt=0)
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
        ge=0,
    )


@dataclass
class ValidateConfig(Section):
    every: int = knob(
        0, "steps between validations on the held-out rows, also after the last step; 0: never", FREE, ge=0
    )


@dataclass
class EvalConfig(Section):
    every: int = knob(
        0,
        "steps between real decodings of a few prompts, also after the last step; the best checkpoint by their"
        " acceptance length is kept; needs target.full_depth; 0: never",
        FREE,
        ge=0,
    )
    prompts: str | None = knob(
        None,
        "conversations whose last answer is decoded, in any form that data.path may have; null: those held out, spread"
        " over all",
        "decoded prompts",
        path=True,
    )
    count: int = knob(32, "prompts decoded, over all ranks", "decoded prompts", ge=1)
    max_new_tokens: int = knob(256, "longest answer [tokens]", "decoded prompts", ge=2)


@dataclass
class CheckpointConfig(Section):
    every: int = knob(
        500, "steps between checkpoints; one is also saved at the end and on SIGTERM or SIGINT", FREE, ge=1
    )
    keep: int = knob(2, "newest checkpoints kept, besides the best by eval", FREE, ge=1)


@dataclass
class LogConfig(Section):
    every: int = knob(10, "steps between logged steps", FREE, ge=1)
    wandb: str | None = knob(
        None, "project of Weights & Biases that is shown the same numbers, where its package is installed", FREE
    )


@dataclass
class Config(Section):
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
        assert self.draft.mask_token_id is not None, "check_target fills it in"
        return self.draft.mask_token_id

    @property
    def layer_ids(self) -> list[int]:
        assert self.target.layer_ids is not None, "check_target fills them in"
        return self.target.layer_ids

    def filled_in(self, layer_ids: list[int], mask_token_id: int) -> Self:
        """With what it may leave to the target."""
        target = dataclasses.replace(self.target, layer_ids=layer_ids)
        return dataclasses.replace(
            self, target=target, draft=dataclasses.replace(self.draft, mask_token_id=mask_token_id)
        )

    @property
    def distances(self) -> dict[str, float]:
        """Weights by name."""
        told = self.loss.distance
        return {told: 1.0} if isinstance(told, str) else {name: weight for name, weight in told.items()}

    @property
    def needs_final(self) -> bool:
        """Whether the loss asks for what the target itself foresees: its state before the LM head."""
        return any(name != "ce" for name in self.distances)

    @property
    def lr(self) -> float:
        """The peak learning rate in force: the stated one, or what suits the draft's beginning."""
        return self.train.lr or (FINE_TUNING_LR if self.draft.begins_trained else PUBLISHED_LR)

    @property
    def gamma(self) -> float:
        """The decay in force: the stated one, or the published one for this block size."""
        return self.loss.gamma if self.loss.gamma is not None else PUBLISHED_GAMMA[self.draft.block_size]


KNOBS = knobs(Config)  # by dotted name
# What other trainers call these, and what follows from several.
SYNONYMS = {
    synonym: name
    for name, synonyms in {
        "output_dir": "run_dir out_dir save_dir save_path",
        "target.path": "model model_name model_path model_name_or_path base_model target_model verifier",
        "target.layer_ids": "target_layer_ids aux_layers aux_hidden_state_layer_ids",
        "data.path": "dataset datasets dataset_path data_path train_path train_file train_files",
        "data.val_path": "val_data val_file eval_dataset eval_path eval_data_path validation_file",
        "data.seq_len": "max_length max_len max_seq_len max_seq_length sequence_len sequence_length cutoff_len",
        "draft.mask_token_id": "mask_token",
        "draft.num_layers": "num_hidden_layers num_draft_layers draft_layers",
        "loss.anchors": "num_anchors max_anchors",
        "loss.gamma": "decay_gamma loss_decay_gamma",
        "train.max_steps": "steps num_steps total_steps train_steps training_steps",
        "train.epochs": "num_epochs num_train_epochs max_epochs",
        "train.global_batch_size": "batch_size train_batch_size total_batch_size",
        "train.micro_batch_size": "per_device_batch_size per_device_train_batch_size local_batch_size",
        "train.lr": "learning_rate max_lr peak_lr",
        "train.final_lr": "min_lr min_lr_ratio min_lr_factor",
        "train.warmup": "warmup_ratio warmup_steps num_warmup_steps lr_warmup_steps",
        "train.betas": "beta1 beta2 adam_beta1 adam_beta2",
        "train.clip_norm": "max_norm max_grad_norm grad_clip gradient_clipping gradient_clip_val",
        "train.precision": "bf16 fp16 mixed_precision",
        "train.gradient_checkpointing": "activation_checkpointing activation_checkpoint",
        "checkpoint.every": "save_steps save_every save_interval save_freq",
        "checkpoint.keep": "save_total_limit keep_latest_k",
        "log.every": "logging_steps log_freq log_interval",
        "validate.every": "eval_steps eval_interval val_steps val_every",
        "it is train.global_batch_size / (ranks x train.micro_batch_size), so set these": (
            "accumulation_steps gradient_accumulation gradient_accumulation_steps grad_accum accumulate_grad_batches"
        ),
    }.items()
    for synonym in synonyms.split()
}


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a YAML file, applies `a.b=c` overrides and refuses what is unknown or impossible.

    Raises:
        ValueError: naming the file and the key, and what to write instead.
    """
    config = read(Config, _there(path), overrides, synonyms=SYNONYMS)
    config.target.full_depth |= config.needs_final
    if reasons := list(_impossible(config)):
        raise ValueError("\n".join(reasons))
    config.train.lr = config.lr  # so that a run's folder says what it was
    return config


def load_written(path: Path, unknown: list[str] | None = None) -> Config:
    """Reads the config that a run wrote into its folder, maybe long ago: knobs that it lacks have their defaults, and
    those that are gone are left out. Whether it is possible was asked when the run began.

    Args:
        unknown: takes the names of what is left out.

    Raises:
        ValueError: naming the file, and what in it is damaged.
    """
    return read(Config, _there(path), unknown=[] if unknown is None else unknown)


def _there(path: str | Path) -> Path:
    """The file, or the shipped one of that name."""
    if Path(path).is_file():
        return Path(path)
    # Beside the code in an installed package, and beside the package in a checkout.
    folders = [Path(__file__).parent / "configs", Path(__file__).parent.parent / "configs"]
    shipped = {file.stem: file for folder in folders for file in sorted(folder.glob("*.yaml"))}
    if str(path) not in shipped:
        raise ValueError(f"config file {path} does not exist; shipped are {', '.join(shipped)}")
    return shipped[str(path)]


def values(config: Config) -> dict[str, Any]:
    """Every knob's value, by dotted name."""
    return {name: operator.attrgetter(name)(config) for name in KNOBS}


def to_tree(config: Config) -> dict[str, Any]:
    """The config as nested plain values, ready for YAML."""
    return dataclasses.asdict(config)


def json_schema() -> str:
    """What editors complete the YAML by."""
    return json.dumps(TypeAdapter(Config).json_schema(), indent=2)


def describe() -> str:
    """All knobs with defaults and meanings, by section, as wide as the terminal."""
    defaults, lines, section = values(Config()), list[str](), ""
    width = shutil.get_terminal_size().columns - 1
    for name, knob in KNOBS.items():
        if section != (section := name.rpartition(".")[0]):
            lines.append("")
        begin = f"  {name} = {json.dumps(defaults[name])}: "
        among = [value for kind in (knob.type, *typing.get_args(knob.type)) for value in _choices(kind)]
        begin += f"{' or '.join(among)}: " if among else ""
        lines += textwrap.wrap(
            begin + knob.metadata["description"], width, subsequent_indent=" " * 6, break_on_hyphens=False
        )
    return "\n".join(lines)


def _choices(kind: Any) -> tuple[str, ...]:
    return typing.get_args(kind) if typing.get_origin(kind) is Literal else ()


def _impossible(config: Config) -> Iterator[str]:
    """What is not set, and what does not go together."""
    target, data, draft, loss, train = config.target, config.data, config.draft, config.loss, config.train
    ids, held_out = target.layer_ids, data.val_path is not None or data.val_conversations > 0
    if not config.output_dir:
        yield "output_dir is not set: name the folder that this run writes to"
    if not target.path:
        yield "target.path is not set: name the model folder or hub id of the frozen target"
    if not data.path:
        yield "data.path is not set: name a file, folder or hub dataset of conversations"
    if ids is not None and not ids:
        yield "target.layer_ids is empty: list the decoder layers to capture, or leave it unset for a spread of them"
    if any(a >= b for a, b in itertools.pairwise(ids or ())):
        yield f"target.layer_ids {ids} must be strictly increasing: serving engines sort them"
    if (target.attention or "").startswith("flash_attention") and train.micro_batch_size > 1:
        yield (
            "target.attention: flash_attention keeps packed documents apart in a single row only: set"
            " train.micro_batch_size to 1, or leave target.attention unset"
        )
    if draft.window is not None and draft.window < draft.block_size:
        yield f"draft.window {draft.window} is below draft.block_size {draft.block_size}: a slot must see its anchor"
    if any(layer >= draft.num_layers for layer in draft.full_layers):
        yield f"draft.full_layers {draft.full_layers}: the draft has layers 0 to {draft.num_layers - 1}"
    if not config.distances:
        yield "loss.distance names nothing to learn from: ce, kl, tv, lk, or several with weights"
    if loss.gamma is None and draft.block_size not in PUBLISHED_GAMMA:
        yield (
            f"loss.gamma has no published value for draft.block_size {draft.block_size}: set it (16 was trained with"
            " 7, 8 with 4)"
        )
    elif (draft.block_size - 2) / config.gamma >= LIGHTEST:
        yield (
            f"loss.gamma {loss.gamma} leaves the last slot of a block of {draft.block_size} without weight: set it to"
            f" at least {math.ceil((draft.block_size - 2) / LIGHTEST)}"
        )
    if train.global_batch_size % train.micro_batch_size:
        yield (
            f"train.global_batch_size {train.global_batch_size} must be a multiple of"
            f" train.micro_batch_size {train.micro_batch_size}"
        )
    if config.validate.every and not held_out:
        yield "validate.every is set but nothing is held out: set data.val_path or data.val_conversations"
    if config.eval.every and config.eval.prompts is None and not held_out:
        yield (
            "eval.every is set but there is nothing to decode: set eval.prompts, data.val_path or"
            " data.val_conversations"
        )
    if config.eval.every and target.features is not None:
        yield (
            "eval.every is set but target.features takes the target's place: real decoding runs the target, so unset"
            " one of them; `evaluate` can measure the exports of such a run"
        )
    if config.eval.every and not target.full_depth:
        yield (
            "eval.every is set but only the captured layers of the target are loaded: real decoding needs all, so set"
            " target.full_depth to true"
        )
