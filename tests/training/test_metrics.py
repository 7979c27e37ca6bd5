from __future__ import annotations

import importlib.machinery
import json
import os
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tensorboard.summary.writer import event_file_writer

from dflash_dist.config import KNOBS, Config, LogConfig
from dflash_dist.training.curves import read_curves, seconds_in_steps
from dflash_dist.training.metrics import MetricLog, check_wandb
from dflash_dist.training.trainer import Trainer


@pytest.fixture(autouse=True)
def first_in_its_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a run's writer is. TensorBoard reads files in the order of their names, which end in the writer's number: of
    one second, that of the tenth comes before that of the ninth."""
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))


def write(folder: Path, begin: int, end: int, value: float) -> None:
    log = MetricLog(folder, begin, 20, "seed: 0", Config())
    for step in range(begin + 1, end + 1):
        log.write(step, {"train/loss": value + step, "val/tau": 1.0})
    log.close()


def board(folder: Path) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder / "tensorboard" / folder.name))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars("train/loss")]


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_resumed_run_is_cut_back_to_the_checkpoints_step_and_goes_on(tmp_path: Path) -> None:
    write(tmp_path, 0, 9, 0.5)
    write(tmp_path, 6, 12, 100.5)
    expected = [(step, step + 0.5) for step in range(1, 7)] + [(step, step + 100.5) for step in range(7, 13)]
    assert [(row["step"], row["train/loss"]) for row in lines(tmp_path)] == expected
    assert board(tmp_path) == expected


def test_a_run_that_starts_over_leaves_nothing_of_the_old_one(tmp_path: Path) -> None:
    """Killed before its first checkpoint, but after the validation of step 0."""
    log = MetricLog(tmp_path, 0, 20, "seed: 0", Config())
    log.write(0, {"train/loss": 0.5})
    log.close()
    write(tmp_path, 0, 2, 7.5)
    assert [row["train/loss"] for row in lines(tmp_path)] == [8.5, 9.5]
    assert board(tmp_path) == [(1, 8.5), (2, 9.5)]


def test_a_line_that_was_cut_short_is_dropped(tmp_path: Path) -> None:
    write(tmp_path, 0, 3, 0.5)
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text()[:-10])
    write(tmp_path, 3, 4, 0.5)
    assert [row["step"] for row in lines(tmp_path)] == [1, 2, 4]


def test_numbers_keep_their_full_precision(tmp_path: Path) -> None:
    write(tmp_path, 0, 1, 0.1 + 0.2)
    assert lines(tmp_path)[0]["train/loss"] == 0.1 + 0.2 + 1


def test_the_config_is_shown_as_text(tmp_path: Path) -> None:
    write(tmp_path, 0, 1, 0.0)
    events = EventAccumulator(str(tmp_path / "tensorboard" / tmp_path.name))
    events.Reload()
    (event,) = events.Tensors("config/text_summary")
    assert b"seed: 0" in event.tensor_proto.string_val[0]


def test_the_page_of_hyperparameters_has_every_knob_and_another_one_the_curves_in_order(tmp_path: Path) -> None:
    write(tmp_path, 0, 1, 0.0)
    events = EventAccumulator(str(tmp_path / "tensorboard" / tmp_path.name))
    events.Reload()
    session = HParamsPluginData.FromString(events.PluginTagToContent("hparams")["_hparams_/session_start_info"])
    shown = session.session_start_info.hparams
    assert shown.keys() == KNOBS.keys()
    assert (shown["train.seed"].number_value, shown["train.betas"].string_value) == (0, "[0.9, 0.95]")
    (event,) = events.Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    assert [category.title for category in layout.category] == ["what it learns", "how fast", "how"]


def test_the_curves_of_an_older_version_go_on_where_they_are(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").mkdir()
    (tmp_path / "tensorboard/events.out.tfevents.1").touch()
    log = MetricLog(tmp_path, 3, 20, "", Config())
    log.close()
    assert log.board_folder == tmp_path / "tensorboard"


class FakeWandb(types.ModuleType):
    """What is called of the package, with what."""

    def __init__(self, refuses: str = ""):
        super().__init__("wandb")
        self.refuses, self.joined, self.logged, self.finished = refuses, [], [], 0
        self.__spec__ = importlib.machinery.ModuleSpec("wandb", None)

    def init(self, **about: Any) -> FakeWandb:
        if self.refuses:
            raise RuntimeError(self.refuses)
        self.joined.append(about)
        return self

    def log(self, numbers: dict[str, float], step: int) -> None:
        self.logged.append((step, numbers))

    def finish(self) -> None:
        self.finished += 1


def test_weights_and_biases_is_shown_the_same_run_where_it_goes_on(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", fake := FakeWandb())
    check_wandb("drafts")
    for begin in (0, 3, 0):
        log = MetricLog(tmp_path, begin, 20, "", Config(log=LogConfig(wandb="drafts")))
        log.write(begin + 1, {"train/loss": 0.5, "train/tau": None})
        log.close()
    first, goes_on, anew = fake.joined
    assert (first["project"], first["name"], first["resume"]) == ("drafts", tmp_path.name, "allow")
    assert first["id"] == goes_on["id"] != anew["id"] and first["config"]["log"]["wandb"] == "drafts"
    assert fake.logged == [(1, {"train/loss": 0.5}), (4, {"train/loss": 0.5}), (1, {"train/loss": 0.5})]
    assert fake.finished == 3
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb("no API key"))
    with pytest.raises(ValueError, match=r"log.wandb: no API key; run `wandb login`, or set WANDB_MODE=offline"):
        MetricLog(tmp_path, 0, 20, "", Config(log=LogConfig(wandb="drafts")))


def test_a_missing_package_is_said_before_anything_long(debug_config, monkeypatch, alone) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"its package is missing: pip install wandb, or leave log.wandb out"):
        Trainer(debug_config("log.wandb=drafts"), alone)


def test_a_full_disk_costs_pictures_and_no_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = MetricLog(tmp_path, 0, 20, "seed: 0", Config())
    file = log._lines.fileno()
    log.write(1, {"train/loss": 1.5})
    with open("/dev/full", "wb") as full, open(os.dup(file), "wb") as room:
        os.dup2(full.fileno(), file)
        log.write(2, {"train/loss": 2.5})
        assert "STEP 2 NOT YET LOGGED" in (told := capsys.readouterr().err) and "No space left on device" in told
        os.dup2(room.fileno(), file)
    log.write(3, {"train/loss": 3.5})
    log.close()
    assert [(row["step"], row["train/loss"]) for row in lines(tmp_path)] == [(1, 1.5), (2, 2.5), (3, 3.5)]
    assert board(tmp_path) == [(1, 1.5), (3, 3.5)]


def test_the_training_time_counts_steps_and_not_what_lies_between_them(tmp_path: Path) -> None:
    rows = [{"step": 0, "val/tau": 1.0}, {"step": 5, "perf/step_s": 2.0}, {"step": 8, "perf/step_s": 4.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 9, "val')
    assert seconds_in_steps(read_curves(tmp_path)) == 5 * 2.0 + 3 * 4.0
    assert seconds_in_steps(read_curves(tmp_path / "none")) == 0
