"""What the target gives for a micro-batch."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModel

from dflash_dist.batch import Batch
from dflash_dist.target.capture import HFDFlashTargetModel
from dflash_dist.target.run import LiveTarget

LENGTHS = [9, 12]  # of the single documents of two rows


@pytest.fixture(scope="module")
def decoder(tiny_target):
    return AutoModel.from_pretrained(tiny_target)


def batch_of(lengths: list[int], size: int = 12) -> Batch:
    """A row for each document, filled up with padding."""
    ids = torch.randint(4, 250, (len(lengths), size), generator=torch.Generator().manual_seed(0))
    index, ends = torch.arange(size)[None], torch.tensor(lengths)[:, None]
    documents = (index >= ends).long()
    return Batch.of_rows(ids, index < ends, documents, torch.where(index < ends, index, index - ends), filled=lengths)


@pytest.mark.parametrize("packs", [True, False])
def test_the_final_state_is_what_the_decoder_returns(decoder, packs) -> None:
    batch = batch_of(LENGTHS)
    output = LiveTarget(HFDFlashTargetModel(decoder, [1, 3]), packs).run(batch, final=True)
    for row, length in enumerate(LENGTHS):
        expected = decoder(batch.input_ids[row : row + 1, :length], output_hidden_states=True)
        states = torch.cat([expected.hidden_states[2], expected.hidden_states[4]], dim=-1)
        for ours, theirs in ((output.features, states), (output.final, expected.last_hidden_state)):
            torch.testing.assert_close(ours[row, :length], theirs[0], rtol=0, atol=2e-6)
            assert packs or not ours[row, length:].any()


def test_nobody_pays_for_a_final_state_that_is_not_asked_for(decoder) -> None:
    assert LiveTarget(HFDFlashTargetModel(decoder, [1])).run(batch_of(LENGTHS)).final is None


def test_a_model_without_final_states_is_refused() -> None:
    class Bare(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList([torch.nn.Embedding(250, 4)])

        def forward(self, input_ids):
            return {"logits": self.layers[0](input_ids)}

    with pytest.raises(ValueError, match="final_states needs a decoder without its LM head: Bare returned no last"):
        HFDFlashTargetModel(Bare(), [0]).generate_batch(torch.ones(1, 2).long(), None, None, final_states=True)
