"""Writes the config of a run for any target: `python -m dflash_dist init TARGET [--data D] [--gpus N] [a.b=c ...]`.

What a config must say of a target is looked up, what it may say of the data is looked at, and what fits the GPUs is
tried out. Knobs that are given stay as they are, and the others follow them.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shlex
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import yaml
from pydantic import Field

from dflash_dist.answers.parts import stored_settings
from dflash_dist.config import KNOBS, Config, load_config, values
from dflash_dist.contract.folder import read_kind
from dflash_dist.cost.plan import RESERVE
from dflash_dist.cost.rank import one_rank, with_knobs
from dflash_dist.data.rows import make_encoder
from dflash_dist.data.sample import Sample, look_at
from dflash_dist.data.template import ChatTemplate
from dflash_dist.draft.kinds import kind_of
from dflash_dist.files import whole, writing
from dflash_dist.machine import TOO_SLOW, bfloat16_slowdown
from dflash_dist.options import argument, option, parse
from dflash_dist.target.folder import check_decoder
from dflash_dist.target.load import TargetInfo, expects_packing, read_info
from dflash_dist.target.warm_start import cannot_begin
from dflash_dist.training.setup import choose, draft_shape, draft_to_begin_from, planned_steps

PAPERS_ROW = 3072  # tokens; and a sixth as many blocks (arXiv 2602.06036, A.1)
TOKENS_AN_ANCHOR = 6
SMALL = 1024  # hidden size below which a target is rarely right for more than a few tokens
ENOUGH_STEPS = 300  # fewer learn little, whatever a step learns from
TOKENS_AT_ONCE = 8192, 1024  # of a micro-batch, on a GPU and on a CPU: more is hardly faster
THINKS = re.compile(r"<think>\s*[^\s<]")  # in an answer: thinking that is not empty

Count = Annotated[int, Field(ge=0)]


@dataclass(frozen=True, kw_only=True)
class InitOptions:
    target: str = argument("Hugging Face folder or hub id of the frozen target")
    overrides: list[str] = argument("knobs that are decided already", [], shown="a.b=c")
    data: str | None = option("conversations to train on, as data.path takes them; without, a name to fill in", None)
    gpus: Count | None = option("GPUs of the run, 0 to train on a CPU; those of this machine by default", None)
    memory: Annotated[float, Field(gt=0)] = option("of a GPU [GiB]", 80)
    out: Path | None = option("file to write; by default NAME.yaml here", None)

    @property
    def name(self) -> str:
        return re.sub(r"[^\w.-]+", "-", Path(self.target).name.lower()) or "target"

    @property
    def file(self) -> Path:
        return self.out or Path(f"{self.name}.yaml")


def main(argv: list[str]) -> None:
    options = parse(InitOptions, "init", __doc__, argv)
    if options.gpus is None:
        options = dataclasses.replace(options, gpus=torch.cuda.device_count())
    if options.file.exists():
        raise ValueError(f"{options.file} exists: delete it, or name another file with --out")
    knobs = Knobs(options.overrides)
    info = read_info(options.target, trust_remote_code=knobs["target.trust_remote_code"])
    check_decoder(info.text, info.path)
    decide(knobs, options, info)
    command = shlex.join(["dflash_dist", "init", *argv])
    with writing(options.file), whole(options.file) as file:
        file.write_text("\n".join(written(knobs, options, info, command)) + "\n")
        load_config(file)
    print("\n".join(said(knobs, options)))


class Knobs:
    """The knobs that the file will state: as given, or as decided, with why.

    Raises:
        ValueError: one that is given is unknown or impossible.
    """

    def __init__(self, given: list[str]):
        self._given = {text.partition("=")[0]: text.partition("=")[2] for text in given}
        self._decided: dict[str, tuple[Any, str]] = {}
        self._values = values(self.config)

    def __getitem__(self, name: str) -> Any:
        return self._decided[name][0] if name in self._decided else self._values[name]

    def decide(self, name: str, value: Any, why: str = "") -> Any:
        """Takes `value`, unless another one is given; returns what holds."""
        if name not in self._given:
            self._decided[name] = value, why
        return self[name]

    @property
    def config(self) -> Config:
        """What is decided so far; what must be stated and is not has any value."""
        needed = {"output_dir": "-", "target.path": "-", "data.path": "-"}
        stated = needed | {name: _in_yaml(value) for name, (value, _) in self._decided.items()} | self._given
        with tempfile.NamedTemporaryFile(suffix=".yaml") as nothing:
            return load_config(nothing.name, [f"{name}={text}" for name, text in stated.items()])

    def lines(self) -> Iterator[tuple[str, str, str]]:
        """Name, value in YAML and reason of all that are stated, in the order of the sections."""
        for name in KNOBS:
            if name in self._given:
                yield name, self._given[name], "as given"
            elif name in self._decided:
                value, why = self._decided[name]
                yield name, _in_yaml(value), why


def _in_yaml(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return yaml.safe_dump(value, default_flow_style=True, width=math.inf).removesuffix("\n").removesuffix("\n...")


# ------------------------------------------------------------------------------------------------ what is decided


def decide(knobs: Knobs, options: InitOptions, info: TargetInfo) -> None:
    """All that depends on the target, on the data and on the machine.

    Raises:
        ValueError: the data cannot be read or be learned from, or the target is none for a draft.
    """
    knobs.decide("output_dir", f"runs/{options.file.stem}")
    knobs.decide("target.path", options.target)
    knobs.decide("data.path", options.data or f"{options.name}-answers.jsonl", "" if options.data else TO_WRITE)
    sample = decide_data(knobs, options, info)
    decide_lengths(knobs, sample, info)
    decide_draft(knobs, info, sample)
    if not options.gpus and (slow := bfloat16_slowdown(torch.device("cpu"))) > TOO_SLOW:
        for name in ("target.dtype", "train.precision"):
            knobs.decide(name, "float32", f"bfloat16 takes {slow:.0f} times as long on this CPU")
    decide_batch(knobs, options, info, sample)


TO_WRITE = "yet to be written by the target itself: python -m dflash_dist regenerate"


def decide_data(knobs: Knobs, options: InitOptions, info: TargetInfo) -> Sample | None:
    """The arguments of the chat template; a look at the data, if there is any."""
    template = ChatTemplate(info.tokenizer, None, {}, "2000-01-01")
    choices = template.choices
    told = [f"{name} ({' or '.join(map(_in_yaml, among))})" if among else name for name, among in choices.items()]
    takes = f"the template takes {', '.join(told)}" if told else ""
    stored = stored_settings(Path(options.data)).get("template_args") if options.data else None
    if stored:
        knobs.decide("data.template_args", stored, f"as the answers were written; {takes}")
    config = knobs.config.data
    encoder = make_encoder(config, info.tokenizer, info.stop_ids, info.text.vocab_size)
    sample = look_at(options.data, encoder) if options.data else None
    if "enable_thinking" in choices and not stored:
        documents = (sample.documents[i] for i in range(min(len(sample.documents), 100))) if sample else ()
        thinks = any(THINKS.search(info.tokenizer.decode(document.input_ids)) for document in documents)
        why = "the answers hold thinking" if thinks else "serve with the same, or acceptance drops to a quarter"
        knobs.decide("data.template_args", {"enable_thinking": thinks}, f"{why}; {takes}")
    elif choices and not stored:
        knobs.decide("data.template_args", {}, takes)
    return sample


def decide_draft(knobs: Knobs, info: TargetInfo, sample: Sample | None) -> None:
    for name, value in kind_of(knobs["draft.kind"]).published.items():
        knobs.decide(name, value, f"as {knobs['draft.kind']} was published")
    found = sample.found if sample else set()
    ids, token = choose(knobs.config, info, found)
    knobs.decide("target.layer_ids", *ids)
    absent = f", in none of {sample.account.rows:,} rows of the data" if sample and token.value not in found else ""
    knobs.decide("draft.mask_token_id", token.value, token.why + absent)
    if begun_from := draft_to_begin_from(knobs.config):
        shape = read_kind(begun_from, info.text.num_hidden_layers)[1]
        for name in ("block_size", "num_layers"):
            knobs.decide(f"draft.{name}", getattr(shape, name), f"as {knobs['draft.init']}")
        return
    small = info.text.hidden_size < SMALL
    knobs.decide("draft.block_size", *((8, "a small target is rarely right for more") if small else (16, "")))
    knobs.decide("draft.num_layers", min(2 if small else 5, info.text.num_hidden_layers))
    shape = draft_shape(knobs.config.filled_in(ids.value, token.value), info.text, info.path)
    if why := cannot_begin(shape, info):
        knobs.decide("draft.init", "random", f"{why}, from which a layer of the draft could begin")
        if "mlp" in why:  # there is an expert's width in its place
            width = 3 * info.text.hidden_size
            knobs.decide("draft.intermediate_size", width, "dense, three times the hidden size; the target has experts")
    else:
        knobs.decide("draft.init", "target", "from the target's own top layers, as far as a copy computes the same")


def decide_lengths(knobs: Knobs, sample: Sample | None, info: TargetInfo) -> None:
    most, longest = info.text.max_position_embeddings, sample.longest_of(0.99) if sample else 0
    row, why = PAPERS_ROW, "as in the paper"
    if sample and longest > row:
        row = math.ceil(longest / 1024) * 1024
    elif sample and sample.tokens < PAPERS_ROW * ENOUGH_STEPS:
        row = max(2 ** math.ceil(math.log2(longest + 1)), 256)  # more steps of what there is
    if sample:
        short = "; short rows make more steps of little data" if row < PAPERS_ROW else ""
        why = f"99 % of the documents have at most {longest:,} tokens, all {sample.documents.length.max():,}{short}"
    row = knobs.decide("data.seq_len", min(row, most), why)
    knobs.decide("loss.anchors", max(row // TOKENS_AN_ANCHOR, 1), f"one for {TOKENS_AN_ANCHOR} tokens of a row")
    rows = math.inf if sample is None else sample.rows
    if not knobs["data.val_path"]:
        knobs.decide("data.val_conversations", int(min(256, rows // 20)))


def decide_batch(knobs: Knobs, options: InitOptions, info: TargetInfo, sample: Sample | None) -> None:
    ranks, packs = options.gpus or 1, expects_packing(info.text)
    row, at_once = knobs["data.seq_len"], TOKENS_AT_ONCE[0 if options.gpus else 1]
    micro = knobs.decide("train.micro_batch_size", 2 ** int(math.log2(max(at_once // row, 1))))
    rows, batch = math.inf, 64
    if sample:
        rows = math.ceil(sample.tokens / row) if packs else len(sample.documents) * sample.rows / sample.account.rows
        while batch > 2 and rows * knobs["train.epochs"] / batch < ENOUGH_STEPS:
            batch //= 2
    while micro > 1 and ranks * micro > batch:
        micro = knobs.decide("train.micro_batch_size", micro // 2)
    if options.gpus:
        decide_memory(knobs, options, info)
    each = ranks * knobs["train.micro_batch_size"]
    unit = "rows" if packs else "documents, since the target mixes those of a row"
    few = "; fewer than the paper's 64, for more steps of little data" if batch < 64 else ""
    batch = knobs.decide("train.global_batch_size", max(round(batch / each), 1) * each, f"{unit}, over all ranks{few}")
    steps, told = 10_000, ""
    if sample:
        config = knobs.config
        steps = planned_steps(config, math.ceil(rows))
        told = f"{steps:,} steps, about {steps * batch * sample.tokens / rows:.2g} tokens in all"
    knobs.decide("train.epochs", knobs["train.epochs"], told)
    begun = "; a draft that is trained already" if knobs.config.draft.begins_trained else ""
    knobs.decide("train.lr", knobs.config.lr, f"peak of a cosine{begun}")
    every = min(500, max(steps // 10, 1))
    if knobs["data.val_path"] or knobs["data.val_conversations"]:
        knobs.decide("validate.every", every)
    knobs.decide("checkpoint.every", every)


def decide_memory(knobs: Knobs, options: InitOptions, info: TargetInfo) -> None:
    """The largest micro-batch that fits, by running the step of one rank on tensors without numbers; failing that, what
    costs the least time of all that saves memory."""
    config, room, peak = knobs.config, options.memory * 2**30 - RESERVE, math.inf
    savings: dict[str, Any] = {"gradient_checkpointing": True}
    tried = [{"micro_batch_size": 2**k} for k in range(int(math.log2(config.train.micro_batch_size)), -1, -1)]
    tried += [tried[-1] | savings, tried[-1] | savings | {"shard_optimizer": True}]
    with one_rank(with_knobs(config, "train", **tried[0]), info.config, options.gpus or 1) as rank:
        for train in tried:
            if (peak := rank.step(with_knobs(config, "train", **train), counts_work=False).peak) <= room:
                break
    told = f"{peak / 2**30:.0f} GiB and {RESERVE / 2**30:.0f} for CUDA, of {options.memory:g} a GPU"
    told = told if peak <= room else f"DOES NOT FIT: {told}; take more GPUs, which share the target, or a smaller draft"
    for name, value in train.items():
        knobs.decide(f"train.{name}", value, told if name == "micro_batch_size" else "for want of memory")


# ------------------------------------------------------------------------------------------------ what is written


def written(knobs: Knobs, options: InitOptions, info: TargetInfo, command: str) -> Iterator[str]:
    text = info.text
    yield (
        f"# {options.target}: {text.num_hidden_layers} layers, hidden size {text.hidden_size:,}, vocabulary"
        f" {text.vocab_size:,}. Written by"
    )
    yield f"# {command}"
    section = ""
    for name, value, why in knobs.lines():
        if section != (section := name.rpartition(".")[0]):
            yield f"{section}:"
        line = f"{'  ' * bool(section)}{name.rpartition('.')[2]}: {value}"
        yield f"{line} # {why}" if why and why != "as given" else line


def said(knobs: Knobs, options: InitOptions) -> Iterator[str]:
    """What was chosen and why, and the next commands."""
    for name, value, why in knobs.lines():
        if why:
            yield f"{name} = {value}: {why}"
    file, target = shlex.quote(str(options.file)), shlex.quote(options.target)
    torchrun = f"torchrun --nproc_per_node {options.gpus} -m" if (options.gpus or 0) > 1 else "python -m"
    answers = shlex.quote(str(knobs["data.path"]))
    args = json.dumps(knobs["data.template_args"])
    args = f" --template-args {shlex.quote(args)}" if knobs["data.template_args"] else ""
    yield f"\nwrote {options.file}; next:"
    if options.data is None:
        yield f"  {torchrun} dflash_dist regenerate --target {target} --prompts CHATS.jsonl --out {answers}{args}"
    else:
        yield f"  python -m dflash_dist preview --config {file}"
    if options.gpus:
        yield f"  python -m dflash_dist plan --config {file} --gpus {options.gpus} --memory {options.memory:g}"
    yield f"  {torchrun} dflash_dist train --config {file}"
