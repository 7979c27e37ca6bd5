from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from dflash_dist.config import Config, load_config
from dflash_dist.ranks import World
from tests.ranks import close_pools
from tests.tiny import make_tiny_target

REPOSITORY = Path(__file__).parent.parent
MINIMAL = """\
output_dir: runs/x
target: {path: some/model, layer_ids: [1, 9, 17]}
data: {path: chats.jsonl}
draft: {mask_token_id: 7}
"""

# How many examples a property is tried with; `pytest --hypothesis-profile=thorough` tries 10,000 over the 8 templates.
slow_machine = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("quick", max_examples=50, derandomize=True, **slow_machine)
settings.register_profile("thorough", max_examples=1250, **slow_machine)
settings.load_profile("quick")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)
    # Set before any rank or command starts, so that none of them caches data in the user's home.
    cache = tempfile.TemporaryDirectory(prefix="dflash-test-cache-")
    config.add_cleanup(cache.cleanup)
    os.environ["XDG_CACHE_HOME"] = cache.name


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, so that two workers end at about the same time: those of this folder, which start whole
    programs, and of training."""
    folders = [REPOSITORY / "tests", REPOSITORY / "tests/training"]
    items.sort(key=lambda item: folders.index(item.path.parent) if item.path.parent in folders else len(folders))


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
def load(tmp_path: Path):
    """Loads a YAML text, the minimal one unless told, with overrides."""

    def load(*overrides: str, text: str = MINIMAL) -> Config:
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return load_config(path, overrides)

    return load


@pytest.fixture
def debug_config(tmp_path: Path, tiny_target: Path):
    """The debug preset with overrides, on the tiny target with lively weights, writing below `tmp_path`."""

    def load(*overrides: str) -> Config:
        ours = [f"output_dir={tmp_path / 'run'}", f"target.path={tiny_target}"]
        return load_config(REPOSITORY / "configs/debug.yaml", [*ours, *overrides])

    return load
