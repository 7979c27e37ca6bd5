"""Targets whose layers see a window, a chunk or everything: a cache that keeps all serves them and can be cut."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from dflash_dist.decoding.speculative import Decoder
from dflash_dist.draft.kinds.dflash import DFlashDraftModel
from dflash_dist.target.load import check_rollback
from tests.tiny import enliven, tiny_shape

WINDOW, PROMPT, ANSWER = 8, [5, 9, 33], 32
SHAPE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
# The first two layers see all and the others a window, or the two kinds take turns, or all see a window or a chunk.
TARGETS = {
    "Qwen2": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2},
    "Qwen3": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2},
    "GptOss": {"sliding_window": WINDOW, "num_local_experts": 4, "num_experts_per_tok": 2},
    "Gemma3Text": {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "Mistral": {"sliding_window": WINDOW},
    "Llama4Text": {"attention_chunk_size": WINDOW, "num_local_experts": 2, "intermediate_size_mlp": 64},
}


def make_decoder(name: str) -> Decoder:
    config = getattr(transformers, f"{name}Config")(**SHAPE, **TARGETS[name])
    torch.manual_seed(4)
    target = enliven(AutoModelForCausalLM.from_config(config)).eval().requires_grad_(False)
    changes = {"hidden_size": 32, "head_dim": 8, "intermediate_size": 64, "target_layer_ids": [0, 2]}
    return Decoder(target, DFlashDraftModel(tiny_shape(vocab_size=97, block_size=6, **changes)), stop_ids=[])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TARGETS)
def test_a_text_longer_than_the_window_is_decoded_as_without_a_cache(name, monkeypatch):
    decoder = make_decoder(name)
    text = list(PROMPT)
    for _ in range(ANSWER):
        logits = decoder.target(input_ids=torch.tensor([text]), use_cache=False).logits[0, -1]
        assert float(logits.topk(2).values.diff().abs()) > 1e-3, "a tie: choose another seed"
        text.append(int(logits.argmax()))
    answer = text[len(PROMPT) :]
    assert len(set(answer)) > 8 and decoder.plain(PROMPT, ANSWER).tokens == answer

    rights = iter([0, 3, 5, 1, 0, 5, 2] * 5)  # of five proposals, so many are right: the rest are taken back

    def propose(anchor, context):
        done = context.length - len(PROMPT) + 1
        right = next(rights)
        following = (answer + [0] * 5)[done : done + 5]
        return following[:right] + [(token + 1) % 97 for token in following[right:]]

    monkeypatch.setattr(decoder, "_propose", propose)
    fast = decoder.speculative(PROMPT, ANSWER)
    assert fast.tokens == answer
    assert fast.emitted[:7] == [1, 4, 6, 2, 1, 6, 3]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("Qwen3Next", "linear_attention"),
        ("Mamba", "state_space"),
        ("FalconH1", "state_space"),
        ("MiniMax", "linear_attention"),
    ],
)
def test_layers_that_keep_a_state_of_all_tokens_are_refused_by_kind(name, kind):
    config = getattr(transformers, f"{name}Config")()
    with pytest.raises(ValueError, match=f"drops rejected tokens .* kind .*{kind}.* cannot: {config.model_type}"):
        check_rollback(config)
    with pytest.raises(ValueError, match="drops rejected tokens"):  # before anything of the model is asked for
        Decoder(SimpleNamespace(config=config), DFlashDraftModel(tiny_shape()), stop_ids=[])
