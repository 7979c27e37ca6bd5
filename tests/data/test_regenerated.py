from __future__ import annotations

import json
from pathlib import Path

import pytest

from dflash_dist.config import Config, DataConfig, TargetConfig
from dflash_dist.data.regenerated import settings_file, warnings
from tests.data.files import chats, write_rows

SETTINGS = {
    "target": "org/Target-8B",
    "max_new_tokens": 48,
    "template_args": {"enable_thinking": False},
    "prompts": "0123456789abcdef",
    "result": {"rows": 20, "cut": 2},
}


@pytest.fixture
def said(tmp_path: Path):
    """What a run says of data beside these settings."""

    def read(settings: dict, path: str = "answers.jsonl", target: str = "/models/Target-8B", **data) -> str:
        file = write_rows(tmp_path / "answers.jsonl", chats(2))
        settings_file(file).write_text(json.dumps(settings))
        data = {
            "path": path if isinstance(path, dict) else str(tmp_path / path),
            "template_args": {"enable_thinking": False},
        } | data
        return "\n".join(warnings(Config(target=TargetConfig(path=target), data=DataConfig(**data)))).replace(
            f"{tmp_path}/", ""
        )

    return read


@pytest.mark.parametrize("path", ["answers.jsonl", ""], ids=["a file", "a folder"])
def test_data_of_the_run_itself_is_worth_no_word(said, path) -> None:
    assert said(SETTINGS, path) == ""


@pytest.mark.parametrize(
    "settings", [{}, {"target": 3}, SETTINGS | {"result": {"rows": "x"}}, SETTINGS | {"template_args": None}]
)
def test_settings_of_another_kind_say_nothing(said, settings) -> None:
    assert said(settings, target="Other") == ""


def test_another_target_other_arguments_and_many_cut_answers_are_named(said, tmp_path: Path) -> None:
    assert said(SETTINGS, target="org/Target-4B").startswith(
        "warning: answers.jsonl was written by org/Target-8B, and target.path is org/Target-4B: a draft must"
    )
    assert said(SETTINGS, template_args={}).startswith(
        'warning: answers.jsonl was written with the template arguments {"enable_thinking": false}, and'
        " data.template_args are {}: "
    )
    assert said(SETTINGS | {"result": {"rows": 1234, "cut": 124}}).startswith(
        "warning: 124 of the 1,234 rows of answers.jsonl end with an answer that was cut at 48 tokens, and "
    )
    weighted = {str(tmp_path / "answers.jsonl"): 1.0}
    assert said(SETTINGS, val_path=str(tmp_path / "answers.jsonl"), target="x").count("warning") == 2
    assert said(SETTINGS, path=weighted, target="x").count("warning") == 1
