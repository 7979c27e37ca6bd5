"""Rows, files of them, and an encoder for them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dflash_dist.data.chat import ChatEncoder
from dflash_dist.target.tiny import tiny_tokenizer

# ChatML in which an answer changes once others follow it: every turn becomes a document of its own.
CHANGING = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{{ message.content if loop.last or message.role != 'assistant' else message.content | upper }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_ANSWER = {"messages": [{"role": "user", "content": "hello?"}]}


def make_encoder(**options: Any) -> ChatEncoder:
    """One token a byte; 2 ends a turn."""
    return ChatEncoder(tiny_tokenizer(), [2], **options)


def chat(*contents: Any, **more: Any) -> dict[str, Any]:
    """A row in which user and assistant take turns."""
    turns = [{"role": ("user", "assistant")[k % 2], "content": content} for k, content in enumerate(contents)]
    return {"messages": turns, **more}


def chats(count: int, name: str = "") -> list[dict[str, Any]]:
    """Different conversations of one question each."""
    return [chat(f"{name}{k}?", f"{name}{k}!") for k in range(count)]


def write_rows(path: Path, rows: Iterable[dict[str, Any] | str]) -> Path:
    """A JSONL file; a row that is text stands there as it is."""
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text("".join(line + "\n" for line in lines))
    return path
