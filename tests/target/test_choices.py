"""What a run takes of its target where the config leaves it open, and refuses where the config says otherwise."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import AddedToken
from transformers import LlamaConfig

from dflash_dist.config import load_config
from dflash_dist.target.choices import check_capture, check_mask_token, layers_to_capture, mask_token
from dflash_dist.target.load import TargetInfo, read_info
from dflash_dist.training import setup
from tests.conftest import REPOSITORY

CHATML = "{% for message in messages %}<|im_start|>{{ message.content }}<|im_end|>{% endfor %}"


def target(added: dict[int, str], tokens: int, vocabulary: int, stop: int, **config: Any) -> TargetInfo:
    """A target with the tokens that its published tokenizer adds, as far as they matter."""
    tokenizer: Any = SimpleNamespace(
        added_tokens_decoder={i: AddedToken(text, special=not text.startswith("<th")) for i, text in added.items()},
        get_vocab=lambda: {"last": tokens - 1},
        chat_template=CHATML,
        pad_token_id=None,
        bos_token_id=min(added),
    )
    return TargetInfo("its/name", "main", LlamaConfig(vocab_size=vocabulary, **config), tokenizer, [stop])


QWEN3 = target({151643: "<|endoftext|>", 151644: "<|im_start|>", 151667: "<think>"}, 151669, 151936, 151645)
LLAMA = target(
    {128000: "<|begin_of_text|>", 128003: "<|reserved_special_token_1|>", 128002: "<|reserved_special_token_0|>"},
    *(128256, 128256, 128009),
)
GPT_OSS = target(
    {199998: "<|startoftext|>", 200000: "<|reserved_200000|>", 200001: "<|reserved_200001|>"}, 200019, 201088, 200002
)
SMOLLM2 = target(
    {0: "<|endoftext|>", 1: "<|im_start|>", 2: "<|im_end|>", 3: "<repo_name>", 4: "<reponame>"}, 49152, 49152, 2
)
SHIPPED = {
    "qwen3-4b": (QWEN3, 36),
    "qwen3-8b": (QWEN3, 36),
    "qwen3-8b-dflash2": (QWEN3, 36),
    "qwen3-8b-domino": (QWEN3, 36),
    "qwen3-8b-dspark": (QWEN3, 36),
    "qwen3-8b-lilicorr": (QWEN3, 36),
    "qwen3-8b-window": (QWEN3, 36),
    "qwen3-coder-30b-a3b": (QWEN3, 48),
    "llama-3.1-8b": (LLAMA, 32),
    "gpt-oss-20b": (GPT_OSS, 24),
    "demo": (SMOLLM2, 30),
}


@pytest.mark.parametrize("name", SHIPPED)
def test_the_shipped_configs_state_what_would_be_chosen(name: str) -> None:
    config, (info, layers) = load_config(REPOSITORY / f"configs/{name}.yaml"), SHIPPED[name]
    assert config.layer_ids == layers_to_capture(layers)
    chosen = mask_token(info)
    assert chosen and config.mask_token_id == chosen.value
    assert chosen.why in (REPOSITORY / f"configs/{name}.yaml").read_text()


def test_layers_are_spread_from_the_second_to_the_third_from_last() -> None:
    assert layers_to_capture(36) == [1, 9, 17, 25, 33]  # as the published drafts of Qwen3-8B
    assert [layers_to_capture(layers) for layers in (2, 3, 4, 5, 6)] == [[0], [1], [2], [1, 2], [1, 2, 3]]
    with pytest.raises(ValueError, match="single layer"):
        layers_to_capture(1)


def test_a_token_that_the_data_holds_or_that_stands_for_an_image_is_not_chosen() -> None:
    assert mask_token(SMOLLM2, found={3}).value == 4  # type: ignore[union-attr]
    assert mask_token(SMOLLM2, found={3, 4}) is None
    of_images = target({5: "<|im_start|>", 6: "<|image_pad|>", 7: "<|video|>"}, 8, 8, 9, image_token_id=6)
    assert mask_token(of_images).value == 7  # type: ignore[union-attr]
    assert mask_token(QWEN3, found={151669}) is None, "<think> is no special token: a tokenizer may put it anywhere"


def test_a_run_takes_and_says_what_its_config_leaves_open(tiny_target, alone, load, capsys) -> None:
    config, _ = setup.check_target(
        load(f"target.path={tiny_target}", "target.layer_ids=null", "draft.mask_token_id=null"), alone
    )
    assert (config.layer_ids, config.mask_token_id) == ([1, 2, 3], 3)
    told = capsys.readouterr().out
    assert "target.layer_ids: [1, 2, 3], 3 of 6, spread evenly" in told
    assert "draft.mask_token_id: 3, <mask>, reserved" in told
    config = load(f"target.path={tiny_target}", "target.layer_ids=[1,2]", "draft.mask_token_id=3")
    assert setup.check_target(config, alone)[0] == config
    assert not capsys.readouterr().out, "what is stated need not be said"


@pytest.mark.parametrize(
    ("ids", "message"),
    [([0, 6], r"\[6\] are out of range: .* layers 0 to 4 can be captured"), ([1, 5], "contains 5, the last layer")],
)
def test_layers_that_must_not_be_captured_are_refused(tiny_target, ids: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_capture(read_info(str(tiny_target)), ids)


@pytest.mark.parametrize(
    ("token", "message"),
    [(260, "outside the vocabulary of 260"), (-1, "outside"), (2, "is the eos token"), (0, "is the pad token")],
)
def test_an_unfit_mask_token_is_refused(tiny_target, token: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_mask_token(read_info(str(tiny_target)), token)
    check_mask_token(read_info(str(tiny_target)), 3)
