"""Says before any GPU is rented what a run will hold, how long it will take and what bounds it:
`python -m dflash_dist plan --config C.yaml --gpus 8 --memory 80 [a.b=c ...]`.

No weights and no data are read: the real step runs once, as one rank of many, on tensors without numbers (see `rank`).
Memory, operations and what is sent are compared with measurement by the tests; times are those of a machine that
reaches the stated share of its peak, with the network hidden behind the work that can hide it.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field

from dflash_dist.config import Config, describe
from dflash_dist.cost.counter import Collective, Work
from dflash_dist.cost.rank import FEATURES, OF_TARGET, OWNERS, STAGES, Rank, StepCost, one_rank, with_knobs
from dflash_dist.cost.shapes import PUBLISHED, target_config
from dflash_dist.machine import BFLOAT16_PEAKS
from dflash_dist.options import ConfigOptions, option, parse
from dflash_dist.ranks import World
from dflash_dist.target.choices import layers_to_capture
from dflash_dist.target.load import expects_packing
from dflash_dist.training.context import show_bytes
from dflash_dist.training.setup import check_world, planned_steps

# What no tensor accounts for on a GPU: the CUDA context, NCCL's and cuBLAS's buffers, gaps of the allocator [bytes].
RESERVE = 3 * 2**30
# What passing something on to another rank takes, however little it is: a usual figure for NCCL [s].
HOP = 5e-6
SCALES = (8, 64, 512)
# Rows that are tried at once; what more would take is read off the line through these and half of them.
MOST_ROWS = 64
# Where a line meets the room by so much before the next whole number, that is not tried. After so many trials lines are
# no help.
SURE, FEW = 0.1, 8

Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(gt=0)]
GPU = "a GPU; by default an H100 SXM"


@dataclass(frozen=True)
class Stage:
    """What a stage of a step takes of a rank [s], if nothing else kept it."""

    compute: float
    memory: float
    network: float = 0.0
    hidden: float = 1.0  # share of the work that the network runs beside

    @property
    def seconds(self) -> float:
        work = max(self.compute, self.memory)
        return max(work, self.network + work * (1 - self.hidden))

    @property
    def bound(self) -> str:
        if self.seconds > max(self.compute, self.memory):
            return "network"
        return "compute" if self.compute >= self.memory else "memory"


@dataclass(frozen=True, kw_only=True)
class PlanOptions(ConfigOptions):
    like: str | None = option(
        f"in place of the target: folder or file of a config.json, or one of {', '.join(PUBLISHED)}", None
    )
    gpus: Count = option("ranks of the run", 8)
    gpus_per_node: Count = option("", 8)
    tokens: Positive | None = option("tokens of the data, where train.max_steps is null", None)
    price: Positive | None = option("of a GPU for an hour [$]", None)
    json: Path | None = option("file for the report", None)
    memory: Positive = option("GiB", 80, GPU)
    flops: Positive = option(
        "peak of dense bf16 [TFLOP/s]; for a float32 run that of TF32", BFLOAT16_PEAKS["H100"], GPU
    )
    efficiency: Positive = option("share of that peak which is reached: an assumption", 0.5, GPU)
    memory_bandwidth: Positive = option("GB/s", 3350, GPU)
    bandwidth: Positive = option("between GPUs of a node, each way [GB/s]", 450, GPU)
    network: Positive = option("between nodes, a GPU [GB/s]", 50, GPU)

    @property
    def room(self) -> float:
        """Bytes of a GPU for tensors."""
        return self.memory * 2**30 - RESERVE

    def seconds(self, collective: Collective) -> float:
        """On the wire. A ring leaves a node through one GPU's network card, and there are as many rings as cards."""
        inside = collective.ranks <= self.gpus_per_node
        speed = self.bandwidth if inside else min(self.bandwidth, self.network * self.gpus_per_node)
        return collective.received / (speed * 1e9) + collective.hops * HOP


def main(argv: list[str]) -> None:
    knobs = f"knobs, as YAML sections or overrides:\n{describe()}"
    options = parse(PlanOptions, "plan", __doc__, argv, epilog=knobs)
    report = make_report(options, options.load())
    print(table(report))
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")


# --------------------------------------------------------------------------------------------------- what is found


def make_report(options: PlanOptions, config: Config) -> dict[str, Any]:
    """All that the table shows; a ValueError if the config does not fit the target or the number of GPUs."""
    target = target_config(options.like, config.target)
    text = target.get_text_config()
    last = text.num_hidden_layers - 1
    ids = config.target.layer_ids or layers_to_capture(last + 1)
    config = config.filled_in(ids, config.draft.mask_token_id or 0)  # which token it is costs nothing
    if max(config.layer_ids) >= last:
        raise ValueError(
            f"target.layer_ids {config.layer_ids} do not fit {options.like or config.target.path}: capture"
            f" layers up to {last - 1} of its {last + 1}"
        )
    check_world(config, World(0, options.gpus, torch.device("cuda")))
    with one_rank(config, target, options.gpus) as rank:
        cost = rank.step()
        limits = find_limits(rank, cost, options.room)
    every = micro_batches(config, options.gpus)
    return {
        "packs": expects_packing(text),
        "gpus": options.gpus,
        "memory": options.memory * 2**30,
        "reserve": RESERVE,
        "peak": cost.peak,
        "fits": cost.peak <= options.room,
        "held": cost.held,
        **limits,
        "efficiency": options.efficiency,
        "stages": {
            name: dataclasses.asdict(stage) | {"seconds": stage.seconds, "bound": stage.bound}
            for name, stage in stages(cost, every, options).items()
        },
        "handed_to_collectives": handed(cost, every),
        "scales": [at_scale(options, *layout) for layout in layouts(options, config, target, cost)],
    }


def find_limits(rank: Rank, cost: StepCost, room: float) -> dict[str, int]:
    """What else fits: layers computed again in backward, more rows, more anchors.

    The draft is tried without its target, which holds the most at another time. The target is tried only where it might
    hold more than there is room for, with the most rows that any draft has room for.
    """
    config, rows, at_rest = rank.config, rank.config.train.micro_batch_size, sum(cost.at_rest.values())

    def drafting(config: Config) -> int:
        return rank.step(config, run_target=False, counts_work=False).peak

    def running(config: Config) -> int:
        return rank.step(config, counts_work=False).peak_of("capture")

    def most_rows(peak: Callable[[Config], int], config: Config, now: int, most: int | None = None) -> int:
        of_rows = _straight(lambda rows: peak(with_knobs(config, "train", micro_batch_size=rows)))
        return largest_with_room(of_rows, room, {0: at_rest, rows: now}, most)

    checkpointed = with_knobs(config, "train", gradient_checkpointing=True)
    cheaper, capturing = drafting(checkpointed), cost.peak_of("capture")
    largest = [most_rows(drafting, config, cost.peak), most_rows(drafting, checkpointed, cheaper)]
    # Bytes that are enough for the target: what rows take grows with them, and the most of it comes together.
    grown = {OF_TARGET: max(largest) / rows, FEATURES: max(largest) / rows}
    if rank.target and sum(size * grown.get(owner, 1) for owner, size in cost.capturing.items()) > room:
        of_target = most_rows(running, checkpointed, capturing, max(largest))
        largest = [min(rows, of_target) for rows in largest]
    anchors = largest_with_room(
        lambda anchors: drafting(with_knobs(config, "loss", anchors=anchors)),
        room,
        {0: at_rest, config.loss.anchors: cost.peak},
        config.data.seq_len - 1,  # a row has no more anchors than tokens with a next one
    )
    return {
        "peak_with_checkpointing": max(cheaper, capturing),
        "largest_micro_batch": largest[0],
        "largest_micro_batch_with_checkpointing": largest[1],
        "largest_anchors": anchors,
    }


def largest_with_room(
    peak: Callable[[int], float], room: float, known: dict[int, float], most: int | None = None
) -> int:
    """The largest number whose `peak` has room, by trying few: peaks grow, along straight lines that get steeper.

    Args:
        known: the peak of 0 and of another number.
        most: the largest that is looked at, and the first.
    """
    known = {**known, most: peak(most)} if most and most not in known else dict(known)

    def meets(a: int, b: int) -> float:
        """Where the line through two of them meets the room."""
        return a + (room - known[a]) * (b - a) / max(known[b] - known[a], 1)

    while True:
        fitting = sorted(number for number, size in known.items() if size <= room)
        if not fitting:
            return 0
        low, high = fitting[-1], min(known.keys() - fitting, default=None)
        further = [meets(a, b) for a, b in pairwise(fitting[-2:]) if a]  # a first row also brings what all share
        if high == low + 1 or low == most or (further and further[0] < low + 1 - SURE):
            return low
        if high:
            number = (low + high) // 2 if len(known) > FEW else int(meets(low, high))
        else:
            number = int(further[0] if further else meets(0, low))
        number = max(number, low + 1)
        known[number] = peak(number)


def _straight(peak: Callable[[int], float]) -> Callable[[int], float]:
    """The same up to `MOST_ROWS`, and on along the line through that and half of it."""
    peak = functools.cache(peak)

    def straight(rows: int) -> float:
        if rows <= MOST_ROWS:
            return peak(rows)
        half, whole = peak(MOST_ROWS // 2), peak(MOST_ROWS)
        return whole + (whole - half) * (rows - MOST_ROWS) / (MOST_ROWS // 2)

    return straight


def layouts(
    options: PlanOptions, config: Config, target: Any, cost: StepCost
) -> Iterator[tuple[Config, int, StepCost]]:
    """Numbers of GPUs to compare, each with the target as configured and, over several nodes, with a copy a node; and
    the cost there, as it follows from the `cost` of a rank as asked for."""
    at_rest = {}  # by what it depends on: how many share a copy of the target, and the optimiser's state
    for gpus in sorted({options.gpus, *SCALES}):
        nodes = gpus // options.gpus_per_node
        replicas = [config.target.replicas] if gpus % config.target.replicas == 0 else []
        if not config.target.features and nodes > 1 and gpus % nodes == 0:
            replicas.append(nodes)
        for copies in dict.fromkeys(replicas):
            changed = with_knobs(config, "target", replicas=copies)
            shards, sharing = gpus // copies, gpus if config.train.shard_optimizer else 0
            if cost.ranks == 1 < gpus:  # a rank alone shards nothing and sums nothing
                with one_rank(changed, target, gpus) as rank:
                    cost = rank.step()
            if (cost.shards, cost.ranks) == (shards, gpus):
                at_rest[shards, sharing] = cost.at_rest
            if (shards, sharing) not in at_rest:
                with one_rank(changed, target, gpus) as rank:
                    at_rest[shards, sharing] = rank.at_rest()
            yield changed, gpus, cost.among(gpus, shards, at_rest[shards, sharing])


def at_scale(options: PlanOptions, config: Config, gpus: int, cost: StepCost) -> dict[str, Any]:
    train, every = config.train, micro_batches(config, gpus)
    spent = stages(cost, every, options)
    seconds = sum(stage.seconds for stage in spent.values())
    rows = gpus * train.micro_batch_size * every
    result = {
        "gpus": gpus,
        "replicas": config.target.replicas,
        "peak": cost.peak,
        "rows_per_step": rows,
        "seconds_per_step": seconds,
        "tokens_per_s": rows * config.data.seq_len / seconds,
        "bound": max(
            ("compute", "memory", "network"), key=lambda of: sum(s.seconds for s in spent.values() if s.bound == of)
        ),
    }
    if train.max_steps is not None or options.tokens:
        grown = with_knobs(config, "train", global_batch_size=rows)
        hours = planned_steps(grown, round((options.tokens or 0) / config.data.seq_len)) * seconds / 3600
        result |= {"hours": hours} | ({"cost": hours * gpus * options.price} if options.price else {})
    return result


def micro_batches(config: Config, gpus: int) -> int:
    """Of a rank in a step. Where the batch is too small for the ranks, each has one, and the batch grows."""
    return max(config.train.global_batch_size // (gpus * config.train.micro_batch_size), 1)


def stages(cost: StepCost, every: int, options: PlanOptions) -> dict[str, Stage]:
    """The stages of a step as one rank runs them, `every` micro-batch of it together.

    Rows are taken as full: one document each, all of it supervised, which asks the most of attention and of the head.
    Reading stored features from a disk is not counted. Bytes that pass between a GPU and its memory are those of
    operations each by itself, as they run uncompiled.
    """
    hidden = {"backward": 1 / every, "update": 0.0}  # what is summed waits for the backward of the last micro-batch
    found = {}
    for name in STAGES[1:]:
        work, times = cost.work.get(name, Work()), 1 if name == "update" else every
        compute = times * work.flops / (options.flops * 1e12 * options.efficiency)
        memory = times * work.moved / (options.memory_bandwidth * 1e9)
        network = sum(map(options.seconds, cost.collectives(name, every)))
        found[name] = Stage(compute, memory, network, hidden.get(name, 1.0))
    return found


def handed(cost: StepCost, every: int) -> float:
    """Bytes that a rank hands to collectives in a step."""
    return sum(call.handed for stage in cost.work for call in cost.collectives(stage, every))


# ------------------------------------------------------------------------------------------------------ showing


def table(report: dict[str, Any]) -> str:
    held, memory = report["held"], report["memory"]

    def row(name: str, sizes: Iterable[float | None]) -> str:
        return f"{name:<26}" + "".join(f"{'-' if size is None else show_bytes(size):>14}" for size in sizes)

    lines = [f"{'a rank holds':<26}" + "".join(f"{f'in {phase}':>14}" for phase in held)]
    names = [name for name in OWNERS if any(name in phase for phase in held.values())]
    lines += [row(name, [phase.get(name) for phase in held.values()]) for name in names]
    lines.append(row("together", [sum(phase.values()) for phase in held.values()]))
    lines += [
        "",
        f"{'fits' if report['fits'] else 'DOES NOT FIT'}: {show_bytes(report['peak'])}"
        f" + {show_bytes(report['reserve'])} for CUDA and NCCL (assumed), of {show_bytes(memory)};"
        f" {show_bytes(report['peak_with_checkpointing'])} with train.gradient_checkpointing",
        f"largest train.micro_batch_size {report['largest_micro_batch']}"
        f" ({report['largest_micro_batch_with_checkpointing']} with train.gradient_checkpointing),"
        f" largest loss.anchors {report['largest_anchors']}",
        "",
        f"{'stage':<10} {'ms':>9} {'compute':>9} {'memory':>9} {'network':>9}  bound by"
        f"    (at {report['efficiency']:.0%} of the peak: an assumption)",
    ]
    for name, stage in report["stages"].items():
        times = (stage[key] for key in ("seconds", "compute", "memory", "network"))
        lines.append(f"{name:<10} " + " ".join(f"{1e3 * seconds:>9.1f}" for seconds in times) + f"  {stage['bound']}")
    lines += [
        f"a rank hands {show_bytes(report['handed_to_collectives'])} to collectives in a step",
        "",
        f"{'GPUs':>5} {'replicas':>9} {'a rank':>12} {'rows/step':>10} {'s/step':>8} {'tokens/s':>12} {'hours':>8}"
        f" {'cost [$]':>10}  bound by",
    ]
    for scale in report["scales"]:
        hours, cost = (f"{scale[name]:,.1f}" if name in scale else "-" for name in ("hours", "cost"))
        lines.append(
            f"{scale['gpus']:>5} {scale['replicas']:>9} {show_bytes(scale['peak']):>12} {scale['rows_per_step']:>10}"
            f" {scale['seconds_per_step']:>8.3f} {scale['tokens_per_s']:>12,.0f} {hours:>8} {cost:>10}"
            f"  {scale['bound']}"
        )
    if not any("hours" in scale for scale in report["scales"]):
        lines.append("hours and cost need --tokens, or train.max_steps, and --price")
    lines.append(
        "rows are taken as full: packed, to go by the target's config; the run probes it"
        if report["packs"]
        else "one document a row, to go by the target's config (the run probes it): let --tokens count the padding too"
    )
    return "\n".join(lines)
