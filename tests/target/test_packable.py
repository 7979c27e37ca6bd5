"""Which targets may see several documents in one row."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers import Qwen3NextConfig, Qwen3NextModel

from dflash_dist.data.chat import Document
from dflash_dist.data.documents import Documents
from dflash_dist.data.packing import PackedRows
from dflash_dist.target.capture import HFDFlashTargetModel
from dflash_dist.target.load import packs_exactly


@pytest.mark.parametrize("name", ["Qwen3", "Qwen2", "Llama", "Qwen3Moe", "GptOss", "Mistral", "Gemma3Text"])
def test_full_and_sliding_attention_pack(name):
    assert packs_exactly(getattr(transformers, f"{name}Config")())


@pytest.mark.parametrize(
    "name", ["Qwen3Next", "Mamba", "Mamba2", "FalconH1", "Jamba", "Bamba", "MiniMax", "Llama4Text"]
)
def test_layers_that_carry_a_state_or_count_from_the_rows_beginning_do_not(name):
    assert not packs_exactly(getattr(transformers, f"{name}Config")())


@pytest.mark.filterwarnings("ignore")
def test_linear_attention_leaks_between_packed_documents_and_not_in_padded_rows():
    config = Qwen3NextConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,  # three of them linear
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        linear_num_value_heads=2,
        linear_num_key_heads=2,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
        initializer_range=0.3,
    )
    torch.manual_seed(0)
    target = HFDFlashTargetModel(Qwen3NextModel(config), [1, 2])
    ids = torch.randint(4, 64, (2, 7), dtype=torch.int32).numpy()
    documents = Documents.of([Document(row, [(0, 7)]) for row in ids])
    alone = [target.generate_batch(torch.tensor(row)[None].long(), None, None).hidden_states[0] for row in ids]

    def features(pack: bool) -> list[torch.Tensor]:
        """Of both documents, in the order in which they lie."""
        rows = PackedRows(documents, torch.arange(2).numpy(), seq_len=16, pad_id=0, pack=pack)
        batch = rows.batch(range(len(rows)))
        hidden = target.generate_batch(
            batch.input_ids, batch.attention_mask, batch.loss_mask, batch.position_ids
        ).hidden_states
        return [hidden[0, :7], hidden[0, 7:14]] if pack else [hidden[0, :7], hidden[1, :7]]

    for ours, theirs in zip(features(pack=False), alone):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    assert (features(pack=True)[1] - alone[1]).abs().max() > 1e-2
