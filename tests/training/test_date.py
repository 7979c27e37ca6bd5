"""The day that a chat template writes belongs to the run, whatever the clock says later or elsewhere."""

from __future__ import annotations

import datetime
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from dflash_dist.config import Config
from dflash_dist.data import template
from dflash_dist.prepare import preview
from dflash_dist.prepare.capture import capture
from dflash_dist.ranks import World
from dflash_dist.target.tiny import CHATML
from dflash_dist.training import setup
from dflash_dist.training.trainer import Trainer
from tests.data.files import chats, write_rows
from tests.ranks import run_ranks

ALONE = World(0, 1, torch.device("cpu"))
FIRST, SECOND, THIRD = "2031-12-31", "2032-01-01", "2032-01-02"


def clock(day: str) -> SimpleNamespace:
    """Stands for the module `datetime` on that day."""
    today = datetime.date.fromisoformat(day)
    return SimpleNamespace(date=SimpleNamespace(today=lambda: today), datetime=datetime.datetime)


@pytest.fixture
def on(monkeypatch):
    """Sets the clock."""
    return lambda day: monkeypatch.setattr(template, "datetime", clock(day))


@pytest.fixture
def dated(debug_config, tmp_path):
    """The debug preset with a template that writes the day, and a cache of its own."""
    (tmp_path / "dated.jinja").write_text("{{ strftime_now('%d %b %Y') }}" + CHATML)
    rows = write_rows(tmp_path / "chats.jsonl", chats(40))
    own = (f"data.chat_template={tmp_path / 'dated.jinja'}", f"data.cache_dir={tmp_path / 'cache'}")
    short = (f"data.path={rows}", "data.val_conversations=0", "validate.every=0", "train.max_steps=2", "log.every=1")
    return lambda *overrides: debug_config(*own, *short, "loss.anchors=4", *overrides)


def train(config: Config) -> Trainer:
    trainer = Trainer(config, ALONE)
    trainer.run()
    return trainer


def date_of(folder: str | Path) -> str | None:
    return yaml.safe_load((Path(folder) / "config.yaml").read_text())["data"]["date"]


def last_loss(config: Config) -> float:
    return json.loads((Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()[-1])["train/loss"]


def test_a_run_goes_on_with_the_day_on_which_it_began(dated, on, tmp_path):
    on(FIRST)
    train(dated("train.max_steps=1"))
    shutil.rmtree(tmp_path / "cache")
    on(SECOND)
    config = dated()
    trainer = train(config)
    assert date_of(config.output_dir) == FIRST == trainer.config.data.date
    whole = dated(f"output_dir={tmp_path / 'whole'}", f"data.date={FIRST}")
    train(whole)
    assert last_loss(config) == last_loss(whole)


def test_another_day_is_other_data(dated, on):
    on(FIRST)
    train(dated("train.max_steps=1"))
    with pytest.raises(ValueError, match=r"cannot be resumed. Changed: .*fingerprint"):
        train(dated(f"data.date={SECOND}"))


def fix(world: World, config: Config, days: list[str]) -> str | None:
    """The day that a rank takes whose own clock says another than that of rank 0."""
    before, template.datetime = template.datetime, clock(days[world.rank])  # type: ignore[assignment]
    try:
        config = setup.make_builtins(config, world)
        return setup.fix_date(*setup.check_target(config, world), world).data.date
    finally:
        template.datetime = before  # type: ignore[assignment]


def test_ranks_on_both_sides_of_midnight_take_the_day_of_the_first(dated):
    assert run_ranks(fix, 2, dated(), [FIRST, SECOND]) == [FIRST] * 2
    assert run_ranks(fix, 2, dated(f"data.date={THIRD}"), [FIRST, SECOND]) == [THIRD] * 2


def test_a_template_without_a_day_leaves_it_open(debug_config, on):
    """Also a run whose config knows no date, as they were once written, goes on."""
    config = debug_config("train.max_steps=1", "validate.every=0")
    on(FIRST)
    train(config)
    assert date_of(config.output_dir) is None
    file = Path(config.output_dir) / "config.yaml"
    file.write_text(file.read_text().replace("  date: null\n", ""))
    on(SECOND)
    train(debug_config("train.max_steps=2", "validate.every=0"))
    assert date_of(config.output_dir) is None


@pytest.mark.parametrize("text", ["data: {date", "- 1", "data: 3", ""])
def test_half_a_config_of_a_run_that_was_killed_says_no_day(dated, on, text):
    on(SECOND)
    config = dated()
    Path(config.output_dir).mkdir()
    (Path(config.output_dir) / "config.yaml").write_text(text)
    assert fix(ALONE, config, [SECOND]) == SECOND


def test_features_are_captured_and_read_with_the_day_on_which_that_began(dated, on, tmp_path):
    out = tmp_path / "features"
    on(FIRST)
    capture(dated(), out, ALONE, shard_mib=1)
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    next(out.glob("train-*")).unlink()
    on(SECOND)
    capture(dated(), out, ALONE, shard_mib=1)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    on(THIRD)
    config = dated(f"target.features={out}")
    train(config)
    assert date_of(config.output_dir) == FIRST


def test_preview_says_which_day_is_written(dated, on, capsys, tmp_path):
    on(FIRST)
    config = setup.make_builtins(dated(), ALONE)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(setup.to_tree(config)))
    preview.main(["--config", str(tmp_path / "run.yaml")])
    shown = capsys.readouterr().out
    assert f"the chat template writes a date, in this run {FIRST} (data.date)" in shown
    tokens = shown[shown.index("row 1, document 1") :].splitlines()[1:12]
    assert "".join(eval(line.split(maxsplit=2)[-1]) for line in tokens) == "31 Dec 2031"
    preview.main(["--config", str(tmp_path / "run.yaml"), "data.chat_template=null"])
    assert "writes a date" not in capsys.readouterr().out
