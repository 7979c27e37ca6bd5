"""Times real training steps with random weights: `python -m dflash_dist bench [--like Qwen/Qwen3-8B] [--reference]`.

The shapes are those of a config, of a published model, of a config.json, or given one by one; nothing is downloaded.
The steps are those of training, on a GPU or on a CPU, alone or under torchrun. `--reference` times a plain
implementation in turns with ours (A B A B), each in a process of its own; `--kind` a kind of draft, with the loss it
was published with, in turns with plain DFlash.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import math
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch._dynamo  # any optimiser imports it when it is made: here, it belongs to the process at rest
from pydantic import Field
from torch.distributed.fsdp import fully_shard
from transformers import AutoModel, AutoModelForCausalLM, PretrainedConfig

from dflash_dist.config import PUBLISHED_GAMMA, Config, DataConfig, load_config
from dflash_dist.cost.meter import Meter, Time, collective_mib
from dflash_dist.cost.rank import STAGES, one_rank, with_knobs
from dflash_dist.cost.reference import ReferenceStep
from dflash_dist.cost.shapes import PUBLISHED, target_config
from dflash_dist.data.chat import Document
from dflash_dist.data.documents import Documents
from dflash_dist.data.packing import PackedRows
from dflash_dist.draft.base import Draft
from dflash_dist.draft.kinds import kind_of
from dflash_dist.kernels.target_attention_cpu import suit_device
from dflash_dist.machine import keep_freed_memory, matmul_flops_per_s
from dflash_dist.options import option, parse
from dflash_dist.ranks import World, join_world
from dflash_dist.target.capture import HFDFlashTargetModel, decoder_layers
from dflash_dist.target.choices import CAPTURED, layers_to_capture
from dflash_dist.target.load import truncate
from dflash_dist.target.run import LiveTarget
from dflash_dist.training.sampler import Sampler
from dflash_dist.training.setup import draft_shape
from dflash_dist.training.step import TrainingStep

MASK_TOKEN = 0
PLAIN = "dflash"  # the kind that others are compared with


@dataclass(frozen=True)
class Trial:
    """What to time."""

    config: Config
    target: PretrainedConfig  # of the text decoder, at full depth
    threads: int


Way = tuple[type["Ours | Plain"], Trial]


Count = Annotated[int, Field(gt=0)]
SHAPES, HOW = "what to time: one of these, and single numbers to change it", "how"


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    config: str | None = option(
        "YAML file of a run; its target's config.json is read, its weights and data not", None, SHAPES
    )
    like: str | None = option(f"folder or file of a config.json, or one of {', '.join(PUBLISHED)}", None, SHAPES)
    hidden: Count | None = option("width of target and draft", None, SHAPES)
    heads: Count | None = option("query heads of both", None, SHAPES)
    kv_heads: Count | None = option("key/value heads of both", None, SHAPES)
    head_dim: Count | None = option("size of a head", None, SHAPES)
    intermediate: Count | None = option("width of the MLPs", None, SHAPES)
    target_layers: Count | None = option("decoder layers of the target", None, SHAPES)
    vocab: Count | None = option("tokens of the vocabulary", None, SHAPES)
    draft_layers: Count | None = option("decoder layers of the draft", None, SHAPES)
    seq: Count | None = option("tokens a row", None, SHAPES)
    anchors: Count | None = option("blocks a row", None, SHAPES)
    block: Count | None = option("slots a block", None, SHAPES)
    rows: Count | None = option("rows a rank runs in a step, at once", None, SHAPES)
    layer_ids: str | None = option("captured layers, such as 1,9,17,25,33; default: spread evenly", None, SHAPES)
    dtype: Literal["float32", "bfloat16"] | None = option("of weights and compute (default: bfloat16)", None, HOW)
    threads: Count | None = option("threads a process (default: torch's)", None, HOW)
    steps: Count = option("steps a round", 5, HOW)
    rounds: Count = option("rounds", 4, HOW)
    compile: bool = option("run the draft's layers compiled, see train.compile", False, HOW)
    reference: bool = option("also time a plain float32 implementation", False, HOW)
    kind: str | None = option("kind of draft to time, beside plain DFlash", None, HOW)
    json: Path | None = option("file for the report", None, HOW)

    def __post_init__(self) -> None:
        if self.config and self.like:
            raise ValueError("--config and --like both name shapes: choose one")
        if self.reference and self.kind:
            raise ValueError("--reference and --kind both name what to compare with: choose one")


def main(argv: list[str]) -> None:
    options = parse(BenchOptions, "bench", __doc__, argv)
    trial = make_trial(options)
    with join_world(trial.config.train.hang_timeout) as world:
        if (options.reference or options.kind) and world.size > 1:
            raise ValueError("--reference and --kind compare single processes: leave torchrun away")
        if options.reference and world.device.type == "cuda":
            raise ValueError("--reference is for a CPU: leave the GPU away, or it")
        if options.reference:
            report = compare((Ours, trial), (Plain, trial), "reference", options, world)
        elif options.kind:
            report = compare((Ours, of_kind(trial, options.kind)), (Ours, of_kind(trial, PLAIN)), PLAIN, options, world)
        else:
            report = measure(trial, options.steps * options.rounds, world)
    if world.is_main:
        print(table(report))
        if options.json:
            options.json.write_text(json.dumps(report, indent=2) + "\n")


# ---------------------------------------------------------------------------------------------------- what to time


def make_trial(options: BenchOptions) -> Trial:
    """The config and the target that the options describe; a ValueError where they describe nothing that exists."""
    config = load_config(options.config) if options.config else Config(output_dir="-", data=DataConfig(seq_len=512))
    target = target_config(options.like, config.target).get_text_config()
    if options.target_layers:
        _set_depth(target, options.target_layers)
    for flag, name in {
        "hidden": "hidden_size",
        "heads": "num_attention_heads",
        "kv_heads": "num_key_value_heads",
        "head_dim": "head_dim",
        "intermediate": "intermediate_size",
        "vocab": "vocab_size",
    }.items():
        if getattr(options, flag):
            setattr(target, name, getattr(options, flag))
    ids = config.target.layer_ids
    if options.layer_ids:
        ids = [int(i) for i in options.layer_ids.split(",")]
    ids = ids or layers_to_capture(
        target.num_hidden_layers, min(CAPTURED, options.draft_layers or config.draft.num_layers)
    )
    outside = [i for i in ids if not 0 <= i < target.num_hidden_layers]
    if outside:
        raise ValueError(f"--layer-ids {outside} are out of range: the target has {target.num_hidden_layers} layers")
    dtype = options.dtype or (config.train.precision if options.config else "bfloat16")
    config = with_knobs(config, "target", layer_ids=ids, dtype=dtype)
    config = with_knobs(config, "draft", mask_token_id=MASK_TOKEN)
    config = with_knobs(config, "train", precision=dtype, compile=options.compile or config.train.compile)
    for knob, size in {
        "draft.num_layers": options.draft_layers,
        "draft.block_size": options.block,
        "data.seq_len": options.seq,
        "loss.anchors": options.anchors,
        "train.micro_batch_size": options.rows,
    }.items():
        if size:
            section, name = knob.split(".")
            config = with_knobs(config, section, **{name: size})
    target.max_position_embeddings = max(target.max_position_embeddings, config.data.seq_len)
    if config.loss.gamma is None and config.draft.block_size not in PUBLISHED_GAMMA:
        config.loss.gamma = config.draft.block_size / 2  # as costly as any other
    return Trial(config, target, options.threads or torch.get_num_threads())


def of_kind(trial: Trial, kind: str) -> Trial:
    """With a draft of this kind, and what it was published with; a ValueError if there is none."""
    config = with_knobs(trial.config, "draft", kind=kind)
    for knob, value in kind_of(kind).published.items():
        section, name = knob.split(".")
        config = with_knobs(config, section, **{name: value})
    return dataclasses.replace(trial, config=with_knobs(config, "target", full_depth=config.needs_final))


def _set_depth(target: PretrainedConfig, layers: int) -> None:
    """Fewer layers or more, whose kinds go on as they began."""
    if kinds := getattr(target, "layer_types", None):
        target.layer_types = (kinds * math.ceil(layers / len(kinds)))[:layers]
    target.num_hidden_layers = layers


# ------------------------------------------------------------------------------------------------------ the two ways


class Ours:
    """Our training step on random weights and random rows."""

    def __init__(self, trial: Trial, world: World):
        torch.set_num_threads(trial.threads)
        self.world, self.trial, self.done = world, trial, 0
        config = _for_ranks(trial.config, world.size)
        ids = config.layer_ids
        shallow = copy.deepcopy(trial.target)
        if not config.target.full_depth:
            truncate(shallow, max(ids) + 1)
        model = _random_model(AutoModel, shallow, getattr(torch, config.target.dtype), world.device)
        suit_device(model)
        embedding = model.get_input_embeddings().weight.detach()
        if world.size > 1:
            embedding = embedding.clone()  # plain, outside FSDP, as `load_target` gives it
            for layer in decoder_layers(model):
                fully_shard(layer)
            fully_shard(model)
        self._make_training = functools.partial(
            TrainingStep,
            config,
            world,
            Sampler(config, world, _random_rows(config, trial.target.vocab_size), None),
            random_draft(trial).to(world.device),
            LiveTarget(HFDFlashTargetModel(model, ids)),
            embedding,
            embedding if trial.target.tie_word_embeddings else torch.randn_like(embedding).mul_(0.02),
            total_steps=10**6,
        )

    @functools.cached_property
    def training(self) -> TrainingStep:
        """Made with the first step: what it allocates is above what the process holds at rest."""
        return self._make_training()

    def step(self) -> None:
        self.training.run(self.done)
        self.done += 1

    def flops(self) -> dict[str, float]:
        """What a step over all ranks cannot do without, by stage: matrix products and attention, nothing element-wise,
        nor what gradient checkpointing does again. As `rank` counts it of the same step, where attention is what is
        visible and a slot without a label does not enter the head."""
        config = with_knobs(_for_ranks(self.trial.config, 1), "train", gradient_checkpointing=False)
        with one_rank(config, self.trial.target, 1) as rank:
            work = rank.step().work
        return {stage: self.world.size * of.flops for stage, of in work.items()}


class Plain:
    """The reference on the same rows and blocks, in float32."""

    def __init__(self, trial: Trial, world: World):
        torch.set_num_threads(trial.threads)
        self.world = world
        config = _for_ranks(trial.config, world.size)
        model = _random_model(AutoModelForCausalLM, trial.target, torch.float32, world.device)
        sampler = Sampler(config, world, _random_rows(config, trial.target.vocab_size), None)
        self.reference, self.done = ReferenceStep(model, random_draft(trial), sampler, config.lr), 0

    def step(self) -> None:
        self.reference.run(self.done)
        self.done += 1


def _for_ranks(config: Config, ranks: int) -> Config:
    """As many rows a rank, whatever the number of ranks."""
    return with_knobs(config, "train", global_batch_size=config.train.micro_batch_size * ranks)


def _random_model(auto_class: Any, config: PretrainedConfig, dtype: torch.dtype, device: torch.device) -> Any:
    torch.manual_seed(0)
    with torch.device(device):
        model = auto_class.from_config(config, dtype=dtype)
    return model.eval().requires_grad_(False)


def random_draft(trial: Trial) -> Draft:
    torch.manual_seed(1)
    shape = draft_shape(trial.config, trial.target, "the target")
    return kind_of(trial.config.draft.kind)(shape, trial.config.train.gradient_checkpointing)


def _random_rows(config: Config, vocab: int) -> PackedRows:
    """Rows of one document each, all of it supervised."""
    length = config.data.seq_len
    tokens = np.random.default_rng(0).integers(1, vocab, size=(4 * config.train.global_batch_size, length))
    documents = Documents.of([Document(row.astype(np.int32), [(0, length)]) for row in tokens])
    return PackedRows(documents, np.arange(len(tokens)), length, MASK_TOKEN)


# ---------------------------------------------------------------------------------------------------------- measuring


def stage_times(ours: Ours, meter: Meter, steps: int) -> dict[str, Time]:
    """What each stage of a step takes. On a GPU the host waits after every stage here, so that together they take
    longer than a step."""
    spent: dict[str, list[Time]] = {stage: [] for stage in STAGES}

    def timed(stage: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            results: list[Any] = []
            spent[stage].append(meter.time(lambda: results.append(method(*args))))
            return results[0]

        return call

    for stage in STAGES:
        setattr(ours.training, stage, timed(stage, getattr(ours.training, stage)))
    meter.times(steps)
    for stage in STAGES:
        delattr(ours.training, stage)
    return {
        stage: Time(sum(t.seconds for t in times) / steps, sum(t.cpu_seconds for t in times) / steps)
        for stage, times in spent.items()
    }


def full_report(ours: Ours, meter: Meter, times: list[Time]) -> dict[str, Any]:
    report = meter.report(times)
    train, ranks, flops = ours.training.config.train, ours.world.size, ours.flops()
    peak = ranks * matmul_flops_per_s(getattr(torch, train.precision), ours.world.device)
    seconds, useful = report["seconds_per_step"], sum(flops.values())
    return report | {
        "tokens_per_s": train.global_batch_size * ours.training.config.data.seq_len / seconds,
        "anchors_per_s": train.global_batch_size * ours.training.config.loss.anchors / seconds,
        "useful_flops_per_step": useful,
        "matmul_flops_per_s": peak,
        "share_of_peak": useful / seconds / peak,
        "collective_mib_per_step": collective_mib(ours.step),
        "stages": {
            stage: dataclasses.asdict(spent) | {"flops": flops.get(stage, 0.0)}
            for stage, spent in stage_times(ours, meter, max(len(times) // 2, 1)).items()
        },
    }


def measure(trial: Trial, steps: int, world: World) -> dict[str, Any]:
    """Our step alone, on every rank of this run."""
    ours = Ours(trial, world)
    meter = Meter(ours.step, world.device)
    return full_report(ours, meter, meter.times(steps))


def compare(one: Way, other: Way, name: str, options: BenchOptions, world: World) -> dict[str, Any]:
    """Two ways in turns, each in a process of its own; what is measured of the other begins with its `name`."""
    spawn = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(1, spawn, _start, (*one, world)) as ours,
        ProcessPoolExecutor(1, spawn, _start, (*other, world)) as others,
    ):
        times: dict[Any, list[Time]] = {ours: [], others: []}
        for started in [process.submit(_times, 0) for process in times]:  # both at once
            started.result()
        for _ in range(options.rounds):
            for process in times:
                times[process] += process.submit(_times, options.steps).result()
        report = ours.submit(_report, times[ours]).result()
        beside = others.submit(_report, times[others]).result()
    return report | {f"{name}_{key}": value for key, value in beside.items() if key in COMPARED}


COMPARED = ("seconds_per_step", "cpu_seconds_per_step", "peak_mib", "resting_mib")
_way: Ours | Plain  # of a process that `compare` started
_meter: Meter


def _start(way: type[Ours] | type[Plain], trial: Trial, world: World) -> None:
    global _way, _meter
    keep_freed_memory()
    _way = way(trial, world)
    _meter = Meter(_way.step, world.device)


def _times(steps: int) -> list[Time]:
    return _meter.times(steps)


def _report(times: list[Time]) -> dict[str, Any]:
    return full_report(_way, _meter, times) if isinstance(_way, Ours) else _meter.report(times)


# -------------------------------------------------------------------------------------------------------------- showing


def table(report: dict[str, Any]) -> str:
    lines = [f"{'stage':<10} {'ms':>9} {'CPU s':>8} {'GFLOP':>9} {'GFLOP/s':>9}"]
    for stage, spent in report["stages"].items():
        rate = spent["flops"] / max(spent["seconds"], 1e-9) / 1e9
        lines.append(
            f"{stage:<10} {1e3 * spent['seconds']:>9.1f} {spent['cpu_seconds']:>8.3f}"
            f" {spent['flops'] / 1e9:>9.2f} {rate:>9.1f}"
        )
    lines += [f"{name:<32} {value:,.4g}" for name, value in report.items() if isinstance(value, (int, float))]
    for name in ("reference", PLAIN):
        if f"{name}_seconds_per_step" in report:
            lines.append(in_short(report, name))
    return "\n".join(lines)


def in_short(report: dict[str, Any], name: str) -> str:
    """Our step beside another."""
    ours, other = (report[f"{of}peak_mib"] - report[f"{of}resting_mib"] for of in ("", f"{name}_"))
    memory = f"memory above rest: {ours / max(other, 1.0):.2f} of it"
    if name == PLAIN:
        ratio = report["seconds_per_step"] / report[f"{name}_seconds_per_step"]
        return f"time: {ratio:.3f} of that of {PLAIN}; {memory}"
    ratio = report[f"{name}_cpu_seconds_per_step"] / report["cpu_seconds_per_step"]
    return f"CPU-seconds: {ratio:.2f} times less than the {name}; {memory}"
