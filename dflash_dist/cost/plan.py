"""Says before any GPU is rented what a run will hold, how long it will take and what bounds it:
`python -m dflash_dist plan --config C.yaml --gpus 8 --memory 80 [a.b=c ...]`.

From shapes alone: no weights and no data are read. Memory and operations are compared with measurement by the tests;
times are those of a machine that reaches the stated share of its peak, with the network hidden behind the work that can
hide it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dflash_dist.config import Config, describe, load_config
from dflash_dist.cost.memory import FLOAT32, RankStep, activations, draft_parameters, held, peak, target_activations
from dflash_dist.cost.shapes import PUBLISHED, Work, step_flops, target_config
from dflash_dist.cost.traffic import Traffic, gradient_sums, target_gathers, weight_shares
from dflash_dist.ranks import World
from dflash_dist.target.load import expects_packing
from dflash_dist.training.context import show_bytes
from dflash_dist.training.setup import check_world, planned_steps

# What no tensor accounts for on a GPU: the CUDA context, NCCL's and cuBLAS's buffers, gaps of the allocator [bytes].
RESERVE = 3 * 2**30
# What passing something on to another rank takes, however little it is: a usual figure for NCCL [s].
HOP = 5e-6
SCALES = (8, 64, 512)


@dataclass(frozen=True)
class Machine:
    """GPUs that are all alike, in nodes."""

    memory: float  # bytes a GPU
    flops: float  # operations a second in matrix products, as they are reached
    memory_bandwidth: float  # bytes/s
    bandwidth: float  # bytes/s between GPUs of a node, each way
    network: float  # bytes/s between nodes, a GPU
    gpus_per_node: int

    def seconds(self, traffic: Traffic) -> float:
        """On the wire. A ring leaves a node through one GPU's network card, and there are as many rings as cards."""
        inside = traffic.ranks <= self.gpus_per_node
        speed = self.bandwidth if inside else min(self.bandwidth, self.network * self.gpus_per_node)
        return traffic.received / speed + traffic.hops * HOP


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


def main(argv: list[str]) -> None:
    args = parse(argv)
    config = load_config(args.config, args.overrides)
    report = make_report(args, config)
    print(table(report))
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="dflash_dist plan",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"knobs, as YAML sections or overrides:\n{describe()}",
    )
    parser.add_argument("--config", required=True, help="YAML file of the run; see configs/")
    parser.add_argument(
        "--like", help=f"in place of the target: folder or file of a config.json, or one of {', '.join(PUBLISHED)}"
    )
    parser.add_argument("--gpus", type=int, default=8, help="ranks of the run (default: 8)")
    parser.add_argument("--gpus-per-node", type=int, default=8, help="(default: 8)")
    parser.add_argument("--tokens", type=float, help="tokens of the data, where train.max_steps is null")
    parser.add_argument("--price", type=float, help="of a GPU for an hour [$]")
    parser.add_argument("--json", type=Path, help="file for the report")
    gpu = parser.add_argument_group("a GPU; by default an H100 SXM")
    gpu.add_argument("--memory", type=float, default=80, help="GiB (default: 80)")
    gpu.add_argument(
        "--flops",
        type=float,
        default=989,
        help="peak of dense bf16 [TFLOP/s]; for a float32 run that of TF32 (default: 989)",
    )
    gpu.add_argument(
        "--efficiency",
        type=float,
        default=0.5,
        help="share of that peak which is reached: an assumption (default: 0.5)",
    )
    gpu.add_argument("--memory-bandwidth", type=float, default=3350, help="GB/s (default: 3350)")
    gpu.add_argument(
        "--bandwidth", type=float, default=450, help="between GPUs of a node, each way [GB/s] (default: 450)"
    )
    gpu.add_argument("--network", type=float, default=50, help="between nodes, a GPU [GB/s] (default: 50)")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="knobs set on the command line")
    args = parser.parse_intermixed_args(argv)
    for name, value in vars(args).items():
        if isinstance(value, (int, float)) and value <= 0:
            parser.error(f"--{name.replace('_', '-')} must be positive")
    return args


# --------------------------------------------------------------------------------------------------- what is found


def make_report(args: argparse.Namespace, config: Config) -> dict[str, Any]:
    """All that the table shows.

    Raises:
        ValueError: the config does not fit the target or the number of GPUs.
    """
    text = target_config(args.like, config.target).get_text_config()
    last = text.num_hidden_layers - 1
    if max(config.target.layer_ids) >= last:
        raise ValueError(
            f"target.layer_ids {config.target.layer_ids} do not fit {args.like or config.target.path}: capture layers"
            f" up to {last - 1} of its {last + 1}"
        )
    machine = Machine(
        memory=args.memory * 2**30,
        flops=args.flops * 1e12 * args.efficiency,
        memory_bandwidth=args.memory_bandwidth * 1e9,
        bandwidth=args.bandwidth * 1e9,
        network=args.network * 1e9,
        gpus_per_node=args.gpus_per_node,
    )
    check_world(config, World(0, args.gpus, torch.device("cuda")))
    step = RankStep.of(config, text, args.gpus)
    cheaper = dataclasses.replace(step, checkpointing=True)

    def most_rows(of: RankStep) -> int:
        return largest_that(lambda rows: fits(dataclasses.replace(of, rows=rows), machine))

    most_anchors = largest_that(lambda anchors: fits(dataclasses.replace(step, anchors=anchors), machine))

    return {
        "packs": expects_packing(text),
        "gpus": args.gpus,
        "memory": args.memory * 2**30,
        "reserve": RESERVE,
        "peak": peak(step),
        "fits": fits(step, machine),
        "held": held(step),
        "peak_with_checkpointing": peak(cheaper),
        "largest_micro_batch": most_rows(step),
        "largest_micro_batch_with_checkpointing": most_rows(cheaper),
        # A row has no more anchors than tokens with a next one.
        "largest_anchors": min(most_anchors, step.length - 1),
        "efficiency": args.efficiency,
        "stages": {
            name: dataclasses.asdict(stage) | {"seconds": stage.seconds, "bound": stage.bound}
            for name, stage in stages(step, machine).items()
        },
        "handed_to_collectives": sum(of(step).handed for of in (target_gathers, gradient_sums, weight_shares)),
        "scales": [
            at_scale(args, dataclasses.replace(config, target=target), text, gpus, machine)
            for gpus, target in layouts(args, config)
        ],
    }


def fits(step: RankStep, machine: Machine) -> bool:
    return peak(step) + RESERVE <= machine.memory


def largest_that(holds: Callable[[int], bool]) -> int:
    """The largest number from 1 on that `holds`, where every smaller one does; 0 if none."""
    low, high = 0, 1
    while holds(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def layouts(args: argparse.Namespace, config: Config) -> list[tuple[int, Any]]:
    """Numbers of GPUs to compare, each with the target as configured and, over several nodes, with a copy a node."""
    found = []
    for gpus in sorted({args.gpus, *SCALES}):
        nodes = gpus // args.gpus_per_node
        replicas = [config.target.replicas] if gpus % config.target.replicas == 0 else []
        if not config.target.features and nodes > 1 and gpus % nodes == 0:
            replicas.append(nodes)
        found += [(gpus, dataclasses.replace(config.target, replicas=r)) for r in dict.fromkeys(replicas)]
    return found


def at_scale(args: argparse.Namespace, config: Config, text: Any, gpus: int, machine: Machine) -> dict[str, Any]:
    step = RankStep.of(config, text, gpus)
    spent = stages(step, machine)
    seconds = sum(stage.seconds for stage in spent.values())
    rows = gpus * step.rows * step.micro_batches
    result = {
        "gpus": gpus,
        "replicas": config.target.replicas,
        "peak": peak(step),
        "rows_per_step": rows,
        "seconds_per_step": seconds,
        "tokens_per_s": rows * step.length / seconds,
        "bound": max(
            ("compute", "memory", "network"), key=lambda of: sum(s.seconds for s in spent.values() if s.bound == of)
        ),
    }
    if config.train.max_steps is not None or args.tokens:
        grown = dataclasses.replace(config, train=dataclasses.replace(config.train, global_batch_size=rows))
        hours = planned_steps(grown, round((args.tokens or 0) / step.length)) * seconds / 3600
        result |= {"hours": hours} | ({"cost": hours * gpus * args.price} if args.price else {})
    return result


def stages(step: RankStep, machine: Machine) -> dict[str, Stage]:
    """The stages of a step as one rank runs them, all micro-batches together.

    Rows are taken as full: one document each, all of it supervised, which asks the most of attention and of the head.
    Reading stored features from a disk is not counted.
    """
    every, parameters = step.micro_batches, draft_parameters(step.draft)
    half = step.length / 2  # tokens before a token, or an anchor, of one document on average
    work = Work(
        tokens=every * step.tokens,
        causal_pairs=every * step.tokens * half,
        slots=every * step.slots,
        visible_pairs=every * step.slots * (half + step.draft.block_size),
        labels=every * step.labels,
    )
    flops = step_flops(step.target, step.draft, work)
    flops["capture"] *= step.depth / (max(step.draft.target_layer_ids) + 1)  # all layers of them, or none
    if step.checkpointing:
        flops["backward"] += flops["propose"]
    # Bytes that pass between the GPU and its memory. What is kept or handed on is written once and read once.
    gathered = step.target_bytes * step.depth * step.target.layer_parameters
    kept, logits = activations(step), step.compute_bytes * step.labels * step.draft.vocab_size
    moved = {
        # The weights of a layer arrive in a buffer, are copied out of it, and read.
        "capture": every * ((1 if step.shards == 1 else 4) * gathered + 2 * step.depth * target_activations(step)),
        "propose": every * 2 * kept,
        # Logits are written, read as float32, and read and written as gradient; see `_ChunkedCrossEntropy`.
        "loss": every * (4 * logits + 4 * FLOAT32 * step.labels * step.draft.vocab_size),
        "backward": every * 3 * kept,
        # The norm reads the gradient; AdamW reads it again, and reads and writes parameter and moments; then zeros.
        "update": 9 * FLOAT32 * parameters // step.optimizer_shards,
    }
    network = {
        "capture": (machine.seconds(target_gathers(step)), 1.0),
        "backward": (machine.seconds(gradient_sums(step)), 1 / every),  # of the last micro-batch alone
        "update": (machine.seconds(weight_shares(step)), 0.0),
    }
    return {
        name: Stage(flops.get(name, 0.0) / machine.flops, size / machine.memory_bandwidth, *network.get(name, ()))
        for name, size in moved.items()
    }


# ------------------------------------------------------------------------------------------------------ showing


def table(report: dict[str, Any]) -> str:
    held, memory = report["held"], report["memory"]

    def row(name: str, sizes: Iterable[float | None]) -> str:
        return f"{name:<26}" + "".join(f"{'-' if size is None else show_bytes(size):>14}" for size in sizes)

    lines = [f"{'a rank holds':<26}" + "".join(f"{f'in {phase}':>14}" for phase in held)]
    names = dict.fromkeys(name for phase in held.values() for name in phase)
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
