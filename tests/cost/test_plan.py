from __future__ import annotations

import dataclasses
import gc
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.flop_counter import FlopCounterMode

from dflash_dist.cost import bench
from dflash_dist.cost.memory import RankStep, draft_parameters, held, peak
from dflash_dist.cost.meter import WARM_UP, collective_mib
from dflash_dist.cost.plan import RESERVE, Machine, Stage, fits, largest_that, main
from dflash_dist.cost.shapes import TargetShape, spread_layers, step_flops
from dflash_dist.cost.traffic import gradient_sums, target_gathers, weight_shares
from dflash_dist.data.chat import Document
from dflash_dist.data.documents import Documents
from dflash_dist.data.packing import PackedRows
from dflash_dist.kernels.attention_cpu import ChunkedAttention
from dflash_dist.ranks import World
from dflash_dist.target.load import load_target, read_info
from dflash_dist.target.run import LiveTarget
from dflash_dist.training.sampling import Sampler
from tests.conftest import REPOSITORY
from tests.ranks import run_ranks

QWEN3_8B = ["--config", str(REPOSITORY / "configs/qwen3-8b.yaml")]


def trial_of(args: str) -> bench.Trial:
    """What `bench` would run, with one micro-batch a step."""
    plan = bench.make_trial(bench.parse(bench.BenchOptions, "bench", None, [*args.split(), "--threads=1"]))
    train = dataclasses.replace(plan.config.train, global_batch_size=plan.config.train.micro_batch_size)
    return dataclasses.replace(plan, config=dataclasses.replace(plan.config, train=train))


# --------------------------------------------------------------------------------------------------------- memory

SHAPES = {
    "float32": "--dtype float32 --target-layers 6 --hidden 128 --heads 4 --kv-heads 2 --intermediate 384"
    " --vocab 2048 --seq 256 --anchors 32 --block 16 --draft-layers 2 --layer-ids 1,2,4",
    "most in the weights": "--dtype bfloat16 --target-layers 6 --hidden 256 --heads 8 --kv-heads 4 --intermediate 768"
    " --vocab 4096 --seq 256 --anchors 16 --block 8 --draft-layers 3 --layer-ids 1,2,3",
    "most in the logits": "--dtype bfloat16 --target-layers 4 --hidden 64 --heads 4 --kv-heads 4 --intermediate 256"
    " --vocab 49152 --seq 256 --anchors 44 --block 8 --draft-layers 2 --layer-ids 0,2",
    "most in the activations": "--dtype bfloat16 --target-layers 4 --hidden 128 --heads 4 --kv-heads 2"
    " --intermediate 512 --vocab 1024 --seq 256 --anchors 64 --block 10 --draft-layers 4 --layer-ids 0,1 --rows 2",
    "most in backward": "--dtype float32 --target-layers 4 --hidden 64 --heads 4 --kv-heads 1 --intermediate 1024"
    " --vocab 512 --seq 256 --anchors 128 --block 8 --draft-layers 1 --layer-ids 1",
    "most in the target": "--dtype float32 --target-layers 4 --hidden 128 --heads 2 --kv-heads 1 --intermediate 512"
    " --vocab 512 --seq 256 --anchors 4 --block 8 --draft-layers 1 --layer-ids 0,1,2 --rows 4",
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_rank_holds_what_was_predicted(name: str, alone: World) -> None:
    plan = trial_of(SHAPES[name])
    predicted = peak(RankStep.of(plan.config, plan.target, 1, on_gpu=False))
    measured = measured_peak(plan, alone)
    print(f"{name}: predicted {predicted / 2**20:.2f} MiB, measured {measured / 2**20:.2f}: {predicted / measured:.3f}")
    assert predicted == pytest.approx(measured, rel=0.1)


def test_checkpointed_layers_are_measured(alone: World) -> None:
    plan = trial_of(SHAPES["float32"].replace("--draft-layers 2", "--draft-layers 4"))
    train = dataclasses.replace(plan.config.train, gradient_checkpointing=True)
    plan = dataclasses.replace(plan, config=dataclasses.replace(plan.config, train=train))
    predicted = peak(RankStep.of(plan.config, plan.target, 1, on_gpu=False))
    measured = measured_peak(plan, alone)
    print(f"predicted {predicted / 2**20:.2f} MiB, measured {measured / 2**20:.2f}: {predicted / measured:.3f}")
    assert predicted == pytest.approx(measured, rel=0.1)


def measured_peak(plan: bench.Trial, world: World) -> int:
    """The most bytes that torch's allocator had given out at once in a step, those for the models and inside kernels
    too; after a warm-up, in which the optimiser's state appears."""
    gc.collect()  # what earlier tests left would count as freed here
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        ours = bench.Ours(plan, world)
        ours.training.sampler = Sampler(ours.training.config, world, rows_of_two(plan), None)
        for _ in range(WARM_UP):
            ours.step()
        gc.collect()
        with record_function("measured"):
            ours.step()
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    [begin] = [event.start_ns() for event in events if event.name() == "measured"]
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    times, sizes = np.array(changes).T
    return int(sizes.cumsum()[times >= begin].max())


def rows_of_two(plan: bench.Trial) -> PackedRows:
    """As training has them: the target needs a mask only where a row holds several documents."""
    length = plan.config.data.seq_len
    tokens = np.random.default_rng(0).integers(1, plan.target.vocab_size, (64, length // 2), np.int32)
    documents = Documents.of([Document(ids, [(0, len(ids))]) for ids in tokens])
    return PackedRows(documents, np.arange(len(tokens)), length, bench.MASK_TOKEN)


def test_checkpointed_layers_hold_less_and_shards_too() -> None:
    plan = trial_of(SHAPES["most in the activations"])
    step = RankStep.of(plan.config, plan.target, 8)
    assert peak(dataclasses.replace(step, checkpointing=True)) < peak(step)
    halved = dataclasses.replace(step, shards=4)
    assert held(halved)["draft"]["target shard"] == 2 * held(step)["draft"]["target shard"]
    stored = dataclasses.replace(step, depth=0)
    assert held(stored)["capture"]["target activations"] == held(stored)["draft"]["target shard"] == 0


def test_what_is_held_once_or_waits_written_out_by_hand() -> None:
    plan = trial_of(SHAPES["float32"])
    step = RankStep.of(plan.config, plan.target, 1)
    tied = dataclasses.replace(step, target=dataclasses.replace(step.target, tied=True))
    assert held(step)["draft"]["embedding and head"] == 2 * 2048 * 128 * 4
    assert held(tied)["draft"]["embedding and head"] == 2048 * 128 * 4
    assert held(step)["draft"]["features"] == 256 * 3 * 128 * 4
    weights = 4 * draft_parameters(step.draft)
    assert held(step)["update"]["gradients"] == weights and held(step)["update"]["optimiser"] == 2 * weights
    assert held(dataclasses.replace(step, optimizer_shards=4))["update"]["optimiser"] == weights // 2
    # Gradients are there while the draft runs where DDP made buckets of them, or an earlier micro-batch left them.
    assert "gradients" not in held(step)["draft"]
    for waiting in (dataclasses.replace(step, ranks=2), dataclasses.replace(step, micro_batches=2)):
        assert held(waiting)["draft"]["gradients"] == weights


def test_a_gpu_also_holds_what_no_tensor_accounts_for() -> None:
    plan = trial_of(SHAPES["float32"])
    step = RankStep.of(plan.config, plan.target, 1)
    machine = Machine(peak(step) + RESERVE, 1.0, 1.0, 1.0, 1.0, 8)
    assert fits(step, machine) and not fits(step, dataclasses.replace(machine, memory=machine.memory - 1))


@pytest.mark.parametrize("most", [0, 1, 2, 7, 64])
def test_the_largest_that_fits_is_found(most: int) -> None:
    assert largest_that(lambda value: value <= most) == most


# ----------------------------------------------------------------------------------------------------- operations


def test_operations_are_those_that_torch_counts(alone: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the real step, with formulas for what torch's counter does not know: attention on a CPU, of which the causal
    pairs count, and sums in place. The draft's attention on a CPU does more than `step_flops` counts: its runs take in
    some context that is masked, and its backward computes the scores again, five products for the forward's two where
    `step_flops` counts four."""
    asked: list[Any] = []
    monkeypatch.setattr(bench, "step_flops", lambda *args: asked.append(args) or step_flops(*args))
    ours = bench.Ours(
        trial_of(
            "--dtype float32 --target-layers 6 --hidden 128 --heads 4 --kv-heads 2 --intermediate 384"
            " --vocab 2048 --seq 512 --anchors 192 --block 8 --draft-layers 2 --layer-ids 1,2,4"
        ),
        alone,
    )
    expected = ours.flops()
    [(target, draft, work)] = asked
    unseen = step_flops(target, draft, dataclasses.replace(work, visible_pairs=0))
    attention = expected["propose"] - unseen["propose"]
    assert expected["backward"] - unseen["backward"] == 2 * attention
    [micro] = ours.training.sample(ours.done)
    runs = ChunkedAttention(micro).runs
    taken_in = 8 * sum(anchors * (context + 8) for anchors, context in (run.shape for run in runs))  # by blocks of 8
    assert 1 <= taken_in / work.visible_pairs < 1.25
    extra = attention * (3.5 * taken_in / work.visible_pairs - 3)

    formulas = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: causal_flops,
        torch.ops.aten.addmm_: product_flops,
    }
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        ours.step()
    print(f"counted {counter.get_total_flops():.4g}, predicted {sum(expected.values()) + extra:.4g}")
    assert counter.get_total_flops() == pytest.approx(sum(expected.values()) + extra, rel=0.01)
    assert 3 * attention > 0.03 * counter.get_total_flops()  # or a mistake in it would not show


def test_a_token_meets_some_of_the_experts_and_memory_holds_all() -> None:
    shape = TargetShape(8, 2, 2, 1, 4, intermediate=16, vocab=100, tied=False, experts=4, experts_per_token=2)
    attention, expert, router = 8 * (8 + 4 + 4 + 8), 3 * 8 * 16, 4 * 8
    assert shape.layer_active_parameters == attention + 2 * expert + router
    assert shape.layer_parameters == attention + 4 * expert + router


def test_layers_are_spread_from_the_second_to_the_third_from_last() -> None:
    assert spread_layers(36, 5) == [1, 9, 17, 25, 33]  # as the published drafts of Qwen3-8B
    assert spread_layers(6, 3) == [1, 2, 3]
    with pytest.raises(ValueError, match="4 layers are too few to capture 5 of them"):
        spread_layers(4, 5)


def causal_flops(query: Any, key: Any, _value: Any, *_: Any, **__: Any) -> int:
    """Of [B, heads, S, D] each: a token's query meets the keys, and its probabilities the values, of all before it."""
    rows, heads, length, head_dim = query
    assert key[2] == length
    return 4 * rows * heads * head_dim * length * (length + 1) // 2


def product_flops(_sum: Any, left: Any, right: Any, **_: Any) -> int:
    """Of [N, M] and [M, K]."""
    return 2 * left[0] * left[1] * right[1]


# -------------------------------------------------------------------------------------------------------- traffic


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_two_ranks_hand_over_what_was_predicted(micro_batches: int, tiny_target: Path) -> None:
    plan = trial_of(f"--like {tiny_target} --dtype bfloat16 --draft-layers 2 --seq 96 --anchors 8 --layer-ids 1,2,4")
    train = dataclasses.replace(plan.config.train, global_batch_size=2 * micro_batches)
    step = RankStep.of(dataclasses.replace(plan.config, train=train), plan.target, 2)
    predicted = target_gathers(step).handed + gradient_sums(step).handed
    for measured, parameters in run_ranks(handed_over, 2, plan, str(tiny_target), micro_batches):
        assert parameters == draft_parameters(step.draft)
        # Norms of the target are left out of the prediction, and so are a few numbers on which the ranks agree.
        assert predicted == pytest.approx(measured, rel=0.01)
        assert predicted < measured


def handed_over(world: World, plan: bench.Trial, folder: str, micro_batches: int) -> tuple[float, int]:
    """What a rank hands to collectives in a step of training on the target as `load_target` shards it [bytes]."""
    ours = bench.Ours(plan, world)
    config = ours.training.config
    train = dataclasses.replace(config.train, global_batch_size=2 * micro_batches)
    config = dataclasses.replace(config, train=train)
    target = load_target(read_info(folder), config.target.layer_ids, torch.bfloat16, world)
    ours.training.target = LiveTarget(target.model)
    ours.training.sampler = Sampler(config, world, rows_of_two(plan), None)
    ours.step()  # the first one also gathers what stays
    return collective_mib(ours.step) * 2**20, sum(p.numel() for p in ours.training.draft.parameters())


def test_what_reaches_a_rank_written_out_by_hand() -> None:
    plan = trial_of(SHAPES["float32"])
    step = dataclasses.replace(RankStep.of(plan.config, plan.target, 4), micro_batches=3)
    weights = 4 * draft_parameters(step.draft)
    gathers, sums = target_gathers(step), gradient_sums(step)
    # Of 5 layers and the embedding every rank has a quarter, and gets the others' three for each micro-batch.
    sharded = 5 * step.target.layer_parameters + 2048 * 128
    assert (gathers.handed, gathers.received) == (3 * sharded, 3 * 3 * sharded)  # 4 bytes, a quarter
    assert (sums.handed, sums.received) == (weights, 2 * weights * 3 / 4)  # once a step
    assert weight_shares(step).handed == 0
    shares = weight_shares(dataclasses.replace(step, optimizer_shards=4))
    assert (shares.ranks, shares.handed, shares.received) == (4, weights, weights)
    alone = RankStep.of(plan.config, plan.target, 1)
    assert [of(alone).handed for of in (target_gathers, gradient_sums, weight_shares)] == [0, 0, 0]


@pytest.mark.parametrize(
    ("stage", "seconds", "bound"),
    [
        (Stage(3.0, 2.0), 3.0, "compute"),
        (Stage(2.0, 3.0), 3.0, "memory"),
        (Stage(2.0, 3.0, network=2.5), 3.0, "memory"),
        (Stage(2.0, 3.0, network=4.0), 4.0, "network"),
        (Stage(2.0, 3.0, network=2.5, hidden=0.5), 4.0, "network"),
        (Stage(2.0, 3.0, network=1.0, hidden=0.0), 4.0, "network"),
    ],
)
def test_a_stage_takes_as_long_as_what_bounds_it(stage: Stage, seconds: float, bound: str) -> None:
    assert (stage.seconds, stage.bound) == (seconds, bound)


# ---------------------------------------------------------------------------------------------------- the command


def report_of(tmp_path: Path, *args: str) -> dict[str, Any]:
    main([*args, "--json", str(tmp_path / "plan.json")])
    return json.loads((tmp_path / "plan.json").read_text())


def test_the_report_fits_together(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    report = report_of(tmp_path, *QWEN3_8B, "--tokens", "1e9", "--price", "2.5", "loss.anchors=256")
    assert report["peak"] == max(sum(phase.values()) for phase in report["held"].values())
    assert report["fits"] and report["peak"] + report["reserve"] <= report["memory"] == 80 * 2**30
    assert 1 <= report["largest_micro_batch"] < report["largest_micro_batch_with_checkpointing"]
    asked = next(scale for scale in report["scales"] if (scale["gpus"], scale["replicas"]) == (8, 1))
    assert asked["seconds_per_step"] == pytest.approx(sum(stage["seconds"] for stage in report["stages"].values()))
    assert asked["cost"] == pytest.approx(asked["hours"] * 8 * 2.5)
    assert [(scale["gpus"], scale["replicas"]) for scale in report["scales"]] == [
        (8, 1),
        (64, 1),
        (64, 8),
        (512, 1),
        (512, 64),
    ]
    shown = capsys.readouterr().out
    for name in ("target shard", "optimiser", "loss chunk", "fits: ", "an assumption", "replicas"):
        assert name in shown


def test_stored_features_need_no_target(tmp_path: Path) -> None:
    held = report_of(tmp_path, *QWEN3_8B, "target.features=features")["held"]
    assert held["draft"]["target shard"] == held["capture"]["gathered layer"] == 0


def test_more_anchors_and_rows_than_the_largest_do_not_fit(tmp_path: Path) -> None:
    small = [*QWEN3_8B, "--memory", "34"]
    report = report_of(tmp_path, *small, "train.global_batch_size=10080")
    rows, anchors = report["largest_micro_batch"], report["largest_anchors"]
    for knob, largest in {"train.micro_batch_size": rows, "loss.anchors": anchors}.items():
        batch = f"train.global_batch_size={8 * (rows + 1) * rows}"
        assert report_of(tmp_path, *small, batch, f"{knob}={largest}")["fits"]
        assert not report_of(tmp_path, *small, batch, f"{knob}={largest + 1}")["fits"]


def test_another_target_in_place_of_the_configs(tmp_path: Path) -> None:
    ours = report_of(tmp_path, *QWEN3_8B)
    larger = report_of(tmp_path, *QWEN3_8B, "--like", "Qwen/Qwen3-14B")
    assert larger["peak"] > ours["peak"]


def test_a_slow_network_bounds_and_a_copy_a_node_helps(tmp_path: Path) -> None:
    report = report_of(tmp_path, *QWEN3_8B, "--network", "2", "train.global_batch_size=512")
    seconds = {(scale["gpus"], scale["replicas"]): scale["seconds_per_step"] for scale in report["scales"]}
    assert {scale["bound"] for scale in report["scales"] if scale["gpus"] == 64} >= {"network"}
    assert seconds[64, 8] < seconds[64, 1]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--gpus", "7"], "does not divide by 7 ranks"),
        (["--like", "Qwen/Qwen3-0.6B"], r"do not fit Qwen/Qwen3-0.6B: capture layers up to 26 of its 28"),
        (["target.replicas=3"], "target.replicas 3 does not divide the 8 ranks"),
    ],
)
def test_what_cannot_run_is_refused(args: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        main([*QWEN3_8B, *args])
