from __future__ import annotations

import json
from pathlib import Path

import pytest

from dflash_dist import demo
from dflash_dist.config import load_config
from tests.conftest import REPOSITORY


def test_training_never_sees_a_held_out_prompt() -> None:
    training, held_out = demo.split(demo.prompts())
    assert len(held_out) == demo.HELD_OUT <= 24
    assert len(set(training)) == len(training) and not set(training) & set(held_out)
    shipped = [json.loads(line)["messages"] for line in (REPOSITORY / demo.ANSWERS).read_text().splitlines()]
    asked = [messages[0]["content"] for messages in shipped]
    assert set(asked) <= set(training) and len(set(asked)) == len(asked) > 1000
    assert all([message["role"] for message in messages] == ["user", "assistant"] for messages in shipped)


def test_the_config_and_the_program_name_the_same_files() -> None:
    config = load_config(REPOSITORY / demo.CONFIG)
    assert (Path(config.output_dir), Path(config.target.path)) == (demo.FOLDER, demo.TARGET)
    assert Path(config.data.path) == demo.ANSWERS
    assert config.data.val_path == str(demo.FOLDER / "heldout.jsonl")


def test_answers_that_were_cut_are_not_shipped(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": why}], "finish_reason": why} for why in ("stop", "length")]
    (tmp_path / "all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    demo.keep_finished(tmp_path / "all.jsonl", tmp_path / "kept.jsonl")
    assert (tmp_path / "kept.jsonl").read_text() == '{"messages": [{"role": "user", "content": "stop"}]}\n'


def test_the_pictures_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "FOLDER", tmp_path)
    curves = [{"step": s, f"{part}/loss": 1.0, f"{part}/tau": 2.0} for s in (1, 2) for part in ("train", "val")]
    demo.draw(curves, {"acceptance_by_slot": [0.1, 0.0]}, {"acceptance_by_slot": [0.6, 0.4]})
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
