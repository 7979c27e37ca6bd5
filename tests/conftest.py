from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dflash_dist.config import Config, load_config
from dflash_dist.ranks import World
from dflash_dist.target.tiny import make_tiny_target
from tests.ranks import close_pools

REPOSITORY = Path(__file__).parent.parent


def pytest_configure() -> None:
    torch.set_num_threads(1)


def pytest_sessionfinish() -> None:
    close_pools()


@pytest.fixture(scope="session")
def alone() -> World:
    return World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="session")
def tiny_target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random 6-layer Qwen3 (hidden 64, byte vocabulary, mask token 3) and its tokenizer."""
    folder = tmp_path_factory.mktemp("tiny") / "target"
    make_tiny_target(folder)
    return folder


@pytest.fixture
def write_chats(tmp_path: Path):
    """Writes conversations, given as lists of (role, content), to a JSONL file."""

    def write(*conversations: list[tuple[str, str]], name: str = "chats.jsonl") -> Path:
        rows = [{"messages": [{"role": role, "content": text} for role, text in turns]} for turns in conversations]
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


@pytest.fixture
def debug_config(tmp_path: Path):
    """The debug preset with overrides, writing below `tmp_path`."""

    def load(*overrides: str) -> Config:
        return load_config(REPOSITORY / "configs/debug.yaml", [f"output_dir={tmp_path / 'run'}", *overrides])

    return load
