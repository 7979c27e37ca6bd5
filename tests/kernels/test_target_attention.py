"""The target's attention on a CPU against torch's, alone and in whole models."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, DynamicCache, Gemma3TextConfig, GptOssConfig, LlamaConfig, Qwen3Config

from dflash_dist.kernels.target_attention_cpu import CHUNK, NAME, attend_in_chunks, suit_device
from tests.tiny import enliven

SMALL = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 1024,
}
CONFIGS = {
    "qwen3": Qwen3Config(**SMALL),
    "llama": LlamaConfig(**SMALL),
    "gemma3": Gemma3TextConfig(**SMALL, sliding_window=40, layer_types=["sliding_attention", "full_attention"]),
}


class Decoder(torch.nn.Module):
    is_causal = True


def documents(length: int) -> torch.Tensor:
    """Documents of growing length, one after the other: which query sees which key."""
    document = torch.arange(length).float().sqrt().floor() // 3
    return (document[:, None] == document).tril()[None, None].expand(2, 1, -1, -1)


def window(length: int) -> torch.Tensor:
    """Another window in each row."""
    distance = torch.arange(length)[:, None] - torch.arange(length)
    return torch.stack([(distance >= 0) & (distance < size) for size in (7, 300)])[:, None]


@pytest.mark.parametrize("mask", [None, documents, window], ids=["causal", "documents", "window"])
@pytest.mark.parametrize("length", [1, 100, CHUNK, CHUNK + 1, 2 * CHUNK + 88])
@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (6, 2)])
def test_it_is_torchs_attention(mask, length: int, heads: int, kv_heads: int) -> None:
    draw = torch.Generator().manual_seed(length)
    query, key, value = (torch.randn(2, n, length, 16, generator=draw) for n in (heads, kv_heads, kv_heads))
    visible = mask(length) if mask else None
    expected = F.scaled_dot_product_attention(
        query, key, value, attn_mask=visible, is_causal=visible is None, scale=0.2, enable_gqa=True
    )
    output, _ = attend_in_chunks(Decoder(), query, key, value, visible, scaling=0.2)
    torch.testing.assert_close(output, expected.transpose(1, 2), atol=2e-6, rtol=1e-5)


def test_a_query_that_sees_nothing_harms_no_other() -> None:
    """Padding on the left."""
    query, key, value = torch.randn(3, 1, 2, 20, 16, generator=torch.Generator().manual_seed(0)).unbind()
    visible = torch.ones(20, 20, dtype=torch.bool).tril()[None, None].clone()
    visible[..., :5] = False
    output, _ = attend_in_chunks(Decoder(), query, key, value, visible)
    alone, _ = attend_in_chunks(Decoder(), query[:, :, 5:], key[:, :, 5:], value[:, :, 5:], None)
    assert output.isfinite().all()
    torch.testing.assert_close(output[:, 5:], alone, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_whole_models_are_as_with_torchs_attention(name: str) -> None:
    """In bfloat16, packed rows: no further from float32's hidden states than with torch's attention. Decoding with a
    cache, where there are fewer queries than keys, is torch's own."""
    torch.manual_seed(0)
    exact = enliven(AutoModelForCausalLM.from_config(CONFIGS[name], dtype=torch.float32)).eval()
    model = AutoModelForCausalLM.from_config(CONFIGS[name], dtype=torch.bfloat16).eval()
    model.load_state_dict(exact.state_dict())
    exact.load_state_dict({name: weight.float() for name, weight in model.state_dict().items()})
    ids = torch.randint(64, (2, 300), generator=torch.Generator().manual_seed(1))
    positions = torch.cat([torch.arange(130), torch.arange(170)]).expand(2, -1)

    @torch.no_grad()
    def states(of) -> torch.Tensor:
        return of(ids, position_ids=positions, use_cache=False, output_hidden_states=True).hidden_states[-1].float()

    @torch.no_grad()
    def continued() -> torch.Tensor:
        cache = DynamicCache(config=model.config)
        model(ids[:1, :30], past_key_values=cache)
        return model(ids[:1, 30:34], past_key_values=cache).logits

    truth, torchs, cached = states(exact), states(model), continued()
    suit_device(model)
    assert model.config._attn_implementation == NAME
    ours = states(model)
    assert not torch.equal(ours, torchs)  # or it was not used
    assert (ours - truth).norm() <= 1.05 * (torchs - truth).norm()
    torch.testing.assert_close(continued(), cached, atol=0.02, rtol=0.02)


@pytest.mark.parametrize(
    "config, dtype, attention",
    [
        (CONFIGS["qwen3"], torch.float32, None),
        (CONFIGS["qwen3"], torch.bfloat16, "eager"),
        (GptOssConfig(**SMALL, num_local_experts=2, num_experts_per_tok=1), torch.bfloat16, None),
    ],
    ids=["float32", "another was chosen", "gpt-oss, whose attention has sinks"],
)
def test_what_it_does_not_suit_keeps_its_own(config, dtype: torch.dtype, attention: str | None) -> None:
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    before = model.config._attn_implementation
    suit_device(model)
    assert model.config._attn_implementation == before != NAME
