from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import shutil
import signal
from collections.abc import Container
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from transformers import AutoTokenizer

from dflash_dist import stopping
from dflash_dist.config import Config
from dflash_dist.data.chat import Document
from dflash_dist.data.packing import global_rows
from dflash_dist.draft.kinds import KINDS
from dflash_dist.ranks import World
from dflash_dist.training import setup
from dflash_dist.training import step as step_module
from dflash_dist.training import trainer as module
from dflash_dist.training.checkpoint import step_folders
from dflash_dist.training.optim import describe_jump, learning_rate
from dflash_dist.training.setup import PREEMPTED, planned_steps
from dflash_dist.training.trainer import Trainer
from tests.ranks import run_ranks

ALONE = World(0, 1, torch.device("cpu"))


def losses(config: Config) -> dict[int, float]:
    lines = (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}


def run(world: World, config: Config, stop_after: int | None = None) -> list[int]:
    """A whole run; the last rank gets a Ctrl-C while it samples step `stop_after`. Returns the steps that were sampled,
    from 0: a run that began anew has the same losses as one that went on."""
    trainer = Trainer(config, world)
    sample = trainer.training.sample
    steps = []

    def sample_and_ask(step: int):
        steps.append(step)
        if step == stop_after and world.rank == world.size - 1:
            signal.raise_signal(signal.SIGINT)
        return sample(step)

    trainer.training.sample = sample_and_ask  # type: ignore[method-assign]
    trainer.run()
    return steps


# ------------------------------------------------------------------------------------------------ invariances


def unsupervise(trainer: Trainer, rows: Container[int]) -> None:
    """Makes the rows teach nothing."""
    original = trainer.training.sampler.rows.row

    def row(index: int):
        for document in original(index):
            yield Document(document.input_ids, []) if index in rows else document

    trainer.training.sampler.rows.row = row  # type: ignore[method-assign]


def first_step(
    world: World, config: Config, unsupervised: list[int] | None = None, sharing: int = 1
) -> tuple[float, list[torch.Tensor]]:
    """Loss and gradients of the first step. The rows at the places `unsupervised` of its batch teach nothing; `sharing`
    ranks work on the same rows."""
    world = dataclasses.replace(world, sharing=sharing)
    trainer = Trainer(config, world)
    rows = global_rows(0, len(trainer.training.sampler.rows), config.train.global_batch_size, config.train.seed)
    unsupervise(trainer, {rows[place] for place in unsupervised or []})
    gradients: list[torch.Tensor] = []

    def keep(optimizer, *_) -> torch.Tensor:
        gradients.extend(p.grad.clone() for group in optimizer.param_groups for p in group["params"])
        return torch.tensor(1.0)

    step_module.apply_update, original = keep, step_module.apply_update
    try:
        result = trainer.training.run(0)
    finally:
        step_module.apply_update = original
    assert result is not None
    loss_sum, weight_sum = world.sum_tensor(result.sums.vector)[:2].tolist()
    return loss_sum / weight_sum, gradients


# A step has four rows: of two ranks with micro-batches of 2 rows each has one, with micro-batches of 1 row two.
@pytest.mark.parametrize(
    ("micro", "unsupervised"),
    [(2, []), (2, [0, 1]), (2, [2, 3]), (1, []), (1, [2]), (1, [1]), (1, [2, 3])],
    ids=[
        "a micro-batch each",
        "rank 0 empty",
        "rank 1 empty",
        "two micro-batches each",
        "the first of rank 1 empty",
        "the last of rank 0 empty",
        "both of rank 1 empty",
    ],
)
def test_two_ranks_give_the_loss_and_gradients_of_one(debug_config, micro: int, unsupervised: list[int]) -> None:
    alone_loss, alone = first_step(ALONE, debug_config("train.micro_batch_size=4"), unsupervised)
    for loss, gradients in run_ranks(first_step, 2, debug_config(f"train.micro_batch_size={micro}"), unsupervised):
        assert loss == pytest.approx(alone_loss, rel=1e-6)
        for ours, theirs in zip(gradients, alone, strict=True):
            assert (ours - theirs).norm() <= 1e-6 * theirs.norm()


@pytest.mark.parametrize("kind", [name for name in KINDS if name != "dflash"])
def test_so_do_the_scores_of_a_kinds_own(debug_config, kind: str) -> None:
    small = "{lilicorr_hidden_size: 16, lilicorr_factor_dim: 8}" if kind == "lilicorr" else "{}"
    knobs = [f"draft.kind={kind}", "loss.objective=decay", f"draft.options={small}"]
    alone_loss, alone = first_step(ALONE, debug_config("train.micro_batch_size=4", *knobs), [0, 1])
    for loss, gradients in run_ranks(first_step, 2, debug_config("train.micro_batch_size=1", *knobs), [0, 1]):
        assert loss == pytest.approx(alone_loss, rel=1e-6)
        for ours, theirs in zip(gradients, alone, strict=True):
            assert (ours - theirs).norm() <= 1e-6 * theirs.norm()


def test_ranks_that_share_their_rows_give_the_loss_and_gradients_of_one(debug_config) -> None:
    alone_loss, alone = first_step(ALONE, debug_config("train.micro_batch_size=4"))
    for loss, gradients in run_ranks(first_step, 2, debug_config("train.micro_batch_size=4"), None, 2):
        assert loss == pytest.approx(alone_loss, rel=1e-6)
        for ours, theirs in zip(gradients, alone, strict=True):
            assert (ours - theirs).norm() <= 1e-6 * theirs.norm()


def first_steps(world: World, config: Config, unsupervised: list[int]) -> tuple[list[torch.Tensor], list[int]]:
    """The weights after three steps, and how often DDP averaged in each of them. The rows at these places of the first
    step's batch teach nothing."""
    trainer = Trainer(config, world)
    training = trainer.training
    rows = global_rows(0, len(training.sampler.rows), config.train.global_batch_size, config.train.seed)
    unsupervise(trainer, {rows[place] for place in unsupervised})
    averaged = 0

    def average(_state, bucket):  # torch compares annotations with its own types, and these are texts
        nonlocal averaged
        averaged += bucket.is_last()
        return allreduce_hook(dist.group.WORLD, bucket)

    if world.size > 1:
        training.ddp.register_comm_hook(None, average)
    times = []
    for step in range(3):
        averaged = 0
        training.run(step)
        times.append(averaged)
    return [parameter.detach().clone() for parameter in training.draft.parameters()], times


@pytest.mark.parametrize("sharded", [False, True])
def test_ranks_stay_bitwise_together_and_average_once_a_step(debug_config, sharded: bool) -> None:
    """Two ranks with two micro-batches each, of which rank 0's last and with it the average is empty in the first step;
    they go where one rank with one micro-batch goes."""
    begun = [parameter.detach() for parameter in Trainer(debug_config(), ALONE).training.draft.parameters()]
    alone, _ = first_steps(ALONE, debug_config("train.micro_batch_size=4"), [1])
    config = debug_config("train.micro_batch_size=1", f"train.shard_optimizer={sharded}")
    (first, _), (second, _) = ranks = run_ranks(first_steps, 2, config, [1])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(first, second, strict=True))
    assert [times for _, times in ranks] == [[1, 1, 1]] * 2
    for ours, theirs, start in zip(first, alone, begun, strict=True):
        assert (ours - theirs).norm() <= 1e-4 * (theirs - start).norm()


def test_micro_batches_do_not_change_the_gradient(debug_config) -> None:
    whole_loss, whole = first_step(ALONE, debug_config("train.micro_batch_size=4"))
    split_loss, split = first_step(ALONE, debug_config("train.micro_batch_size=1"))
    assert split_loss == pytest.approx(whole_loss, rel=1e-6)
    for ours, theirs in zip(split, whole, strict=True):
        assert (ours - theirs).norm() <= 1e-6 * theirs.norm()


def gradients_left(world: World, config: Config) -> set[float | None]:
    """What a step leaves of each parameter's gradient: the sum of its absolute values, or None if it is gone."""
    training = Trainer(config, world).training
    training.run(0)
    return {None if p.grad is None else float(p.grad.abs().sum()) for p in training.draft.parameters()}


def test_an_update_clears_the_gradients_and_leaves_ddp_its_buckets(debug_config) -> None:
    assert gradients_left(ALONE, debug_config()) == {None}
    assert run_ranks(gradients_left, 2, debug_config()) == [{0.0}, {0.0}]


def test_a_step_without_any_anchor_is_no_division_by_zero(debug_config) -> None:
    loss_sum_only = debug_config("train.global_batch_size=2")
    trainer = Trainer(loss_sum_only, ALONE)
    unsupervise(trainer, range(len(trainer.training.sampler.rows)))
    before = [p.clone() for p in trainer.training.draft.parameters()]
    result = trainer.training.run(0)
    assert result is not None and result.grad_norm == 0 and not result.sums.vector.isnan().any()
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.training.draft.parameters()))


def test_bf16_compute_keeps_float32_parameters_and_state(debug_config) -> None:
    trainer = Trainer(debug_config("train.precision=bfloat16", "target.dtype=bfloat16"), ALONE)
    before = [p.clone() for p in trainer.training.draft.parameters()]
    trainer.training.run(0)
    for earlier, parameter in zip(before, trainer.training.draft.parameters()):
        assert parameter.dtype == torch.float32
        assert all(value.dtype == torch.float32 for value in trainer.training.optimizer.state[parameter].values())
        # The mistake this guards against: an update too small for bf16 is lost, and norms never move.
        assert not torch.equal(parameter, earlier)


# ------------------------------------------------------------------------------------------------ resume


def test_a_stopped_and_resumed_run_has_the_losses_of_an_uninterrupted_one(debug_config, tmp_path: Path) -> None:
    short = ("train.max_steps=12", "log.every=1", "validate.every=4", "checkpoint.every=5")
    whole = debug_config(*short, f"output_dir={tmp_path / 'whole'}")
    parts = debug_config(*short, f"output_dir={tmp_path / 'parts'}")
    run(ALONE, whole)
    assert run(ALONE, parts, stop_after=7) == list(range(9))  # the ninth is not run any more
    assert list(step_folders(tmp_path / "parts/checkpoints")) == [5, 8]
    assert run(ALONE, parts) == list(range(8, 12))
    assert losses(parts) == losses(whole) and len(losses(whole)) == 12


def test_preempted_is_there_only_once_the_checkpoint_is(debug_config) -> None:
    """A disk that does not take the checkpoint: the run is not to be queued again for ever."""
    config = debug_config("train.max_steps=4", "validate.every=0", "checkpoint.every=100")
    checkpoints = Path(config.output_dir) / "checkpoints"
    checkpoints.parent.mkdir()
    checkpoints.touch()  # a file where the folder should be
    with pytest.raises(RuntimeError, match="the last checkpoint could not be written"):
        run(ALONE, config, stop_after=1)
    assert not (Path(config.output_dir) / PREEMPTED).exists()
    checkpoints.unlink()
    run(ALONE, config, stop_after=1)
    assert list(step_folders(checkpoints)) == [2] and (Path(config.output_dir) / PREEMPTED).exists()


def test_a_signal_that_comes_twice_is_one_request_and_a_later_one_ends_the_process(debug_config, monkeypatch) -> None:
    trainer = Trainer(debug_config(), ALONE)
    with trainer.signals():
        signal.raise_signal(signal.SIGTERM)  # from Slurm
        signal.raise_signal(signal.SIGTERM)  # the same, passed on by torchrun
        assert trainer.stop_requested
        monkeypatch.setattr(stopping, "ONE_REQUEST", -1.0)
        ended_by: list[int] = []
        monkeypatch.setattr(signal, "raise_signal", ended_by.append)
        os.kill(os.getpid(), signal.SIGINT)
        assert ended_by == [signal.SIGINT] and signal.getsignal(signal.SIGINT) is signal.SIG_DFL, "not an exception"


@pytest.mark.parametrize("sharded", [False, True])
def test_a_run_of_two_ranks_resumes_on_one(debug_config, tmp_path: Path, capsys, sharded: bool) -> None:
    short = ("train.max_steps=8", "log.every=1", "validate.every=0", "checkpoint.every=100")
    whole = debug_config(*short, f"output_dir={tmp_path / 'whole'}")
    parts = debug_config(*short, f"output_dir={tmp_path / 'parts'}", f"train.shard_optimizer={sharded}")
    run(ALONE, whole)
    assert run_ranks(run, 2, parts, 4) == [list(range(6))] * 2
    capsys.readouterr()
    assert run(ALONE, parts) == [5, 6, 7]
    assert "resuming" in (told := capsys.readouterr().out) and "jumps" not in told
    assert list(losses(parts)) == list(range(1, 9))
    for step, loss in losses(whole).items():
        assert losses(parts)[step] == pytest.approx(loss, rel=1e-5)


def test_validating_changes_nothing_in_training(debug_config, tmp_path: Path) -> None:
    short = ("train.max_steps=6", "log.every=1")
    with_it = debug_config(*short, "validate.every=2", f"output_dir={tmp_path / 'with'}")
    without = debug_config(*short, "validate.every=0", f"output_dir={tmp_path / 'without'}")
    run(ALONE, with_it)
    run(ALONE, without)
    assert losses(with_it) == losses(without)


def test_validation_sees_every_row_whatever_the_ranks_and_leaves_the_draft_in_training(debug_config) -> None:
    config = debug_config("data.val_conversations=36")
    trainer = Trainer(debug_config("data.val_conversations=36", "train.micro_batch_size=1"), ALONE)
    assert len(trainer.training.sampler.held_out()) % 4 != 0  # rows that micro-batches of two and two ranks do not fit
    alone = trainer.training.validate()
    assert all(part.training for part in trainer.training.draft.modules())
    for shown in run_ranks(validate, 2, config):
        assert shown.slot_count == alone.slot_count and shown.slot_correct == alone.slot_correct
        assert shown.loss == pytest.approx(alone.loss, rel=1e-6)


def validate(world: World, config: Config) -> Any:
    return Trainer(config, world).training.validate()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("draft.block_size=16", "draft.block_size: 8 -> 16"),
        ("draft.mask_token_id=10", "draft.mask_token_id: 3 -> 10"),
        ("target.layer_ids=[1,2,3]", r"draft.target_layer_ids: \[1, 2, 4\] -> \[1, 2, 3\]"),
        ("draft.num_layers=1", "draft.num_layers: 2 -> 1"),
        ("train.seed=1", "train.seed: 0 -> 1"),
        ("train.global_batch_size=8", "train.global_batch_size: 4 -> 8"),
        ("data.seq_len=128", "data.seq_len: 256 -> 128"),
        ("data.val_conversations=31", "data fingerprint: "),
    ],
)
def test_a_changed_run_is_not_resumed(debug_config, change: str, message: str) -> None:
    run(ALONE, debug_config("train.max_steps=1", "validate.every=0"))
    with pytest.raises(ValueError, match=f"cannot be resumed. Changed: .*{message}"):
        run(ALONE, debug_config("train.max_steps=2", "validate.every=0", change))


def test_a_resumed_run_uses_the_hyperparameters_of_its_config(debug_config) -> None:
    run(ALONE, debug_config("train.max_steps=1", "validate.every=0"))
    trainer = Trainer(debug_config("train.max_steps=2", "train.weight_decay=0.1", "train.betas=[0.8,0.9]"), ALONE)
    assert trainer.resume() == 1
    (group,) = trainer.training.optimizer.param_groups
    assert group["weight_decay"] == 0.1 and group["betas"] == (0.8, 0.9)


def rates(config: Config) -> dict[int, float]:
    lines = (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()
    return {row["step"]: row["optim/lr"] for row in map(json.loads, lines) if "optim/lr" in row}


def test_a_schedule_that_is_extended_says_how_the_rate_jumps_and_how_to_go_on_without(debug_config, capsys) -> None:
    short = ("validate.every=0", "log.every=1", "checkpoint.every=2")
    run(ALONE, debug_config(*short, "train.max_steps=6"))
    assert "jumps" not in capsys.readouterr().out
    longer = debug_config(*short, "train.max_steps=12")
    Trainer(longer, ALONE).resume()
    done, following = learning_rate(5, 6, longer), learning_rate(6, 12, longer)
    assert following > 2 * done
    told = capsys.readouterr().out
    assert f"jumps from {done:.3g} in step 6 to {following:.3g} in step 7, where the schedule of 12 steps" in told
    assert "train.max_steps: 6 -> 12" in told
    advice = told.partition("to go on at the rate of step 6 set ")[2].split()[:3]
    run(ALONE, debug_config(*short, "train.max_steps=12", *advice))
    assert "jumps" not in capsys.readouterr().out
    assert [rates(longer)[step] for step in range(7, 13)] == pytest.approx([done] * 6, rel=1e-3)
    run(ALONE, debug_config(*short, "train.max_steps=9", *advice))
    assert "this run is finished: 12 steps are done, of 9; raise train.max_steps to go on" in capsys.readouterr().out


def test_an_unchanged_or_hardly_changed_schedule_goes_on_without_a_word() -> None:
    """Steep as it may be: a jump is what the schedule itself would not have done."""
    config = Config()
    for step in range(1, 40):
        assert describe_jump(learning_rate(step - 1, 40, config), step, 40, config) is None
    assert describe_jump(learning_rate(499, 1000, config), 500, 1001, config) is None
    assert describe_jump(learning_rate(499, 1000, config), 500, 1100, config) is not None


def test_ranks_that_see_different_checkpoints_are_refused_together(debug_config, tmp_path: Path) -> None:
    config = debug_config("train.max_steps=1", "validate.every=0")
    run(ALONE, config)
    for message in run_ranks(resume_from_own_disk, 2, config, str(tmp_path / "empty")):
        assert "put output_dir on a shared disk" in message


def resume_from_own_disk(world: World, config: Config, empty: str) -> str:
    trainer = Trainer(config, world)
    if world.rank == 1:
        trainer.checkpoints.folder = Path(empty)
    with pytest.raises(ValueError, match="different checkpoints") as refusal:
        trainer.resume()
    return str(refusal.value)


def test_a_finished_run_started_again_does_nothing_and_says_the_same_at_its_end(debug_config, capsys) -> None:
    config = debug_config("train.max_steps=2", "log.every=1")
    run(ALONE, config)
    first, told = losses(config), capsys.readouterr().out
    assert run(ALONE, config) == []
    assert losses(config) == first
    end = told[told.index("done ") :]
    assert capsys.readouterr().out.endswith(f"are done, of 2; raise train.max_steps to go on\n{end}")
    folder = config.output_dir
    assert end.splitlines()[0].endswith(", 1,925 tokens seen")
    assert end.splitlines()[-3:] == [
        f"checkpoint  {folder}/checkpoints/step-00000002",
        f"curves      {folder}/metrics.jsonl; tensorboard --logdir {folder}/tensorboard",
        f"next        python -m dflash_dist export --run {folder} --out drafts/run",
    ]


def test_a_check_says_what_the_run_would_be_without_loading_anything(debug_config, monkeypatch, capsys) -> None:
    for name in ("target.load.load_target", "target.load.load_ends", "training.setup.warm_start"):
        monkeypatch.setattr(f"dflash_dist.{name}", lambda *_: pytest.fail("weights were read"))
    monkeypatch.setattr("dflash_dist.training.context.load_target", lambda *_: pytest.fail("weights were read"))
    config = debug_config("draft.init=target", "eval.every=2", "target.full_depth=true", "target.replicas=2")
    module.check(config)  # a login node has not the ranks that replicas need
    steps = "60 steps of 4 rows of 256 tokens: 57,761 tokens, 3.04 epochs of 79 rows"
    assert capsys.readouterr().out.endswith(f"checked: ready to begin {steps}; without --check it starts\n")
    assert [path.name for path in Path(config.output_dir).iterdir()] == ["builtin"]
    with pytest.raises(ValueError, match=r"data file no-such.jsonl does not exist"):
        module.check(debug_config("data.path=no-such.jsonl"))


def test_a_check_of_a_run_that_is_to_go_on_asks_whether_it_can(debug_config, write_chats, capsys) -> None:
    chats = write_chats(*[[("user", f"Say {n}."), ("assistant", str(n) * 9)] for n in range(40)])
    config = debug_config(f"data.path={chats}", "train.max_steps=1", "validate.every=0")
    run(ALONE, config)
    capsys.readouterr()
    module.check(debug_config(f"data.path={chats}", "train.max_steps=2", "validate.every=0"))
    assert "checked: ready to go on from step 1 of 2 steps of 4 rows" in capsys.readouterr().out
    with chats.open("a") as file:
        file.write(chats.read_text().splitlines()[0] + "\n")
    with pytest.raises(ValueError, match=r"cannot be resumed. Changed: data fingerprint"):
        module.check(debug_config(f"data.path={chats}", "train.max_steps=2", "validate.every=0"))


def test_a_run_of_no_steps_saves_what_it_begins_with(debug_config) -> None:
    config = debug_config("train.max_steps=0", "validate.every=0")
    assert run(ALONE, config) == []
    [(step, folder)] = step_folders(Path(config.output_dir) / "checkpoints").items()
    begun = Trainer(debug_config("train.max_steps=0", "output_dir=" + config.output_dir + "-2"), ALONE).training.draft
    saved = load_file(folder / "draft.safetensors")
    assert step == 0 and all(torch.equal(tensor, saved[name]) for name, tensor in begun.state_dict().items())


def build_with_other_data(world: World, config: Config, path: str) -> str:
    if world.rank == 1:
        config.data.path = path
    with pytest.raises(ValueError, match="the ranks read different data") as refusal:
        Trainer(config, world)
    return str(refusal.value)


def test_ranks_that_read_different_data_are_refused_together(debug_config, write_chats) -> None:
    ours, theirs = (write_chats([("user", "Hi"), ("assistant", text)], name=f"{text}.jsonl") for text in ("ab", "abc"))
    config = debug_config(f"data.path={ours}", "data.val_conversations=0", "validate.every=0")
    for message in run_ranks(build_with_other_data, 2, config, str(theirs)):
        assert "every node must see the same files under data.path" in message


def test_the_watchdog_is_told_where_a_run_should_get_on(debug_config) -> None:
    """In every step; but not while rank 0 may wait for a slow disk."""
    world = World(0, 1, torch.device("cpu"))
    short = ("train.max_steps=2", "train.micro_batch_size=1", "checkpoint.every=1", "validate.every=0")
    trainer = Trainer(debug_config(*short), world)
    told: list[tuple[str, bool]] = []

    def telling(what: str, function: Any) -> Any:
        return lambda *args: (told.append((what, world.activity.expects_progress)), function(*args))[1]

    trainer.training.sample = telling("step", trainer.training.sample)  # type: ignore[method-assign]
    trainer.checkpoints.save = telling("save", trainer.checkpoints.save)  # type: ignore[method-assign]
    trainer.run()
    assert told == [("step", True), ("save", False)] * 2 and not world.activity.expects_progress
    assert world.activity.ticks == 2 * 4, "one for each micro-batch"
    trainer.training.validate()
    assert world.activity.ticks == 2 * 4 + len(trainer.training.sampler.held_out())


def test_the_objective_of_the_config_is_what_a_step_minimises(debug_config) -> None:
    def loss(*overrides: str) -> float:
        training = Trainer(debug_config(*overrides), ALONE).training
        micro = training.sample(0)[0]
        return training.loss(training.propose(training.draft, micro, output := training.capture(micro)), micro, output)[
            0
        ].item()

    decay, half, tenth = loss("loss.objective=decay"), loss("loss.objective=dpace"), loss("loss.alpha=0.1")
    assert decay == loss("loss.objective=decay", "loss.alpha=0.1") and len({decay, half, tenth}) == 3


def test_a_seed_draws_rows_anchors_and_random_weights(debug_config) -> None:
    first, same, other = (
        Trainer(debug_config("draft.init=random", f"train.seed={seed}"), ALONE).training for seed in (0, 0, 1)
    )
    assert first.sample(3)[0].place == same.sample(3)[0].place != other.sample(3)[0].place
    drawn = [training.sampler.held_out()[0].anchors for training in (first, same, other)]  # of the same rows
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    weights = [training.draft.fc.weight for training in (first, same, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


# ------------------------------------------------------------------------------------------------ faults


def run_poisoned(world: World, config: Config, poisoned_step: int) -> str:
    """A run whose loss is NaN on rank 0 in one step; returns what stopped it."""
    trainer = Trainer(config, world)
    training = trainer.training
    backward, sample = training.backward, training.sample
    current = 0

    def watch(step: int):
        nonlocal current
        current = step + 1
        return sample(step)

    def poison(loss: torch.Tensor) -> None:
        backward(loss * math.nan if current == poisoned_step and world.rank == 0 else loss)

    training.sample, training.backward = watch, poison  # type: ignore[method-assign]
    try:
        trainer.run()
    except FloatingPointError as error:
        assert all(p.isfinite().all() for p in trainer.training.draft.parameters())
        return str(error)
    return "nothing"


@pytest.mark.parametrize("poisoned_step", [5, 6], ids=["before a save", "at a save"])
def test_a_gradient_that_is_not_finite_stops_all_ranks_and_is_never_saved(debug_config, poisoned_step: int) -> None:
    config = debug_config("train.max_steps=12", "checkpoint.every=3", "validate.every=0")
    for message in run_ranks(run_poisoned, 2, config, poisoned_step):
        assert f"step {poisoned_step}: the gradient norm is nan" in message
    assert max(step_folders(Path(config.output_dir) / "checkpoints")) == 3


def test_epochs_are_counted_in_whole_steps(debug_config) -> None:
    config = debug_config("train.max_steps=null", "train.epochs=1.5")  # of 79 rows, 4 a step
    assert planned_steps(config, 79) == 30 and planned_steps(config, 80) == 30 and planned_steps(config, 81) == 31


def test_data_that_teaches_almost_nothing_is_refused(debug_config, write_chats) -> None:
    chats = write_chats([("user", "q" * 210), ("assistant", "x")])
    with pytest.raises(ValueError, match="supervised, under 1%"):
        Trainer(debug_config(f"data.path={chats}", "data.val_conversations=0", "validate.every=0"), ALONE)


def test_a_world_that_the_batch_does_not_divide_by_is_refused(debug_config) -> None:
    three = World(0, 3, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"train.global_batch_size 4 does not divide by 3 ranks x .* multiple of 6"):
        Trainer(debug_config(), three)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("target.layer_ids=[1,5]", "contains 5, the last layer"),
        ("target.layer_ids=[1,9]", r"\[9\] are out of range"),
        ("draft.mask_token_id=1000", "outside the vocabulary of 260"),
        ("draft.mask_token_id=2", "is the eos token"),
        ("target.path=no/such/folder", "target model folder no/such/folder does not exist"),
        ("data.path=no-such.jsonl", "data file no-such.jsonl does not exist"),
        ("data.val_conversations=256", "leaves nothing to train on"),
        ("draft.num_key_value_heads=3", "4 must be a multiple of draft.num_key_value_heads 3"),
        ("data.seq_len=4096", "above the 2048 positions"),
        ("draft.intermediate_size=32 draft.init=target", "needs the target's shapes"),
    ],
)
def test_what_does_not_fit_is_refused_before_any_model_loads(debug_config, monkeypatch, override, message) -> None:
    monkeypatch.setattr("dflash_dist.training.context.load_target", lambda *args: pytest.fail("a model was loaded"))
    with pytest.raises(ValueError, match=message):
        Trainer(debug_config(*override.split()), ALONE)


@pytest.mark.parametrize("name", ["data.path", "data.val_path", "eval.prompts"])
def test_a_token_without_an_embedding_is_named_before_the_target_loads(
    debug_config, tmp_path, tiny_target, write_chats, monkeypatch, name: str
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_target)
    tokenizer.add_tokens(["<tool>"])
    shutil.copytree(tiny_target, tmp_path / "target")
    tokenizer.save_pretrained(tmp_path / "target")
    good = write_chats(*[[("user", f"{n}?"), ("assistant", "A long answer, of many tokens.")] for n in range(9)])
    bad = write_chats([("user", "<tool>?"), ("assistant", "A long answer, of many tokens.")], name="bad.jsonl")
    files = {"data.path": good, "data.val_path": good, "eval.prompts": good} | {name: bad}
    overrides = [*(f"{knob}={file}" for knob, file in files.items()), "eval.every=1", "target.full_depth=true"]
    config = debug_config(f"target.path={tmp_path / 'target'}", "data.val_conversations=0", *overrides)
    with (
        monkeypatch.context() as patched,
        pytest.raises(ValueError, match=r"row 1: unknown token: '<tool>' is token 260"),
    ):
        patched.setattr(module, "make_target", None)
        Trainer(config, ALONE)


def test_a_run_on_answers_shorter_than_a_block_says_no_tau_rather_than_zero(debug_config, write_chats, capsys) -> None:
    chats = write_chats(*[[("user", f"Say {n % 10}."), ("assistant", str(n % 10) * 3)] for n in range(40)])
    config = debug_config(f"data.path={chats}", "train.max_steps=1", "log.every=1", "validate.every=1")
    run(ALONE, config)
    rows = [json.loads(line) for line in (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()]
    keys = {key for row in rows for key in row}
    assert {"train/loss", "val/loss", "val/accuracy_slot_03"} <= keys
    assert not {"train/tau", "val/tau", "val/accuracy_slot_04"} & keys
    assert "tau -" in (told := capsys.readouterr().err) and "tau 0" not in told


@pytest.mark.parametrize(
    ("override", "message", "advised"),
    [
        ("draft.mask_token_id=1000", "such as (?P<value>3)$", "draft.mask_token_id={value}"),
        ("draft.mask_token_id=2", "such as (?P<value>3)$", "draft.mask_token_id={value}"),
        ("target.layer_ids=[1,9]", "layers 0 to (?P<value>4) can be captured", "target.layer_ids=[0,{value}]"),
        ("data.seq_len=4096", "2048 positions of .*: set it to at most that", "data.seq_len=2048"),
        (
            "data.val_conversations=256",
            "gives (?P<value>256) conversations: hold out fewer",
            "data.val_conversations=255",
        ),
        (
            "target.replicas=2",
            "does not divide the 1 ranks of this run: set it to (?P<value>1)$",
            "target.replicas={value}",
        ),
    ],
)
def test_what_a_refusal_advises_is_accepted(debug_config, monkeypatch, override, message, advised) -> None:
    class Accepted(Exception):
        pass

    def accept(*_args: object) -> None:
        raise Accepted

    monkeypatch.setattr(module, "make_target", accept)
    with pytest.raises(ValueError, match=message) as refusal:
        Trainer(debug_config(override), ALONE)
    found = re.search(message, str(refusal.value))
    assert found
    with pytest.raises(Accepted):
        Trainer(debug_config(advised.format(**found.groupdict())), ALONE)


@pytest.mark.parametrize(("ranks", "batch", "micro"), [(3, 4, 2), (8, 24, 6), (4, 8, 8), (5, 12, 1)])
def test_all_that_is_advised_for_a_batch_that_does_not_divide_fits(
    debug_config, ranks: int, batch: int, micro: int
) -> None:
    def check(batch: int, micro: int, ranks: int) -> None:
        config = debug_config(f"train.global_batch_size={batch}", f"train.micro_batch_size={micro}")
        setup.check_world(config, World(0, ranks, torch.device("cpu")))

    with pytest.raises(ValueError, match="does not divide by") as refusal:
        check(batch, micro, ranks)
    told = str(refusal.value)
    multiple, total = map(int, re.findall(r"(?:multiple of|ranks that divides) (\d+)", told))
    check(2 * multiple, micro, ranks)
    for fitting in (n for n in range(1, total + 1) if total % n == 0):
        check(batch, micro, fitting)
    each = re.search(r"train.micro_batch_size that divides (\d+)", told)
    assert bool(each) == (batch % ranks == 0)
    for smaller in (n for n in range(1, batch + 1) if each and int(each.group(1)) % n == 0):
        check(batch, smaller, ranks)


def test_a_draft_that_cannot_be_is_refused_before_data_is_read(debug_config, monkeypatch) -> None:
    monkeypatch.setattr(setup, "read_data", lambda *_: pytest.fail("data was read"))
    with pytest.raises(ValueError, match="must be a multiple of"):
        Trainer(debug_config("draft.num_attention_heads=3"), ALONE)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("data.val_path=no-such.jsonl", "data file no-such.jsonl does not exist"),
        (
            "data.val_conversations=2 eval.every=1 target.full_depth=true eval.prompts=no-such.jsonl",
            "no-such.jsonl does not",
        ),
        ("target.features=nowhere", "nowhere holds no features"),
    ],
)
def test_a_file_that_is_not_there_is_refused_before_data_is_tokenised(
    debug_config, monkeypatch, overrides, message
) -> None:
    monkeypatch.setattr("dflash_dist.data.rows.open_documents", lambda *_: pytest.fail("data was tokenised"))
    with pytest.raises(ValueError, match=message):
        Trainer(debug_config("data.val_conversations=0", "validate.every=0", *overrides.split()), ALONE)
