from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, GPT2Config, GPT2Model

from dflash_dist.target import DFlashTargetBatch, HFDFlashTargetModel


@pytest.fixture(scope="module")
def decoder(tiny_target):
    return AutoModel.from_pretrained(tiny_target)


def tokens(rows: int = 2, length: int = 12) -> torch.Tensor:
    return torch.randint(4, 250, (rows, length), generator=torch.Generator().manual_seed(0))


def test_a_layer_id_means_that_layers_output_in_the_callers_order(decoder) -> None:
    ids = tokens()
    mask = torch.ones_like(ids)
    batch = HFDFlashTargetModel(decoder, [4, 0, 2]).generate_batch(ids, mask, mask.bool())
    expected = decoder(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
    assert isinstance(batch, DFlashTargetBatch)
    assert torch.equal(batch.hidden_states, torch.cat([expected[5], expected[1], expected[3]], dim=-1))
    assert batch.input_ids is ids and batch.attention_mask is mask


def test_a_causal_language_model_gives_the_same_features(tiny_target, decoder) -> None:
    whole = AutoModelForCausalLM.from_pretrained(tiny_target)
    ids = tokens()
    ours = HFDFlashTargetModel(whole, [1, 3]).generate_batch(ids, torch.ones_like(ids), None)
    assert torch.equal(
        ours.hidden_states, HFDFlashTargetModel(decoder, [1, 3]).generate_batch(ids, None, None).hidden_states
    )


def test_the_last_layer_is_captured_before_the_final_norm(decoder) -> None:
    """`hidden_states[-1]` is normalised; a hook's output is not."""
    ids = tokens()
    captured = HFDFlashTargetModel(decoder, [5]).generate_batch(ids, None, None).hidden_states
    last = decoder(input_ids=ids, output_hidden_states=True).hidden_states[-1]
    assert not torch.allclose(captured, last)
    assert torch.allclose(decoder.norm(captured), last, atol=1e-6)


def test_packed_documents_do_not_see_each_other(decoder) -> None:
    target = HFDFlashTargetModel(decoder, [1, 4])
    ids = tokens(1, 12)
    positions = torch.tensor([[*range(5), *range(7)]])
    packed = target.generate_batch(ids, torch.ones_like(ids), None, position_ids=positions).hidden_states
    alone = [target.generate_batch(part, None, None).hidden_states for part in (ids[:, :5], ids[:, 5:])]
    assert (packed - torch.cat(alone, dim=1)).abs().max() < 1e-6 * packed.abs().max()
    # The mistake this guards against: positions restart, but an all-ones mask lets documents see each other.
    leaking = []
    handle = decoder.layers[4].register_forward_hook(lambda *args: leaking.append(args[2]))
    decoder(input_ids=ids, position_ids=positions, attention_mask=torch.ones_like(ids))
    handle.remove()
    assert (leaking[0] - packed[..., 64:]).abs().max() > 0.1


def test_the_target_is_in_eval_mode_and_without_gradient(decoder) -> None:
    decoder.train()
    batch = HFDFlashTargetModel(decoder, [1]).generate_batch(tokens(), None, None)
    assert not decoder.training and not batch.hidden_states.requires_grad


def test_hooks_are_removed_also_when_the_forward_raises(decoder) -> None:
    def hooks() -> list[int]:  # transformers may have installed some of its own
        return [len(layer._forward_hooks) for layer in decoder.layers]

    target, before = HFDFlashTargetModel(decoder, [1]), hooks()
    with pytest.raises(IndexError):
        target.generate_batch(torch.tensor([[10_000]]), None, None)
    target.generate_batch(tokens(), None, None)
    assert hooks() == before


class Strict(nn.Module):
    """A decoder whose forward takes no further flags, with its layers in a ModuleDict."""

    def __init__(self, keys: tuple[str, ...] = ("0", "1")):
        super().__init__()
        self.layers = nn.ModuleDict({key: nn.Linear(4, 4) for key in keys})

    def forward(self, input_ids, attention_mask):
        hidden = input_ids[..., None].float().expand(-1, -1, 4)
        for layer in self.layers.values():
            hidden = layer(hidden)
        return hidden


def test_flags_that_a_forward_does_not_take_are_not_passed_and_module_dicts_are_recognised() -> None:
    model = Strict()
    ids = tokens()
    features = HFDFlashTargetModel(model, [1, 0]).generate_batch(ids, None, None).hidden_states
    first = model.layers["0"](ids[..., None].float().expand(-1, -1, 4))
    assert torch.equal(features, torch.cat([model.layers["1"](first), first], dim=-1))


def test_layers_in_transformer_h_are_recognised() -> None:
    config = GPT2Config(n_layer=3, n_embd=8, n_head=2, vocab_size=300)
    holder = nn.Module()
    holder.transformer = GPT2Model(config)
    assert len(HFDFlashTargetModel(holder, [2])._get_transformer_layers()) == 3


@pytest.mark.parametrize(
    ("model", "ids", "message"),
    [
        (Strict(), [], "empty"),
        (Strict(), [0, 2], r"\[2\] are out of bounds: the model has layers 0 to 1"),
        (Strict(), [-1], "out of bounds"),
        (Strict(), [1, 1], "repeats"),
        (Strict(("a", "b")), [0], "no decoder layers found in Strict"),
        (nn.Linear(2, 2), [0], "no decoder layers found in Linear"),
    ],
)
def test_wrong_layers_are_refused(model: nn.Module, ids: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HFDFlashTargetModel(model, ids)
