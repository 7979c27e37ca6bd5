"""A draft that starts from the target's own top layers instead of random weights.

Tensors of the same name need not do the same: some families store the weights of their norms less 1, normalise behind a
block as well, scale what they add, or have another activation. So what counts is what a copy computes.
"""

from __future__ import annotations

import copy
from collections.abc import Container, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from dflash_dist.draft.base import Draft
from dflash_dist.draft.layers import DraftLayer, RMSNorm, rope_of
from dflash_dist.draft.shape import DraftShape
from dflash_dist.kernels.elementwise import Rope
from dflash_dist.target.capture import decoder_layers
from dflash_dist.target.layers import DecoderParts
from dflash_dist.target.load import TargetInfo, whole_class
from dflash_dist.target.rehearsal import skeleton

TOKENS = 24  # of the random text that layers are compared on; real sliding windows are wider
ROUNDING = 1e-4  # what float32 explains of a difference between what two layers add, as a share of that
RANDOM = "the draft begins with random weights, as with draft.init: random"
SIZES = ("num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size")
HEAD_NORMS = ("self_attn.q_norm.weight", "self_attn.k_norm.weight")


@torch.no_grad()
def warm_start(draft: Draft, info: TargetInfo) -> list[str]:
    """Copies the target's last layers into the draft's, and lets the context begin as the deepest captured layer.

    A layer is copied if the copy gives what the target's own gives on random input, its rotary scaling aside, which no
    draft has. Where the target does not normalise its heads, the two are compared without the draft's head norms, which
    begin at the size of the target's heads. The norms are compared likewise. `fc` passes the deepest captured layer
    through unchanged and `hidden_norm` is the norm that the target applies to it, so the first draft layer sees its
    context as the target's next layer would. If no layer can be copied, nothing is.

    Returns:
        What the draft begins as, a line a fact.

    Raises:
        ValueError: the draft has more layers than the target, or sizes that its config states and the target's differ.
    """
    shape = draft.shape
    first = shape.num_target_layers - shape.num_layers
    if first < 0:
        raise ValueError(f"draft.init: target needs at most {shape.num_target_layers} draft layers, the target's depth")
    with torch.random.fork_rng(devices=[]):
        try:
            target = DecoderParts(info)
        except ValueError as error:
            return [f"{RANDOM}; {error}"]
        if len(target.layers) != shape.num_target_layers:
            return [f"{RANDOM}; the target's decoder has {len(target.layers)} layers, its config says otherwise"]
        _refuse_other_sizes(draft, info.text, target, first)
        rope = rope_of(torch.arange(TOKENS)[None], shape.head_dim, shape.rope_theta)
        refused = dict[int, str]()
        for number, layer in enumerate(draft.layers):
            try:
                _copy_layer(layer, rope, target, first + number)
            except ValueError as error:
                refused[number] = f"of the target's layer {first + number}, {error}"
        copied = [number for number in range(shape.num_layers) if number not in refused]
        if not copied:
            return [f"{RANDOM}; {refused[0]}"]
        lines = [f"draft layers {_listed(copied)} begin as the target's layers {_listed([first + n for n in copied])}"]
        if refused:
            why = next(iter(refused.values()))
            lines.append(f"draft layers {_listed(list(refused))} begin with random weights; {why}")
        following = target.layers[shape.target_layer_ids[-1] + 1]
        for name, owner, theirs in (("hidden_norm", following, "input_layernorm"), ("norm", target.decoder, "norm")):
            try:
                norm = getattr(draft, name)
                norm.weight.copy_(_norm_weight(target.real(_child(owner, theirs)), norm))
            except ValueError as error:
                lines.append(f"the draft's {name} begins as ones; {error}")
    draft.fc.weight.zero_()
    draft.fc.weight[:, -shape.hidden_size :] = torch.eye(shape.hidden_size)
    return lines


def cannot_begin(shape: DraftShape, info: TargetInfo) -> str | None:
    """Why the target's last layer cannot become one of the draft's, as far as names and sizes tell, without weights."""
    model = skeleton(whole_class(info.config), info.config, info.trust_remote_code)
    theirs = dict(decoder_layers(model)[-1].named_parameters())
    with torch.device("meta"):
        layer = DraftLayer(shape)
    if lacking := _lacking(layer, theirs):
        return f"the target's layers have no {lacking[0]}"
    other = [name for name, ours in layer.named_parameters() if name in theirs and theirs[name].shape != ours.shape]
    return f"the target's {other[0]} is {list(theirs[other[0]].shape)}" if other else None


def _refuse_other_sizes(draft: Draft, text: Any, target: DecoderParts, first: int) -> None:
    """Raises a ValueError where layers that could be copied have other sizes, because the config states them."""
    ours = {name: getattr(draft.shape, name) for name in SIZES}
    stated = [f"draft.{name}" for name in SIZES if getattr(text, name, None) not in (None, ours[name])]
    for number, layer in enumerate(draft.layers, first):
        theirs = dict(target.layers[number].named_parameters())
        for name, parameter in layer.named_parameters():
            if stated and not _lacking(layer, theirs) and theirs.get(name, parameter).shape != parameter.shape:
                raise ValueError(
                    f"draft.init: target needs the target's shapes: layers.{number}.{name} is"
                    f" {list(theirs[name].shape)}, the draft's {list(parameter.shape)}; leave {', '.join(stated)}"
                    " unset, or set draft.init: random"
                )


def _lacking(layer: DraftLayer, theirs: Container[str]) -> list[str]:
    """The tensors that a copy needs, and a layer of the target with the parameters `theirs` has not."""
    copied = [name for name, _ in layer.named_parameters() if not name.startswith(layer.added)]
    return [name for name in copied if name not in theirs and name not in HEAD_NORMS]


def _copy_layer(layer: DraftLayer, rope: Rope, target: DecoderParts, number: int) -> None:
    """Copies a layer of the target. A ValueError if the copy would compute something else; `layer` is as it was."""
    theirs, ours = (dict(of.named_parameters()) for of in (target.layers[number], layer))
    if lacking := _lacking(layer, theirs):
        raise ValueError(f"which has no {lacking[0]}")
    has_head_norms = all(name in theirs for name in HEAD_NORMS)
    wanted = [name for name in ours if name in theirs and (has_head_norms or name not in HEAD_NORMS)]
    if other := [name for name in wanted if theirs[name].shape != ours[name].shape]:
        shapes = f"{list(theirs[other[0]].shape)}, not {list(ours[other[0]].shape)}"
        raise ValueError(f"whose {other[0]} is {shapes}")
    real, new = target.real(target.layers[number]), copy.deepcopy(layer)
    for name in wanted:
        source, module = (of.get_submodule(name.removesuffix(".weight")) for of in (real, new))
        weight = _norm_weight(source, module) if isinstance(module, RMSNorm) else real.get_parameter(name)
        new.get_parameter(name).copy_(weight)
    compared = copy.deepcopy(new)
    if not has_head_norms:
        compared.self_attn.q_norm = compared.self_attn.k_norm = nn.Identity()  # type: ignore[assignment]
        attention, norm = new.self_attn, new.input_layernorm.weight
        attention.q_norm.weight.copy_(_head_size(attention.q_proj.weight, norm))
        attention.k_norm.weight.copy_(_head_size(attention.k_proj.weight, norm))
    inputs, outputs = target.run(real, number, _random(1, TOKENS, layer.input_layernorm.weight.numel()))
    nothing = inputs.new_empty(1, 0, 0)
    off = float((compared(inputs, rope, (nothing, nothing), _causal) - outputs).norm() / (outputs - inputs).norm())
    if not off < ROUNDING:
        more = ", ".join(name for name in theirs if name not in ours)
        raise ValueError(f"a copy computes something else, off by {off:.2%}{f'; it has {more} besides' * bool(more)}")
    layer.load_state_dict(new.state_dict())


def _head_size(projection: torch.Tensor, input_norm: torch.Tensor) -> torch.Tensor:
    """How large a target without head norms (Llama) makes its heads on white normalised input: so attention begins at
    about the target's temperature."""
    return (projection * input_norm).pow(2).sum(dim=1).mean().sqrt()


def _norm_weight(theirs: nn.Module, ours: RMSNorm) -> torch.Tensor:
    """The weight with which `ours` computes what `theirs` does: its own, or that and 1. A ValueError if none does."""
    kind, weight = type(theirs).__name__, getattr(theirs, "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.shape != ours.weight.shape:
        raise ValueError(f"whose {kind} has no weight of {list(ours.weight.shape)}")
    states = 0.5 + _random(4, len(weight))  # with a mean, which a LayerNorm takes away
    expected = theirs(states)
    for candidate in (weight, 1 + weight):
        norm = copy.deepcopy(ours)
        norm.weight.copy_(candidate)
        if float((norm(states) - expected).norm() / expected.norm()) < ROUNDING:
            return candidate
    raise ValueError(f"whose {kind} is no RMSNorm")


def _child(module: nn.Module, name: str) -> nn.Module:
    child = getattr(module, name, None)
    if not isinstance(child, nn.Module):
        raise ValueError(f"the target's {type(module).__name__} has no {name}")
    return child


def _causal(query: torch.Tensor, _keys: Any, _values: Any, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The draft's attention as the target's: no context, and nothing that comes later."""
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


def _random(*size: int) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(0))


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
