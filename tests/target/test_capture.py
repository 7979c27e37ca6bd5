from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, GPT2Config, GPT2Model, Qwen3Model

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


def test_checking_layer_ids_gives_them_as_a_list(decoder) -> None:
    target = HFDFlashTargetModel(decoder, [1])
    assert target._validate_layer_ids((4, 0)) == [4, 0]
    with pytest.raises(ValueError, match="at least one"):
        target._validate_layer_ids(())


class Told(Strict):
    """A decoder that keeps what it was told beside the tokens."""

    def forward(self, input_ids, attention_mask=None, **kwargs):
        self.told = kwargs
        return super().forward(input_ids, attention_mask)


class NamesAll(Told):
    def forward(
        self,
        input_ids,
        attention_mask=None,
        use_cache=None,
        output_hidden_states=None,
        output_attentions=None,
        **kwargs,
    ):
        flags = {"cache": use_cache, "states": output_hidden_states, "attentions": output_attentions}
        return super().forward(input_ids, attention_mask, **flags, **kwargs)


class Own(Qwen3Model):
    """One of transformers' own that names no cache: it would read the flag in what it takes besides."""

    def forward(self, input_ids, attention_mask=None, **kwargs):
        self.told = kwargs
        output = super().forward(input_ids, attention_mask, **kwargs)
        self.cache = output.past_key_values
        return output


def test_flags_go_to_models_that_name_them_and_to_no_catch_all() -> None:
    for model, told in (
        (Told(), {}),
        (NamesAll(), {"cache": False, "states": False, "attentions": False}),
    ):
        HFDFlashTargetModel(model, [0]).generate_batch(tokens(), None, None)
        assert model.told == told


def test_transformers_own_models_never_build_a_cache(decoder) -> None:
    own = Own(decoder.config)
    HFDFlashTargetModel(own, [0]).generate_batch(tokens(), None, None)
    assert own.told == {"use_cache": False} and own.cache is None
    packed = HFDFlashTargetModel(own, [0]).generate_batch(tokens(1, 4), None, None, torch.tensor([[0, 1, 0, 1]]))
    assert own.cache is None and packed.hidden_states.shape == (1, 4, 64)


def test_logits_are_those_of_the_whole_vocabulary(tiny_target, decoder) -> None:
    whole, ids = AutoModelForCausalLM.from_pretrained(tiny_target).eval(), tokens()
    batch = HFDFlashTargetModel(whole, [1], capture_logits=True).generate_batch(ids, None, None)
    with torch.no_grad():
        assert batch.logits is not None and torch.equal(batch.logits, whole(input_ids=ids).logits)
    assert batch.logits.shape == (2, 12, 260)
    assert HFDFlashTargetModel(whole, [1]).generate_batch(ids, None, None).logits is None
    bare = Strict()
    logits = HFDFlashTargetModel(bare, [0], capture_logits=True).generate_batch(ids, None, None).logits
    assert torch.equal(logits, bare(ids, None))
    with pytest.raises(ValueError, match="capture_logits needs a model with an LM head: Qwen3Model returned no logits"):
        HFDFlashTargetModel(decoder, [1], capture_logits=True).generate_batch(ids, None, None)


@dataclass
class Output:
    hidden_states: torch.Tensor
    gates: torch.Tensor


class Returns(nn.Linear):
    """A layer that returns its hidden states in something."""

    def __init__(self, wrap):
        super().__init__(4, 4)
        self.wrap = wrap

    def forward(self, hidden):
        return self.wrap(super().forward(hidden))


class Wrapped(nn.Module):
    def __init__(self, wrap, unwrap):
        super().__init__()
        self.layers, self.unwrap = nn.ModuleList([Returns(wrap), Returns(wrap)]), unwrap

    def forward(self, input_ids, attention_mask=None):
        hidden = input_ids[..., None].float().expand(-1, -1, 4)
        for layer in self.layers:
            hidden = self.unwrap(layer(hidden))
        return hidden


@pytest.mark.parametrize(
    ("wrap", "unwrap"),
    [
        (lambda hidden: (hidden, None), lambda output: output[0]),
        (lambda hidden: [hidden, hidden + 1], lambda output: output[0]),
        (lambda hidden: Output(hidden, hidden + 1), lambda output: output.hidden_states),
        (lambda hidden: {"states": hidden, "gates": hidden + 1}, lambda output: output["states"]),
    ],
    ids=["tuple", "list", "dataclass", "mapping"],
)
def test_layers_may_return_more_than_their_hidden_states(wrap, unwrap) -> None:
    model, ids = Wrapped(wrap, unwrap), tokens()
    features = HFDFlashTargetModel(model, [1]).generate_batch(ids, torch.ones_like(ids), None).hidden_states
    assert torch.equal(features, model(ids))


def test_a_compiled_model_gives_the_features_of_the_model_within_it() -> None:
    told, ids = NamesAll(), tokens()
    compiled = torch.compile(told, backend="eager")
    ours = HFDFlashTargetModel(compiled, [0, 1]).generate_batch(ids, None, None).hidden_states
    assert told.told == {"cache": False, "states": False, "attentions": False}
    assert torch.equal(ours, HFDFlashTargetModel(told, [0, 1]).generate_batch(ids, None, None).hidden_states)


class Skips(Strict):
    def forward(self, input_ids, attention_mask):
        return self.layers["0"](input_ids[..., None].float().expand(-1, -1, 4))


class OnlyIds(Strict):
    def forward(self, input_ids):
        return super().forward(input_ids, None)


def test_features_that_cannot_be_had_are_refused() -> None:
    ids = tokens()
    with pytest.raises(ValueError, match=r"layers \[1\] gave no output"):
        HFDFlashTargetModel(Skips(), [0, 1]).generate_batch(ids, None, None)
    flat = Wrapped(lambda hidden: hidden.flatten(0, 1), lambda output: output.unflatten(0, (2, 12)))
    with pytest.raises(ValueError, match=r"the decoder layers of Wrapped give \[24, 4\] for \[2, 12\] tokens"):
        HFDFlashTargetModel(flat, [0]).generate_batch(ids, None, None)
    target = HFDFlashTargetModel(OnlyIds(), [0])
    assert target.generate_batch(ids, torch.ones_like(ids), None).hidden_states.shape == (2, 12, 4)
    with pytest.raises(ValueError, match="the forward of OnlyIds takes no attention_mask"):
        target.generate_batch(ids, torch.zeros_like(ids), None)
    with pytest.raises(ValueError, match="the forward of OnlyIds takes no position_ids"):
        target.generate_batch(ids, None, None, ids)


def test_layers_in_transformer_h_are_recognised() -> None:
    config = GPT2Config(n_layer=3, n_embd=8, n_head=2, vocab_size=300)
    holder = nn.Module()
    holder.transformer = GPT2Model(config)
    assert len(HFDFlashTargetModel(holder, [2])._get_transformer_layers()) == 3


@pytest.mark.parametrize(
    ("model", "ids", "message"),
    [
        (Strict(), [], "at least one"),
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
