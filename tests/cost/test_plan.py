from __future__ import annotations

import dataclasses
import functools
import gc
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.nn.attention import flex_attention as flex
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.flop_counter import FlopCounterMode
from transformers import GptOssConfig, Qwen3MoeConfig

from dflash_dist.cost import bench, plan
from dflash_dist.cost.counter import GATHERED, Collective, StepCounter
from dflash_dist.cost.meter import collective_mib
from dflash_dist.cost.plan import RESERVE, Stage, largest_with_room, main
from dflash_dist.cost.rank import StepCost, one_rank, with_knobs
from dflash_dist.cost.shapes import PUBLISHED
from dflash_dist.kernels.attention_cpu import ChunkedAttention
from dflash_dist.options import parse
from dflash_dist.ranks import World
from dflash_dist.target.load import load_target, read_info
from dflash_dist.target.run import LiveTarget
from dflash_dist.training.sampler import Sampler
from tests.conftest import REPOSITORY
from tests.cost.cpu_rank import one_cpu_rank, rows_of_two
from tests.ranks import run_ranks

MIB = 2**20


def trial_of(args: str) -> bench.Trial:
    """What `bench` would run, with one micro-batch a step."""
    trial = bench.make_trial(parse(bench.BenchOptions, "bench", None, [*args.split(), "--threads=1"]))
    return with_train(trial, global_batch_size=trial.config.train.micro_batch_size)


def with_train(trial: bench.Trial, **train: Any) -> bench.Trial:
    return dataclasses.replace(trial, config=with_knobs(trial.config, "train", **train))


@functools.cache  # a step on fake tensors takes half a second
def cost_of(ranks: int = 1, replicas: int = 1, **train: Any) -> StepCost:
    """Of the shape "float32", with a row a rank."""
    trial = with_train(trial_of(SHAPES["float32"]), **{"global_batch_size": ranks, **train})
    with one_rank(with_knobs(trial.config, "target", replicas=replicas), trial.target, ranks) as rank:
        return rank.step()


# --------------------------------------------------------------------------------------------------------- memory

SHAPES = {
    "float32": "--dtype float32 --target-layers 6 --hidden 128 --heads 4 --kv-heads 2 --intermediate 384"
    " --vocab 2048 --seq 256 --anchors 32 --block 16 --draft-layers 2 --layer-ids 1,2,4",
    "most in the weights": "--dtype bfloat16 --target-layers 6 --hidden 256 --heads 8 --kv-heads 4 --intermediate 768"
    " --vocab 4096 --seq 256 --anchors 16 --block 8 --draft-layers 3 --layer-ids 1,2,3",
    "most in the logits": "--dtype bfloat16 --target-layers 4 --hidden 64 --heads 4 --kv-heads 4 --intermediate 256"
    " --vocab 49152 --seq 256 --anchors 44 --block 8 --draft-layers 2 --layer-ids 0,2",
    "most in the activations": "--dtype bfloat16 --target-layers 4 --hidden 128 --heads 4 --kv-heads 2"
    " --intermediate 512 --vocab 1024 --seq 256 --anchors 72 --block 10 --draft-layers 4 --layer-ids 0,1",
    "most in backward": "--dtype float32 --target-layers 4 --hidden 64 --heads 4 --kv-heads 1 --intermediate 1024"
    " --vocab 512 --seq 256 --anchors 128 --block 8 --draft-layers 1 --layer-ids 1",
    "most in the target": "--dtype float32 --target-layers 4 --hidden 128 --heads 2 --kv-heads 1 --intermediate 512"
    " --vocab 512 --seq 256 --anchors 4 --block 8 --draft-layers 1 --layer-ids 0,1,2 --rows 4",
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_rank_holds_what_was_predicted(name: str, alone: World) -> None:
    predict_and_measure(name, trial_of(SHAPES[name]), alone)


def test_checkpointed_layers_are_measured(alone: World) -> None:
    trial = trial_of(SHAPES["float32"].replace("--draft-layers 2", "--draft-layers 4"))
    predict_and_measure("checkpointed", with_train(trial, gradient_checkpointing=True), alone)


def predict_and_measure(name: str, trial: bench.Trial, world: World) -> None:
    with one_cpu_rank(trial) as rank:
        predicted = rank.step(counts_work=False).peak
    measured = measured_peak(trial, world)
    print(f"{name}: predicted {predicted / MIB:.2f} MiB, measured {measured / MIB:.2f}: {predicted / measured:.3f}")
    assert predicted == pytest.approx(measured, rel=0.03)


def measured_peak(trial: bench.Trial, world: World) -> int:
    """The most bytes that torch's allocator had given out at once in a step, those for the models and inside kernels
    too; after a first one."""
    gc.collect()  # what earlier tests left would count as freed here
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        ours = bench.Ours(trial, world)
        ours.training.sampler = Sampler(ours.training.config, world, rows_of_two(trial.config), None)
        ours.step()
        gc.collect()
        with record_function("measured"):
            ours.step()
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    [begin] = [event.start_ns() for event in events if event.name() == "measured"]
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    times, sizes = np.array(changes).T
    return int(sizes.cumsum()[times >= begin].max())


@functools.cache
def weights() -> int:
    """Bytes of the draft of the shape "float32"."""
    return 4 * sum(parameter.numel() for parameter in bench.random_draft(trial_of(SHAPES["float32"])).parameters())


def test_what_is_held_written_out_by_hand() -> None:
    cost = cost_of()
    assert cost.at_rest["embedding and head"] == 2 * 2048 * 128 * 4
    assert cost.at_rest["draft"] == weights()
    assert cost.held["update"]["optimiser"] == pytest.approx(2 * weights(), rel=1e-4)  # and the number of steps
    assert cost.held["update"]["gradients"] == pytest.approx(weights(), rel=1e-3)
    of_rows = 256 * (4 * 8 + 1) + 32 * (2 * 8 + 2 * 16 * 8 + 15 * 12) + 480 * 8  # ids, positions, labels, weights
    assert cost.held["draft"]["features"] == pytest.approx(256 * 3 * 128 * 4 + of_rows, rel=0.01)
    layer = 128 * 32 * 12 + 3 * 128 * 384 + 2 * 128 + 2 * 32
    assert cost.at_rest["target shard"] == pytest.approx(4 * (5 * layer + 128), rel=1e-3)


def test_a_tied_head_is_held_once(tiny_target: Path) -> None:
    tied = trial_of(f"--like {tiny_target} --dtype float32 --draft-layers 2 --seq 96 --anchors 8 --layer-ids 1,2")
    assert tied.target.tie_word_embeddings
    with one_rank(tied.config, tied.target, 1) as rank:
        assert rank.at_rest()["embedding and head"] == 260 * 64 * 4


def test_gradients_wait_while_the_draft_runs() -> None:
    """They are DDP's buckets, or an earlier micro-batch left them."""
    assert "gradients" not in cost_of().held["draft"]
    assert cost_of(global_batch_size=2).held["draft"]["gradients"] == weights()
    assert cost_of(ranks=8).held["draft"]["gradients"] == weights()


def test_ranks_share_the_target() -> None:
    every, half = cost_of(ranks=8), cost_of(ranks=8, replicas=2)
    assert half.at_rest["target shard"] == pytest.approx(2 * every.at_rest["target shard"], rel=1e-3)
    assert half.held["capture"][GATHERED] == every.held["capture"][GATHERED]


def test_stored_features_need_no_target() -> None:
    trial = with_train(trial_of(SHAPES["float32"]), global_batch_size=8)
    with one_rank(with_knobs(trial.config, "target", features="features"), trial.target, 8) as rank:
        cost = rank.step()
    assert "target shard" not in cost.held["draft"] and GATHERED not in cost.held["capture"]
    assert cost.work["capture"].flops == 0 and not cost.work["capture"].collectives
    assert cost.held["draft"]["features"] == cost_of(ranks=8).held["draft"]["features"]


def test_a_sharded_optimiser_holds_a_share_and_hands_on_what_it_updated() -> None:
    cost = cost_of(ranks=4, shard_optimizer=True)
    assert 2 * weights() / 4 <= cost.at_rest["optimiser"] < 2 * weights() / 3  # whole tensors go to a rank
    shared = cost.work["update"].collectives
    assert {call.operator for call in shared} == {"broadcast_"} and sum(call.handed for call in shared) == weights()


@pytest.mark.parametrize("kind", [Qwen3MoeConfig, GptOssConfig])
def test_a_token_meets_some_of_the_experts_and_memory_holds_all(kind: Any) -> None:
    trial = trial_of(SHAPES["float32"])
    sizes = {name: getattr(trial.target, name) for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
    sizes |= {"num_key_value_heads": 2, "head_dim": 32, "intermediate_size": 384, "vocab_size": 2048}
    experts = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 384}
    with one_rank(trial.config, kind(**sizes, **experts), 1) as rank:
        cost = rank.step()
    attention, expert, router, tokens = 128 * 32 * 12, 3 * 128 * 384, 4 * 128, 256
    # gpt-oss has no kernel that leaves out what is not visible.
    pairs = tokens * tokens if kind is GptOssConfig else tokens * (tokens + 1) // 2
    each = 2 * tokens * (attention + 2 * expert + router) + 4 * 128 * pairs
    assert cost.work["capture"].flops == 5 * each
    assert cost.at_rest["target shard"] == pytest.approx(4 * 5 * (attention + 4 * expert + router), rel=0.01)


def test_a_rank_among_others_is_as_if_it_had_run_there() -> None:
    trial, ran_among_8, expected = trial_of(SHAPES["float32"]), cost_of(ranks=8), cost_of(ranks=4)
    with one_rank(with_train(trial, global_batch_size=4).config, trial.target, 4) as rank:
        found = ran_among_8.among(4, 4, rank.at_rest())
    assert found.at_rest == expected.at_rest
    for phase, owners in expected.held.items():
        assert found.held[phase] == pytest.approx(owners, rel=1e-3, abs=1)
    for stage in ("capture", "backward"):
        calls = [[(call.ranks, call.handed) for call in of.work[stage].collectives] for of in (found, expected)]
        assert calls[0] == [(ranks, pytest.approx(handed, rel=1e-3)) for ranks, handed in calls[1]]


def test_the_process_is_as_before(alone: World) -> None:
    before = torch.UntypedStorage.resize_, flex._validate_device, torch._C._get_accelerator
    trial = trial_of(SHAPES["float32"])
    ours = bench.Ours(trial, alone)
    torch.manual_seed(0)
    with one_rank(with_train(trial, global_batch_size=2).config, trial.target, 2) as rank:
        rank.step()
    drawn = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(drawn, torch.rand(1))
    assert not dist.is_initialized()
    assert before == (torch.UntypedStorage.resize_, flex._validate_device, torch._C._get_accelerator)
    ours.step()


# ---------------------------------------------------------------------------------------------------- the counter


def test_memory_is_that_of_live_storages() -> None:
    with StepCounter({}) as counter:
        counter.owner = "one"
        kept = torch.empty(100)
        counter.owner = "other"
        view = kept[10:]
        gone = torch.empty(1000)
        assert counter.held == {"one": 400, "other": 4000}
        del gone, kept
        assert counter.held.total() == 400 and counter.most.total() == 4400
        counter.watch()
        view.untyped_storage().resize_(0)
        assert counter.held.total() == 0 and counter.most.total() == 400
        view.untyped_storage().resize_(800)
        assert counter.held[GATHERED] == 800
        counter.belongs([view], "one")
        assert counter.held["one"] == 800 and counter.held.total() == counter.most.total() == 800


def test_dense_masks_are_not_counted() -> None:
    def visible(b: Any, h: Any, q: Any, kv: Any) -> Any:
        return q >= kv

    with StepCounter({}) as counter:
        flex.create_block_mask(visible, 1, None, 4096, 4096, device="cpu")
    assert counter.most.total() < 2**20 < 4096 * 4096


def test_the_step_takes_the_way_of_a_gpu() -> None:
    """FlexAttention keeps what its softmax divided by, and no scores."""
    kept = cost_of().held["draft"]["activations"]
    scores = 2 * 4 * 32 * 16 * (256 + 32 * 16) * 4  # of two layers
    assert kept < scores


FIFTH = torch.tensor([4])


@pytest.mark.parametrize(
    ("work", "moved"),
    [
        (lambda a, b: a + b, 3),
        (lambda a, b: a.add_(b), 3),
        (lambda a, b: torch.add(a, b, out=b), 2 + 1),
        (lambda a, b: a.copy_(b), 3),
        (lambda a, b: a.T[3:], 0),
        (lambda a, b: torch.empty_like(a), 0),
        (lambda a, b: a.index_select(0, FIFTH), 0.2),
        (lambda a, b: torch._foreach_mul_([a, b], 2.0), 4),
    ],
)
def test_bytes_move_where_an_operation_reads_and_writes(work: Any, moved: float) -> None:
    with StepCounter({}) as counter:
        a, b = torch.zeros(10, 10), torch.zeros(10, 10)
        counter.stage = "some"
        work(a, b)
    assert counter.work["some"].moved == pytest.approx(400 * moved)


# ----------------------------------------------------------------------------------------------------- operations


def test_operations_are_those_that_torch_counts(alone: World) -> None:
    """On the real step, with formulas for what torch's counter does not know: attention on a CPU, of which the causal
    pairs count, and sums in place. The draft's attention on a CPU does more than is counted: its runs take in some
    context that is masked, and its backward computes the scores again, five products for the forward's two where four
    are counted."""
    ours = bench.Ours(
        trial_of(
            "--dtype float32 --target-layers 6 --hidden 128 --heads 4 --kv-heads 2 --intermediate 384"
            " --vocab 2048 --seq 512 --anchors 192 --block 8 --draft-layers 2 --layer-ids 1,2,4"
        ),
        alone,
    )
    expected = sum(ours.flops().values())
    [micro] = ours.training.sample(ours.done)
    runs = ChunkedAttention(micro).runs
    visible = 8 * int((micro.slot_positions[..., 0] + 8).sum())  # by blocks of 8
    taken_in = 8 * sum(anchors * (context + 8) for anchors, context in (run.shape for run in runs))
    assert 1 <= taken_in / visible < 1.25
    attention = 2 * 4 * 4 * 32 * visible  # of two layers, in forward
    extra = attention * (3.5 * taken_in / visible - 3)

    formulas = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: causal_flops,
        torch.ops.aten.addmm_: product_flops,
    }
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        ours.step()
    print(f"counted {counter.get_total_flops():.4g}, predicted {expected + extra:.4g}")
    assert counter.get_total_flops() == pytest.approx(expected + extra, rel=0.01)
    assert 3 * attention > 0.03 * counter.get_total_flops()  # or a mistake in it would not show


def causal_flops(query: Any, key: Any, _value: Any, *_: Any, **__: Any) -> int:
    """Of [B, heads, S, D] each: a token's query meets the keys, and its probabilities the values, of all before it."""
    rows, heads, length, head_dim = query
    assert key[2] == length
    return 4 * rows * heads * head_dim * length * (length + 1) // 2


def product_flops(_sum: Any, left: Any, right: Any, **_: Any) -> int:
    """Of [N, M] and [M, K]."""
    return 2 * left[0] * left[1] * right[1]


# -------------------------------------------------------------------------------------------------------- traffic


def test_two_ranks_hand_over_what_was_predicted(tiny_target: Path) -> None:
    trial = trial_of(f"--like {tiny_target} --dtype bfloat16 --draft-layers 2 --seq 96 --anchors 8 --layer-ids 1,2,4")
    with one_rank(with_train(trial, global_batch_size=2).config, trial.target, 2) as rank:
        cost = rank.step()
    for measured in run_ranks(handed_over, 2, trial, str(tiny_target)):
        # A few numbers on which the ranks agree are left out of the prediction.
        assert [plan.handed(cost, micro_batches) for micro_batches in (1, 2)] == pytest.approx(measured, rel=0.001)


def handed_over(world: World, trial: bench.Trial, folder: str) -> list[float]:
    """What a rank hands to collectives in a step of training on the target as `load_target` shards it [bytes], of one
    micro-batch and of two."""
    ours = bench.Ours(trial, world)
    target = load_target(read_info(folder), trial.config.target, world)
    ours.training.target = LiveTarget(target.model)
    handed = []
    for micro_batches in (1, 2):
        config = with_knobs(ours.training.config, "train", global_batch_size=2 * micro_batches)
        ours.training.sampler = Sampler(config, world, rows_of_two(config), None)
        ours.step()  # the first one also gathers what stays
        handed.append(collective_mib(ours.step) * MIB)
    return handed


def test_what_reaches_a_rank_written_out_by_hand() -> None:
    gathered, summed, shared = (Collective(name, 4, 100) for name in ("_allgather_base_", "allreduce_", "broadcast_"))
    assert (gathered.received, gathered.hops) == (300, 3)  # the others' shares, from neighbour to neighbour
    assert (summed.received, summed.hops) == (
        150,
        4,
    )  # around the ring twice, but for the own share; up and down a tree
    assert (shared.received, shared.hops) == (100, 1)


def test_the_target_is_gathered_for_every_micro_batch_and_gradients_are_summed_once() -> None:
    cost = cost_of(ranks=4)
    layers = sum(call.handed for call in cost.collectives("capture", 1))
    assert layers == pytest.approx(cost.at_rest["target shard"], rel=0.01)
    assert sum(call.handed for call in cost.collectives("backward", 1)) == weights()
    assert plan.handed(cost, 3) == 3 * layers + weights()


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

# Of what is left of 3.06 GiB a rank holds at rest about a half.
SMALL = [
    *("--config", str(REPOSITORY / "configs/debug.yaml"), "--memory", "3.06", "--tokens", "1e9", "--price", "2.5"),
    *("target.dtype=bfloat16", "train.precision=bfloat16", "train.max_steps=null", "train.global_batch_size=64"),
]


def options_of(*args: str) -> plan.PlanOptions:
    return parse(plan.PlanOptions, "plan", None, [*SMALL, *args])


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """The command's, and what it printed."""
    file = tmp_path_factory.mktemp("plan") / "plan.json"
    printed: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.print", printed.append)
        main([*SMALL, "--json", str(file)])
    return json.loads(file.read_text()), "\n".join(printed)


def test_the_report_fits_together(report: tuple[dict[str, Any], str]) -> None:
    found, shown = report
    assert found["peak"] == max(sum(phase.values()) for phase in found["held"].values())
    assert found["fits"] and found["peak"] + found["reserve"] <= found["memory"] == 3.06 * 2**30
    assert 1 <= found["largest_micro_batch"] < found["largest_micro_batch_with_checkpointing"]
    assert found["peak_with_checkpointing"] < found["peak"]
    asked = next(scale for scale in found["scales"] if (scale["gpus"], scale["replicas"]) == (8, 1))
    assert asked["seconds_per_step"] == pytest.approx(sum(stage["seconds"] for stage in found["stages"].values()))
    assert asked["peak"] == found["peak"]
    assert asked["cost"] == pytest.approx(asked["hours"] * 8 * 2.5)
    assert [(scale["gpus"], scale["replicas"]) for scale in found["scales"]] == [
        (8, 1),
        (64, 1),
        (64, 8),
        (512, 1),
        (512, 64),
    ]
    for name in ("target shard", "optimiser", "loss chunk", "fits: ", "an assumption", "replicas"):
        assert name in shown


def test_the_largest_fit_and_more_do_not(report: tuple[dict[str, Any], str]) -> None:
    found, options = report[0], options_of()
    config = options.load()
    with one_rank(config, plan.target_config(None, config.target), 8) as rank:

        def peak(rows: int) -> int:
            return rank.step(with_knobs(config, "train", micro_batch_size=rows), counts_work=False).peak

        assert peak(found["largest_micro_batch"]) <= options.room < peak(found["largest_micro_batch"] + 1)
    assert found["largest_anchors"] == 255  # a row has no more anchors than tokens with a next one


def test_a_gpu_also_holds_what_no_tensor_accounts_for() -> None:
    assert options_of("--memory", "10").room == 10 * 2**30 - RESERVE


def test_nothing_fits_where_a_rank_has_no_room_at_rest() -> None:
    assert largest_with_room(lambda number: 100.0 * number, 99, {0: 100, 3: 300}, 50) == 0


@pytest.mark.parametrize("most", [0, 1, 2, 7, 64, 1000])
@pytest.mark.parametrize("bound", [None, 50])
@pytest.mark.parametrize("curve", [lambda n: 10 * n, lambda n: n**2, lambda n: 3 * n + max(7 * n - 100, 0)])
def test_the_largest_with_room_is_found_by_trying_few(most: int, bound: int | None, curve: Any) -> None:
    tried = []

    def peak(number: int) -> float:
        tried.append(number)
        return 1000 + curve(number)

    found = largest_with_room(peak, peak(most) + 0.5, {0: 1000, 3: peak(3)}, bound)
    assert found == (most if bound is None else min(most, bound))
    assert len(tried) < 32


def test_what_a_first_row_brings_is_not_taken_for_that_of_every_row() -> None:
    assert largest_with_room(lambda rows: 100 + 5 * rows, 111, {0: 90, 1: 105}) == 2


def test_a_slow_network_bounds_and_a_copy_a_node_helps() -> None:
    """On 64 GPUs: rings over nodes bring the target's layers through one network card a GPU."""
    cost, options = cost_of(ranks=8), options_of("--network", "2")
    whole, copies = (cost.among(64, shards, cost.at_rest) for shards in (64, 8))
    spent = [plan.stages(of, 8, options)["capture"] for of in (whole, copies)]
    assert spent[0].bound == "network" and spent[1].seconds < spent[0].seconds


def test_between_nodes_the_network_is_slower() -> None:
    inside, outside = (options_of().seconds(Collective("broadcast_", ranks, 450e9)) for ranks in (8, 16))
    assert inside == pytest.approx(1, rel=1e-3) and outside == pytest.approx(450 / 400, rel=1e-3)


@pytest.mark.long
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_targets_are_planned(name: str) -> None:
    trial = with_train(trial_of(f"--like {name} --seq 3072 --anchors 512 --block 16"), global_batch_size=8)
    with one_rank(trial.config, trial.target, 8) as rank:
        cost = rank.step()
    assert cost.peak < 200 * 2**30 and cost.work["capture"].flops > 5e11


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
        main(["--config", str(REPOSITORY / "configs/qwen3-8b.yaml"), *args])


def test_options_are_positive(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main([*SMALL, "--price", "-1"])
    assert "--price: Input should be greater than 0, found '-1'" in capsys.readouterr().err
