"""From an empty folder with a target and chats to a draft that is served, in the commands of the README."""

from __future__ import annotations

import importlib
import json
import shlex
from pathlib import Path

import pytest

from dflash_dist.__main__ import COMMANDS
from tests.data.files import write_rows


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_from_chats_to_a_served_draft_in_eight_commands_and_no_editor(here: Path, tiny_target: Path, capsys) -> None:
    def run(command: str) -> str:
        name, *rest = shlex.split(command)
        importlib.import_module(COMMANDS[name][0]).main(rest)
        said = capsys.readouterr()
        return said.out + said.err

    (here / "target").symlink_to(tiny_target)
    asked = [{"messages": [{"role": "user", "content": f"{k} and {k}?"}]} for k in range(40)]
    write_rows(here / "chats.jsonl", asked)

    run("regenerate --target target --prompts chats.jsonl --out answers.jsonl --max-new-tokens 12 --batch-size 40")
    assert len((here / "answers.jsonl").read_text().splitlines()) == 40
    # A random target writes its mask token, too, which `init` would not take.
    said = run("init target --data answers.jsonl --gpus 0 --out mine.yaml output_dir=runs/mine draft.mask_token_id=3")
    assert "python -m dflash_dist train --config mine.yaml" in said
    assert "answer that was cut at 12 tokens" in run("preview --config mine.yaml")
    said = run("train --config mine.yaml train.max_steps=4")
    assert "export --run runs/mine" in said
    assert sorted(path.name for path in (here / "runs/mine/checkpoints").glob("step-*"))[-1] == "step-00000004"
    said = run("export --run runs/mine --out draft --dtype float32")
    assert {"config.json", "model.safetensors", "README.md"} <= {path.name for path in (here / "draft").iterdir()}
    run(
        "evaluate --target target --draft draft --prompts answers.jsonl --limit 3 --max-new-tokens 8 --json report.json"
    )
    report = json.loads((here / "report.json").read_text())
    assert report["prompts"] == report["equal_outputs"] == 3
    assert "FAULT" not in run("check draft --target target")
    run("report runs/mine --out page.html")
    assert "</html>" in (here / "page.html").read_text()
