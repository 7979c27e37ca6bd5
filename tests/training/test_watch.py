from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dflash_dist.objective.statistics import Statistics, Sums
from dflash_dist.training import watch as module
from dflash_dist.training.acceptance import Acceptance
from dflash_dist.training.step import StepResult
from dflash_dist.training.watch import Watch, due
from dflash_dist.training.workload import Workload


def sums_of(accepted: float, full_blocks: float, right: list[float], labels: list[float]) -> Sums:
    scalars = {"loss": 6.0, "weight": 3.0, "accepted": accepted, "full_blocks": full_blocks}
    vectors = {"slot_correct": torch.tensor(right), "slot_count": torch.tensor(labels)}
    return Sums.of(**{name: torch.tensor(value) for name, value in scalars.items()}, **vectors)


def result(step: int, at: float, norm: float = 1.0) -> StepResult:
    return StepResult(step, sums_of(5.0, 2.0, [1.0] * 7, [2.0] * 7), torch.tensor(norm), 1e-3, 0.25, at)


@pytest.fixture
def watch(debug_config, alone, monkeypatch):
    config = debug_config("log.every=2")
    Path(config.output_dir).mkdir()
    monkeypatch.setattr(module, "peak_flops_per_s", lambda *_: 100.0)
    watch = Watch(config, alone, 0, Workload(8, 16, 2000, 4, flops_a_row=20.0, flops_a_label=10.0), "")
    watch.clock = 100.0
    yield watch
    watch.close()


def lines(watch: Watch) -> list[dict]:
    return [json.loads(line) for line in (Path(watch.config.output_dir) / "metrics.jsonl").read_text().splitlines()]


def test_a_steps_time_is_its_own_however_late_it_is_read_and_without_validation(watch) -> None:
    watch.read(result(2, at=110.0))
    watch.validated(2, Statistics.read(result(2, 0.0).sums), seconds=50.0)
    watch.read(result(4, at=166.0))
    times = [row["perf/step_s"] for row in lines(watch) if "perf/step_s" in row]
    assert times == [5.0, 3.0]
    tokens = 4 * 256  # rows a step, tokens a row
    first, _, later = lines(watch)
    assert first["perf/tokens_per_s"] == first["perf/tokens_per_s_per_gpu"] == tokens / 5.0
    assert first["perf/data_wait"] == 0.25 / 2 / 5.0 and later["perf/data_wait"] == 0.25 / 2 / 3.0
    assert first["perf/mfu"] == (4 * 20 + 14 * 10) / 5.0 / 100
    assert (later["progress/epoch"], later["progress/tokens"]) == (1.0, 2000)


def test_the_best_so_far_is_named(watch, capsys) -> None:
    for step, accepted in ((0, 16.0), (2, 20.0), (4, 18.0)):
        watch.evaluated(step, Acceptance(8.0, accepted, [6.0, 4.0, 2.0]), seconds=0.0)
    told = [line.partition(", decoded in 0 s")[2] for line in capsys.readouterr().err.splitlines()[:3]]
    assert told == ["; the best so far", "; the best so far", "; the best so far is 2.50, of step 2"]


def test_a_held_out_loss_above_the_one_it_began_with_is_said(watch, capsys) -> None:
    for step, loss in ((0, 6.0), (2, 5.9), (4, 6.3)):
        watch.validated(step, Statistics(loss, 1.0, 1.0, 1.0, [1.0], [1.0]), seconds=0.0)
    assert capsys.readouterr().err.splitlines() == [
        "step 0: held-out loss 6.000, tau 1.00",
        "step 2: held-out loss 5.900, tau 1.00",
        "step 4: held-out loss 6.300, tau 1.00; above the 6.000 that it began with",
    ]


def test_only_the_steps_to_log_are_logged_and_their_sums_are_divided_once(watch) -> None:
    for step in range(1, 5):
        watch.read(result(step, at=100.0 + step))
    assert [row["step"] for row in lines(watch)] == [2, 4]
    first = lines(watch)[0]
    assert (first["train/loss"], first["train/tau"], first["train/accuracy"]) == (2.0, 2.5, 0.5)
    assert first["optim/lr"] == 1e-3 and first["perf/peak_memory_mib"] > 0


def test_a_step_that_is_not_logged_is_checked_all_the_same(watch) -> None:
    with pytest.raises(FloatingPointError, match="step 3: the gradient norm is inf"):
        watch.read(result(3, at=101.0, norm=float("inf")))


def test_real_decoding_is_shown_with_a_picture_and_takes_no_time_of_a_step(watch, capsys) -> None:
    watch.read(result(2, at=110.0))
    watch.evaluated(2, Acceptance(8.0, 20.0, [6.0, 4.0, 2.0]), seconds=50.0)
    watch.read(result(4, at=166.0))
    shown = lines(watch)[1]
    assert (shown["eval/tau"], shown["eval/seconds"]) == (2.5, 50.0)
    assert [shown[f"eval/acceptance_slot_{k:02d}"] for k in (1, 2, 3)] == [0.75, 0.5, 0.25]
    assert lines(watch)[2]["perf/step_s"] == 3.0
    assert "step 2: real tau 2.50, decoded in 50 s" in capsys.readouterr().err
    watch.log._board.flush()
    events = EventAccumulator(str(watch.log.board_folder))
    events.Reload()
    assert events.Scalars("eval/tau")[0].value == 2.5 and len(events.Images("eval/slots")) == 1


def test_what_no_answer_was_long_enough_to_measure_is_left_out_and_a_dash(watch, capsys) -> None:
    of_4_tokens = sums_of(0.0, 0.0, [1.0] * 3 + [0.0] * 4, [2.0] * 3 + [0.0] * 4)
    watch.read(StepResult(2, of_4_tokens, torch.tensor(1.0), 1e-3, 0.0, 110.0))
    watch.validated(2, Statistics.read(of_4_tokens), seconds=1.0)
    watch.evaluated(2, Acceptance(0.0, 0.0, [0.0] * 7), seconds=1.0)
    train, val, real = lines(watch)
    assert "train/tau" not in train and train["train/accuracy"] == 0.5
    assert val == {"step": 2, "val/loss": 2.0} | {f"val/accuracy_slot_{k:02d}": 0.5 for k in (1, 2, 3)}
    assert real == {"step": 2, "eval/seconds": 1.0}
    told = capsys.readouterr().err
    assert "loss 2.000  tau -  " in told and "held-out loss 2.000, tau -\n" in told and "real tau -, decoded" in told
    watch.log._board.flush()
    events = EventAccumulator(str(watch.log.board_folder))
    events.Reload()
    tags = events.Tags()["scalars"]
    assert "val/loss" in tags and not {"train/tau", "val/tau", "eval/tau", "val/accuracy_slot_04"} & set(tags)


def test_what_is_due() -> None:
    assert [step for step in range(1, 8) if due(step, 3, 7)] == [3, 6, 7]
    assert not any(due(step, 0, 7) for step in range(8))
