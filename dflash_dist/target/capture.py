"""The frozen target's layer features, captured by forward hooks.

Layer id `i` means the output of decoder layer `i`, which Hugging Face calls `hidden_states[i + 1]`. Hooks are used
because the last entry of `hidden_states` is normalised and because a truncated model gives the same hooks.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

# Causal language models, bare decoders, GPT-2-like ones, and the language part of multimodal wrappers.
LAYER_PLACES = (
    "model.layers",
    "layers",
    "transformer.h",
    "h",
    "model.language_model.layers",
    "language_model.layers",
    "language_model.model.layers",
)


@dataclass
class DFlashTargetBatch:
    """What the target gives to the draft for `B` rows of `S` tokens."""

    hidden_states: torch.Tensor  # [B, S, L * H], the captured layers in the caller's order
    input_ids: torch.Tensor  # [B, S]
    attention_mask: torch.Tensor | None  # [B, S]
    loss_mask: torch.Tensor | None  # [B, S]
    position_ids: torch.Tensor | None = None  # [B, S], where the rows are packed


class HFDFlashTargetModel:
    """A Hugging Face decoder that gives the features of some of its layers.

    Args:
        model: a Hugging Face decoder or causal language model, sharded or not; put into eval mode.
        target_layer_ids: ids of the decoder layers to capture, unique; the features keep this order.

    Raises:
        ValueError: no decoder layers are found in the model, or the ids are empty, repeated or out of bounds.
    """

    def __init__(self, model: Any, target_layer_ids: Sequence[int]):
        self.model = model.eval()
        self.target_layer_ids = list(target_layer_ids)
        self._validate_layer_ids()
        parameters = inspect.signature(model.forward).parameters
        takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        # A cache would leak across packed documents, and only the features are wanted, not the logits.
        flags = {"use_cache": False, "return_dict": True, "logits_to_keep": 1}
        self._flags = {name: value for name, value in flags.items() if name in parameters}
        if takes_any:
            self._flags["use_cache"] = False

    @torch.no_grad()
    def generate_batch(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        loss_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None = None,
    ) -> DFlashTargetBatch:
        """Runs the target and captures its features.

        Args:
            input_ids: [B, S].
            attention_mask: [B, S], 1 on real tokens; carried along but not applied where `position_ids` are given.
            loss_mask: [B, S], carried along.
            position_ids: [B, S] for packed rows. Positions that restart keep documents apart, and only do so without
                an attention mask and without a cache.
        """
        with capture_layers(self._get_transformer_layers(), self.target_layer_ids) as captured:
            if position_ids is None:
                self.model(input_ids=input_ids, attention_mask=attention_mask, **self._flags)
            else:
                self.model(input_ids=input_ids, attention_mask=None, position_ids=position_ids, **self._flags)
        features = torch.cat(captured(), dim=-1)
        return DFlashTargetBatch(features, input_ids, attention_mask, loss_mask, position_ids)

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def _get_transformer_layers(self) -> list[nn.Module]:
        return decoder_layers(self.model)

    def _validate_layer_ids(self) -> None:
        ids, count = self.target_layer_ids, len(self._get_transformer_layers())
        if not ids:
            raise ValueError("target_layer_ids is empty: name the decoder layers to capture")
        if len(set(ids)) != len(ids):
            raise ValueError(f"target_layer_ids {ids} repeats a layer")
        outside = [i for i in ids if not 0 <= i < count]
        if outside:
            raise ValueError(f"target_layer_ids {outside} are out of bounds: the model has layers 0 to {count - 1}")


def decoder_layers(model: Any) -> list[nn.Module]:
    """The decoder layers of a Hugging Face model, in order.

    Raises:
        ValueError: none of the known places holds them.
    """
    for place in LAYER_PLACES:
        found: object = model
        for name in place.split("."):
            found = getattr(found, name, None)
        if isinstance(found, nn.ModuleList):
            return list(found)
        if isinstance(found, nn.ModuleDict) and set(found) == {str(i) for i in range(len(found))}:
            return [found[str(i)] for i in range(len(found))]
    raise ValueError(
        f"no decoder layers found in {type(model).__name__}: looked for a ModuleList, or a ModuleDict keyed '0', '1',"
        f" and so on, at {', '.join(LAYER_PLACES)}"
    )


@contextmanager
def capture_layers(layers: Sequence[nn.Module], ids: Sequence[int]) -> Iterator[Callable[[], list[torch.Tensor]]]:
    """Hooks the layers `ids`; yields a function that gives the outputs [B, S, H] of the last forward, in that order.

    The hooks are removed on leaving, also when the forward raised.
    """
    outputs: dict[int, torch.Tensor] = {}

    def keep(layer_id: int):
        def hook(_module, _inputs, output) -> None:
            outputs[layer_id] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [layers[i].register_forward_hook(keep(i)) for i in ids]
    try:
        yield lambda: [outputs[i] for i in ids]
    finally:
        for handle in handles:
            handle.remove()
