"""A draft that starts from the target's own top layers instead of random weights."""

from __future__ import annotations

import torch

from dflash_dist.draft.model import DFlashDraftModel
from dflash_dist.target.load import TargetInfo, read_tensor


@torch.no_grad()
def warm_start(draft: DFlashDraftModel, info: TargetInfo) -> None:
    """Copies the target's last layers into the draft's, and lets the context begin as the deepest captured layer.

    `fc` passes that layer's features through unchanged and `hidden_norm` is the norm that the target applies to them,
    so the first draft layer sees its context as the target's next layer would.

    Raises:
        ValueError: the draft's layers do not have the shapes of the target's, or the target's layers are not dense.
    """
    shape = draft.shape
    _copy(draft.norm.weight, info, "norm.weight")
    _copy(draft.hidden_norm.weight, info, f"layers.{shape.target_layer_ids[-1] + 1}.input_layernorm.weight")
    draft.fc.weight.zero_()
    draft.fc.weight[:, -shape.hidden_size :] = torch.eye(shape.hidden_size)
    first = shape.num_target_layers - shape.num_layers
    if first < 0:
        raise ValueError(f"draft.init: target needs at most {shape.num_target_layers} draft layers, the target's depth")
    for number, layer in enumerate(draft.layers):
        source = f"layers.{first + number}."
        for name, parameter in layer.named_parameters():
            if not name.endswith(("q_norm.weight", "k_norm.weight")):
                _copy(parameter, info, source + name)
        for which in ("q", "k"):
            norm, projection = getattr(layer.self_attn, f"{which}_norm"), getattr(layer.self_attn, f"{which}_proj")
            norm.weight.copy_(
                _head_norm(
                    info, f"{source}self_attn.{which}_norm.weight", projection.weight, layer.input_layernorm.weight
                )
            )


def _head_norm(info: TargetInfo, name: str, projection: torch.Tensor, input_norm: torch.Tensor) -> torch.Tensor:
    """The target's own head norm; where it has none (Llama), the size its heads have on white normalised input, so that
    attention begins at about the target's temperature."""
    try:
        return read_tensor(info, name)
    except ValueError:
        return (projection * input_norm).pow(2).sum(dim=1).mean().sqrt()


def _copy(parameter: torch.Tensor, info: TargetInfo, name: str) -> None:
    try:
        tensor = read_tensor(info, name)
    except ValueError as error:
        raise ValueError(f"draft.init: target needs a dense Llama- or Qwen-like target: {error}") from error
    if tensor.shape != parameter.shape:
        raise ValueError(
            f"draft.init: target needs the target's shapes: {name} is {list(tensor.shape)}, the draft's"
            f" {list(parameter.shape)}; leave draft.intermediate_size, heads and head_dim unset"
        )
    parameter.copy_(tensor)
