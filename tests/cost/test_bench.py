from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dflash_dist.cost.bench import STAGES, BenchOptions, Ours, Trial, main, make_trial, measure, of_kind
from dflash_dist.cost.reference import dense_mask
from dflash_dist.cost.shapes import PUBLISHED
from dflash_dist.draft.kinds import dflash
from dflash_dist.options import parse
from dflash_dist.ranks import World
from dflash_dist.target.capture import decoder_layers
from tests.ranks import run_ranks

REPOSITORY = Path(__file__).parent.parent.parent
SHAPE = (
    "--hidden=64 --heads=4 --kv-heads=2 --head-dim=16 --intermediate=128 --target-layers=6 --vocab=260 --draft-layers=2"
    " --seq=96 --anchors=8 --block=8 --rows=2 --layer-ids=0,2,3"
)
TINY = [*SHAPE.split(), "--dtype=float32", "--threads=1"]
OF_BOTH = {"seconds_per_step", "cpu_seconds_per_step", "resting_mib", "peak_mib"}
OF_OURS = {"useful_flops_per_step", "matmul_flops_per_s", "share_of_peak", "collective_mib_per_step", "stages"}


def trial_of(*args: str) -> Trial:
    return make_trial(parse(BenchOptions, "bench", None, args))


def sizes_of(trial: Trial) -> tuple[Any, ...]:
    of = trial.target
    heads = of.num_attention_heads, of.num_key_value_heads, of.head_dim
    return of.hidden_size, of.num_hidden_layers, *heads, of.intermediate_size, of.vocab_size, of.tie_word_embeddings


def share_of_peak(report: dict[str, Any]) -> float:
    """Its one definition: useful operations a second of a step, as a share of what matrix products reach."""
    return report["useful_flops_per_step"] / report["seconds_per_step"] / report["matmul_flops_per_s"]


# ------------------------------------------------------------------------------------------------------- the report


def test_the_report_has_every_figure_and_they_fit_together(tmp_path, capsys) -> None:
    out = tmp_path / "report.json"
    main([*TINY, "--steps", "1", "--rounds", "2", "--json", str(out)])
    report = json.loads(out.read_text())
    assert report.keys() >= OF_BOTH | OF_OURS
    assert not [name for name in report if name.startswith("reference_")]
    assert report["share_of_peak"] == pytest.approx(share_of_peak(report))
    assert 0 < report["share_of_peak"] < 1
    assert report["peak_mib"] >= report["resting_mib"] > 0
    assert report["collective_mib_per_step"] == 0  # there is nobody else
    assert list(report["stages"]) == list(STAGES) and len(STAGES) == 6
    assert sum(stage["flops"] for stage in report["stages"].values()) == report["useful_flops_per_step"]
    for stage in report["stages"].values():
        assert stage["seconds"] > 0 and stage["cpu_seconds"] > 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:7]] == list(STAGES)
    assert {line.split()[0] for line in lines[7:]} == report.keys() - {"stages"}


@pytest.mark.long
def test_the_reference_is_timed_beside_ours(tmp_path, capsys) -> None:
    out = tmp_path / "report.json"
    main([*TINY, "--steps", "1", "--rounds", "1", "--reference", "--json", str(out)])
    report = json.loads(out.read_text())
    assert report.keys() >= OF_BOTH | OF_OURS | {f"reference_{name}" for name in OF_BOTH}
    ratio = report["reference_cpu_seconds_per_step"] / report["cpu_seconds_per_step"]
    assert f"CPU-seconds: {ratio:.2f} times less than the reference" in capsys.readouterr().out


@pytest.mark.long
def test_a_kind_is_timed_beside_plain_dflash(tmp_path, capsys) -> None:
    out = tmp_path / "report.json"
    main([*TINY, "--steps", "1", "--rounds", "1", "--kind", "dspark", "--json", str(out)])
    report = json.loads(out.read_text())
    assert report.keys() >= OF_BOTH | OF_OURS | {f"dflash_{name}" for name in OF_BOTH}
    ratio = report["seconds_per_step"] / report["dflash_seconds_per_step"]
    assert f"time: {ratio:.3f} of that of dflash; memory above rest: " in capsys.readouterr().out


def test_a_kind_is_timed_with_what_it_was_published_with() -> None:
    trial = of_kind(trial_of(*TINY), "dspark")
    assert trial.config.draft.kind == "dspark" and trial.config.loss.objective == "decay"
    assert trial.config.distances == {"ce": 0.1, "tv": 1.8} and trial.config.target.full_depth
    assert not of_kind(trial_of(*TINY), "dflash").config.target.full_depth
    with pytest.raises(ValueError, match="'nosuch' is no kind of draft"):
        of_kind(trial_of(*TINY), "nosuch")
    with pytest.raises(SystemExit):
        trial_of(*TINY, "--reference", "--kind", "dspark")


def test_two_ranks_count_what_they_send() -> None:
    trial = trial_of(*TINY)
    training = Ours(trial, World(0, 1, torch.device("cpu"))).training
    [layer, *_] = layers = decoder_layers(training.target.model.model)  # type: ignore[attr-defined]
    assert len(layers) == 4  # up to the deepest captured one
    shard = 4 * sum(p.numel() for p in layer.parameters()) // 2  # what is gathered of a layer is what a rank has of it
    gradients = 4 * sum(p.numel() for p in training.draft.parameters())
    for report in run_ranks(measured, 2, trial):
        sent = report["collective_mib_per_step"] * 2**20
        assert 0 <= sent - (gradients + 4 * shard) < 256  # and a few numbers
        assert report["share_of_peak"] == pytest.approx(share_of_peak(report))


def measured(world: World, trial: Trial) -> dict[str, Any]:
    return measure(trial, 1, world)


# ---------------------------------------------------------------------------------------------- useful operations


def test_useful_operations_are_those_that_a_step_does(alone, monkeypatch) -> None:
    """Matrix products outside of attention as torch counts them; attention by what the dense mask shows."""

    def without_products(query, context_key, context_value, block_key, block_value):
        seen = (context_key + context_value).mean(2, keepdim=True) + block_key + block_value
        return query * seen.repeat_interleave(2, dim=1)

    ours = Ours(trial_of(*TINY), alone)
    training = ours.training
    flops = ours.flops()
    monkeypatch.setattr(dflash, "training_attention", lambda *args: without_products)
    [micro] = training.sample(ours.done)
    counted = {}

    def count(stage: str, call):
        with FlopCounterMode(display=False) as counter:
            result = call()
        counted[stage] = counter.get_flop_counts()["Global"].get(torch.ops.aten.mm, 0)
        return result

    context = count("capture", lambda: training.capture(micro))
    hidden = count("propose", lambda: training.propose(training.ddp, micro, context))
    loss, _ = count("loss", lambda: training.loss(hidden, micro, context))
    count("backward", lambda: training.backward(loss))

    rows, length = micro.input_ids.shape
    causal = rows * length * (length + 1) // 2
    visible = int(dense_mask(micro).sum())
    width, layers = 4 * 4 * 16, 2  # operations a visible pair, heads and head size; layers of the draft
    assert flops["capture"] == counted["capture"] + 4 * width * causal
    assert flops["propose"] == counted["propose"] + layers * width * visible
    assert flops["backward"] == counted["backward"] + 2 * layers * width * visible
    assert flops["loss"] == counted["loss"]


# ---------------------------------------------------------------------------------------------- what is to be timed


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_name_gives_its_shape(name: str) -> None:
    trial = trial_of("--like", name)
    told, sizes = PUBLISHED[name](), PUBLISHED[name].keywords
    assert type(trial.target) is type(told) and {name: getattr(trial.target, name) for name in sizes} == sizes
    ids = trial.config.target.layer_ids
    assert len(ids) == trial.config.draft.num_layers == 5 and ids[0] == 1
    assert ids[-1] == trial.target.num_hidden_layers - 3


def test_a_config_json_gives_its_shape_and_numbers_change_it(tiny_target) -> None:
    for path in (tiny_target, tiny_target / "config.json"):
        trial = trial_of("--like", str(path), "--draft-layers", "2")
        assert sizes_of(trial) == (64, 6, 4, 2, 16, 128, 260, True)
    changed = trial_of("--like", str(tiny_target), "--target-layers", "9", "--intermediate", "96", "--vocab", "300")
    assert sizes_of(changed) == (64, 9, 4, 2, 16, 96, 300, True)
    assert changed.config.target.layer_ids == [1, 2, 4, 5, 6]
    assert len(changed.target.layer_types) == 9


def test_a_run_is_timed_at_its_own_shapes() -> None:
    trial = trial_of("--config", str(REPOSITORY / "configs/debug.yaml"), "--rows", "3")
    assert sizes_of(trial) == (64, 6, 4, 2, 16, 128, 260, True)
    config = trial.config
    assert config.target.layer_ids == [1, 2, 4] and config.target.dtype == config.train.precision == "float32"
    assert (config.data.seq_len, config.loss.anchors, config.draft.block_size) == (256, 64, 8)
    assert config.train.micro_batch_size == 3 and not config.train.compile
    assert trial_of("--compile").config.train.compile


def test_without_arguments_there_is_something_to_time() -> None:
    trial = trial_of()
    assert len(trial.config.target.layer_ids) == trial.config.draft.num_layers
    assert max(trial.config.target.layer_ids) < trial.target.num_hidden_layers


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("--like Qwen/Qwen9-1B", r"^Qwen/Qwen9-1B has no config.json to read, nor is it one of .*Qwen/Qwen3-8B"),
        ("--config no-such.yaml", r"^config file no-such.yaml does not exist; shipped are debug, "),
        ("--layer-ids 1,8", r"^--layer-ids \[8\] are out of range: the target has 8 layers$"),
        ("--layer-ids=-1,2", r"^--layer-ids \[-1\] are out of range"),
    ],
)
def test_what_does_not_exist_is_refused(args: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        main(args.split())


def test_two_names_are_refused(capsys) -> None:
    with pytest.raises(SystemExit):
        main(["--like", "Qwen/Qwen3-8B", "--config", "configs/debug.yaml"])
    assert "--config and --like both name shapes: choose one" in capsys.readouterr().err
