"""Which targets may see several documents in one row, found by trying them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from dflash_dist.ranks import World
from dflash_dist.target.load import load_target, ordinary_tokens, read_info
from dflash_dist.target.probe import Packing, probe_packing, refuse_lookahead
from dflash_dist.target.tiny import tiny_tokenizer
from tests.families import ALONE, SEQ_LEN, TOKENS, family
from tests.ranks import run_ranks
from tests.tiny import target_of

PACKS = {
    "Qwen3": True,
    "Qwen3Moe": True,
    "Llama": True,
    "Gemma2": True,
    "Gemma3": True,  # multimodal
    "Llama4Text": True,  # its chunks begin with each document
    "GptOss": False,  # masks are built without positions
    "Qwen2_5_VL": False,  # positions in space and time
    "Bloom": False,  # no positions but those of the row
    "Qwen3Next": False,  # carries a state
    "Lfm2, convolutions": False,
    "Llama, YaRN": True,
    "Llama, dynamic NTK": False,  # the longest position sets the frequencies
    "Llama, longrope": False,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", PACKS)
def test_the_probe_says_what_a_slow_look_at_the_model_says_in_both_dtypes(name: str) -> None:
    """Over all families: `make families`."""
    of = family(name)
    assert of.mixes(seeds=2) == (not PACKS[name])
    found = of.packing()
    assert found.exact == PACKS[name]
    assert found.error < 1e-5 if PACKS[name] else found.error > 100 * found.rounding
    assert of.packing(torch.bfloat16).exact == PACKS[name]


@pytest.mark.parametrize("name", ["Llama, dynamic NTK", "Llama, longrope"])
def test_rotary_kinds_that_depend_on_length_pack_where_rows_stay_below_their_original_positions(name: str) -> None:
    assert probe_packing(family(name).target(), ALONE, TOKENS, seq_len=60).exact
    assert not probe_packing(family(name).target(), ALONE, TOKENS, seq_len=90).exact


@pytest.mark.parametrize("seq_len", [1, 3, 17])
def test_short_rows_are_probed_too(seq_len: int) -> None:
    assert probe_packing(family("Qwen3").target(), ALONE, TOKENS, seq_len, rows=2).exact
    assert not probe_packing(family("GptOss").target(), ALONE, TOKENS, seq_len, rows=2).exact


def test_rows_of_a_micro_batch_that_disturb_each_other_are_found() -> None:
    target = family("Qwen3").target()
    target.model.forward, forward = (
        (lambda input_ids, **kwargs: forward(input_ids=input_ids, **shared(kwargs))),
        (target.model.forward),
    )

    def shared(kwargs):
        """All rows at the positions of the first."""
        if kwargs.get("position_ids") is not None:
            kwargs["position_ids"] = kwargs["position_ids"][:1].expand_as(kwargs["position_ids"])
        return kwargs

    assert probe_packing(target, ALONE, TOKENS, SEQ_LEN, rows=1).exact
    assert not probe_packing(target, ALONE, TOKENS, SEQ_LEN, rows=2).exact


class Chaotic(nn.Module):
    """Keeps documents apart, and makes `gain` times as much of the last bit, which it rounds otherwise in every second
    place of a packed row."""

    target_layer_ids = (0,)

    def __init__(self, gain: float):
        super().__init__()
        self.gain, self.embedding = gain, nn.Embedding(max(TOKENS) + 1, 8)
        nn.init.uniform_(self.embedding.weight, 1, 2, torch.Generator().manual_seed(0))

    def takes_positions(self) -> bool:
        return True

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embedding

    def generate_batch(self, ids, _mask, _loss_mask, positions=None) -> SimpleNamespace:
        second = torch.arange(ids.shape[1])[:, None] % 2 * (positions is not None)
        embedded = self.embedding(ids)
        return SimpleNamespace(
            hidden_states=torch.sin(self.gain * embedded * (1 + torch.finfo(embedded.dtype).eps * second))
        )


@pytest.mark.parametrize(("gain", "exact"), [(1.0, True), (1e4, True), (1e9, False)])
def test_what_the_target_makes_of_the_last_bit_is_rounding_and_noise_is_none(gain: float, exact: bool) -> None:
    found = probe_packing(Chaotic(gain), ALONE, TOKENS, SEQ_LEN)  # type: ignore[arg-type]
    assert found.exact == exact
    assert {1.0: found.error < 1e-6, 1e4: 1e-4 < found.error < found.rounding, 1e9: found.rounding == 0.2}[gain]


def test_a_target_whose_features_know_later_tokens_is_refused() -> None:
    refuse_lookahead(family("Qwen3").target(), ALONE, TOKENS)
    with pytest.raises(ValueError, match=r"features depend on later tokens .* PaliGemmaModel is no causal decoder"):
        refuse_lookahead(family("PaliGemma").target(), ALONE, TOKENS)


def probed(world: World, folder: Path, spoilt: int | None = None) -> Packing:
    """What the ranks find of a target that they share; one of them may find its own copy of a feature spoilt."""
    info = read_info(str(folder))
    loaded = load_target(info, target_of([0, 2]), world)
    generate = loaded.model.generate_batch

    def spoil(ids, mask, loss_mask, positions=None):
        batch = generate(ids, mask, loss_mask, positions)
        batch.hidden_states[0, 5:] *= 1 + (positions is not None)
        return batch

    if spoilt == world.rank:
        loaded.model.generate_batch = spoil  # type: ignore[method-assign]
    return probe_packing(loaded.model, world, ordinary_tokens(info), 64)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for name in ("GptOss", "Qwen3"):
        made[name] = tmp_path_factory.mktemp("probed") / name
        AutoModelForCausalLM.from_config(family(name).config).save_pretrained(made[name])
        tiny_tokenizer().save_pretrained(made[name])
    return made


def test_ranks_that_share_a_target_find_what_one_finds(folders) -> None:
    for name, exact in (("GptOss", False), ("Qwen3", True)):
        alone = probed(ALONE, folders[name])
        assert alone.exact == exact
        for found in run_ranks(probed, 2, folders[name]):
            assert found.exact == exact and found.error == pytest.approx(alone.error, rel=1e-3, abs=1e-6)


def test_what_one_rank_finds_is_what_all_do(folders) -> None:
    assert [found.exact for found in run_ranks(probed, 2, folders["Qwen3"], 1)] == [False, False]


def test_ordinary_tokens_are_text(tiny_target: Path) -> None:
    info = read_info(str(tiny_target))
    assert ordinary_tokens(info) == list(range(4, 260))
    info.config.image_token_id, info.config.vocab_size = 7, 200
    assert ordinary_tokens(info) == [4, 5, 6, *range(8, 200)]
