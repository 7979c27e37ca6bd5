"""The shipped configs: they load, they follow the recipe, and they fit their targets' published sizes."""

from __future__ import annotations

import pytest
import yaml

from dflash_dist.config import load_config
from tests.conftest import REPOSITORY

# name -> layers, vocabulary, ids that text or templates use (from the targets' published configs and tokenizers)
PUBLISHED = {
    "qwen3-4b": (36, 151936, range(151669)),
    "qwen3-8b": (36, 151936, range(151669)),
    "qwen3-8b-dflash2": (36, 151936, range(151669)),
    "qwen3-8b-domino": (36, 151936, range(151669)),
    "qwen3-8b-dspark": (36, 151936, range(151669)),
    "qwen3-8b-lilicorr": (36, 151936, range(151669)),
    "qwen3-8b-window": (36, 151936, range(151669)),
    "qwen3-coder-30b-a3b": (48, 151936, range(151669)),
    "llama-3.1-8b": (32, 128256, [*range(128002), 128006, 128007, 128008, 128009, 128010]),
    "gpt-oss-20b": (24, 201088, [*range(200000), 200002, 200003, 200005, 200006, 200007, 200008, 200012]),
    "demo": (30, 49152, [0, 1, 2]),
    "debug": (6, 260, [0, 1, 2]),
}
CONFIGS = sorted((REPOSITORY / "configs").glob("*.yaml"))


def test_every_config_is_known_here() -> None:
    assert {path.stem for path in CONFIGS} == PUBLISHED.keys()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_fits_its_target(path) -> None:
    config = load_config(path)
    layers, vocabulary, taken = PUBLISHED[path.stem]
    assert config.draft.mask_token_id not in taken and config.draft.mask_token_id < vocabulary
    assert config.target.layer_ids[-1] < layers - 1
    assert path.read_text().startswith("#"), "says what it is for"


@pytest.mark.parametrize("name", sorted(PUBLISHED.keys() - {"debug"}))
def test_the_captured_layers_are_the_papers(name: str) -> None:
    """`round(1 + i (n - 4) / (c - 1))`: from the 2nd to the 3rd-from-last (arXiv 2602.06036, A.1)."""
    ids, layers = load_config(REPOSITORY / f"configs/{name}.yaml").target.layer_ids, PUBLISHED[name][0]
    assert ids == [round(1 + i * (layers - 4) / (len(ids) - 1)) for i in range(len(ids))]


@pytest.mark.parametrize("name", sorted(PUBLISHED.keys() - {"debug", "demo"}))
def test_the_recipe_is_the_papers(name: str) -> None:
    config = load_config(REPOSITORY / f"configs/{name}.yaml")
    assert (config.train.lr, config.train.epochs, config.train.warmup, config.train.clip_norm) == (6e-4, 6, 0.04, 1.0)
    assert config.loss.anchors == 512
    assert config.data.seq_len == (4096 if "coder" in name else 3072)
    assert config.draft.num_layers == (8 if "coder" in name else 5)
    assert config.draft.block_size == (10 if "llama" in name else 16)
    assert config.gamma == {16: 7.0, 10: 5.0}[config.draft.block_size]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_states_nothing_twice(path) -> None:
    """A key that repeats would be read in silence, its first value lost."""

    class Strict(yaml.SafeLoader):
        pass

    def mapping(loader, node, deep=False):
        keys = [loader.construct_object(key) for key, _ in node.value]
        assert len(keys) == len(set(keys)), keys
        return yaml.SafeLoader.construct_mapping(loader, node, deep)

    Strict.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    yaml.load(path.read_text(), Strict)
