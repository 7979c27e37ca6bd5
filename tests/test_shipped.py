"""The shipped configs are what `init` writes, with the command that stands in their second line."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from dflash_dist import init
from dflash_dist.cost.shapes import PUBLISHED
from dflash_dist.target.load import TargetInfo
from tests.conftest import REPOSITORY

COMMAND = re.compile(r"^# dflash_dist init (.*)$", re.MULTILINE)
SHIPPED = sorted(path for path in (REPOSITORY / "configs").glob("*.yaml") if COMMAND.search(path.read_text()))

MESSAGES = "{% for message in messages %}{{ message.content }}{% endfor %}"
THINKS = MESSAGES + "{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}"
HARMONY = (
    "{% if model_identity is not defined %}{% set model_identity = 'ChatGPT' %}{% endif %}"
    "{% if reasoning_effort is not defined %}{% set reasoning_effort = 'medium' %}{% endif %}"
    "{{ model_identity + reasoning_effort }}{% if builtin_tools %}tools{% endif %}" + MESSAGES
)
QWEN = {151643: "<|endoftext|>", 151644: "<|im_start|>", 151645: "<|im_end|>"}
LLAMA = {128000: "<|begin_of_text|>", 128002: "<|reserved_special_token_0|>", 128009: "<|eot_id|>"}
GPT_OSS = {199998: "<|startoftext|>", 200000: "<|reserved_200000|>", 200002: "<|return|>"}
# As far as it matters here, what their tokenizers have: added tokens, how many there are, the one that ends an answer,
# and the arguments that their templates ask about; and whose architecture they have.
TARGETS: dict[str, tuple[dict[int, str], int, int, str, str]] = {
    "Qwen/Qwen3-4B": (QWEN, 151669, 151645, THINKS, "Qwen/Qwen3-4B"),
    "Qwen/Qwen3-8B": (QWEN, 151669, 151645, THINKS, "Qwen/Qwen3-8B"),
    "Qwen/Qwen3-Coder-30B-A3B-Instruct": (QWEN, 151669, 151645, MESSAGES, "Qwen/Qwen3-30B-A3B"),
    "meta-llama/Llama-3.1-8B-Instruct": (LLAMA, 128256, 128009, MESSAGES, "meta-llama/Llama-3.1-8B-Instruct"),
    "openai/gpt-oss-20b": (GPT_OSS, 200019, 200002, HARMONY, "openai/gpt-oss-20b"),
}


def info_of(name: str, *_: Any, **__: Any) -> TargetInfo:
    added, count, stop, template, like = TARGETS[name]
    words = {"<unk>": 0, "last": count - 1} | {text: number for number, text in added.items()}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in added.values()])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, eos_token=added[stop])
    return TargetInfo(name, "main", PUBLISHED[like](), fast, [stop])


def test_all_but_the_presets_are_written_by_init() -> None:
    others = {path.stem for path in (REPOSITORY / "configs").glob("*.yaml")} - {path.stem for path in SHIPPED}
    assert others == {"debug", "demo"}
    for path in SHIPPED:
        target, *arguments = shlex.split(COMMAND.findall(path.read_text())[0])
        assert target in TARGETS and arguments[-2:] == ["--out", f"configs/{path.name}"]


@pytest.mark.long
@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_config_is_what_init_writes(path: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(init, "read_info", info_of)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    init.main(shlex.split(COMMAND.findall(path.read_text())[0]))
    assert (tmp_path / "configs" / path.name).read_text() == path.read_text()
