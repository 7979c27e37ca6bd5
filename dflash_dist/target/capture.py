"""The frozen target's layer features, captured by forward hooks.

Layer id `i` means the output of decoder layer `i`, which Hugging Face calls `hidden_states[i + 1]`. Hooks are used
because the last entry of `hidden_states` is normalised and because a truncated model gives the same hooks.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

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
    logits: torch.Tensor | None = None  # [B, S, V], where asked for
    final_states: torch.Tensor | None = None  # [B, S, H], what an LM head reads, where asked for


class HFDFlashTargetModel:
    """A decoder that gives the features of some of its layers: of transformers, or any that calls its layers.

    Args:
        model: a decoder or causal language model, also sharded or compiled; put into eval mode.
        target_layer_ids: ids of the decoder layers to capture, unique; the features keep this order.
        capture_logits: keep the logits of the whole vocabulary too, of a model that gives any.

    Raises:
        ValueError: as `decoder_layers` and `_validate_layer_ids`.
    """

    def __init__(self, model: Any, target_layer_ids: Sequence[int], capture_logits: bool = False):
        self.model, self.capture_logits = model.eval(), capture_logits
        self.target_layer_ids = self._validate_layer_ids(target_layer_ids)
        self._arguments = inspect.signature(_unwrapped(model).forward).parameters
        # Only the features are wanted, and a cache would leak across packed documents.
        flags: dict[str, Any] = {
            "use_cache": False,
            "output_hidden_states": False,
            "output_attentions": False,
            "return_dict": True,
        }
        if not capture_logits:
            flags["logits_to_keep"] = 1
        self._flags = {name: value for name, value in flags.items() if name in self._arguments}
        # Others may hand what they do not name to a kernel that knows none of it; transformers' own read a cache there.
        if isinstance(_unwrapped(model), PreTrainedModel) and self._takes("use_cache"):
            self._flags["use_cache"] = False

    @torch.no_grad()
    def generate_batch(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        loss_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None = None,
        final_states: bool = False,
    ) -> DFlashTargetBatch:
        """Runs the target and captures its features.

        Args:
            input_ids: [B, S].
            attention_mask: [B, S], 1 on real tokens; carried along but not applied where `position_ids` are given.
            loss_mask: [B, S], carried along.
            position_ids: [B, S] for packed rows. Positions that restart keep documents apart, and only do so without
                an attention mask and without a cache, and not in every model: see `probe`.
            final_states: give the states behind the last norm, too, of a decoder that has all of its layers.

        Raises:
            ValueError: the model does not take what it is given, or does not give what is asked for.
        """
        inputs = {"attention_mask": attention_mask if position_ids is None else None, "position_ids": position_ids}
        for name in [name for name in inputs if not self._takes(name)]:
            given = inputs.pop(name)
            if given is not None and not (name == "attention_mask" and given.all()):
                raise ValueError(f"the forward of {type(self.model).__name__} takes no {name}")
        if position_ids is None:
            inputs.pop("position_ids", None)
        with capture_layers(self._get_transformer_layers(), self.target_layer_ids) as captured:
            output = self.model(input_ids=input_ids, **inputs, **self._flags)
        features = captured()
        wrong = [list(states.shape) for states in features if states.shape[:-1] != input_ids.shape]
        if wrong:
            raise ValueError(
                f"the decoder layers of {type(self.model).__name__} give {wrong[0]} for {list(input_ids.shape)} tokens,"
                " not one vector a token"
            )
        batch = DFlashTargetBatch(torch.cat(features, dim=-1), input_ids, attention_mask, loss_mask, position_ids)
        if self.capture_logits:
            batch.logits = self._given(output, "logits", "capture_logits needs a model with an LM head")
        if final_states:
            needs = "final_states needs a decoder without its LM head"
            batch.final_states = self._given(output, "last_hidden_state", needs)
        return batch

    def takes_positions(self) -> bool:
        """Whether the model takes `position_ids` at all; what it makes of them is another question."""
        return self._takes("position_ids")

    def get_input_embeddings(self) -> nn.Module:
        return _unwrapped(self.model).get_input_embeddings()

    def _get_transformer_layers(self) -> list[nn.Module]:
        return decoder_layers(_unwrapped(self.model))

    def _validate_layer_ids(self, target_layer_ids: Sequence[int]) -> list[int]:
        """The ids as a list; a ValueError if they are empty, repeated or out of bounds."""
        ids, count = list(target_layer_ids), len(self._get_transformer_layers())
        if not ids:
            raise ValueError("target_layer_ids is empty: name at least one decoder layer to capture")
        if len(set(ids)) != len(ids):
            raise ValueError(f"target_layer_ids {ids} repeats a layer")
        outside = [i for i in ids if not 0 <= i < count]
        if outside:
            raise ValueError(f"target_layer_ids {outside} are out of bounds: the model has layers 0 to {count - 1}")
        return ids

    def _takes(self, argument: str) -> bool:
        """Whether the model's forward names an argument, or takes any."""
        return argument in self._arguments or any(p.kind is p.VAR_KEYWORD for p in self._arguments.values())

    def _given(self, output: Any, name: str, demand: str) -> torch.Tensor:
        """What the model's output holds by this name; a tensor is all that such a model gives."""
        value = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
        value = output if isinstance(output, torch.Tensor) else value
        if value is None:
            raise ValueError(f"{demand}: {type(self.model).__name__} returned no {name}")
        return value


def _unwrapped(model: Any) -> Any:
    """The model itself, in what `torch.compile`, FSDP or DDP wrapped around it."""
    while True:
        children = getattr(model, "_modules", {})
        inner = children.get("_orig_mod") or children.get("_fsdp_wrapped_module")
        if inner is None and isinstance(model, DistributedDataParallel):
            inner = model.module
        if inner is None:
            return model
        model = inner


def decoder_layers(model: Any) -> list[nn.Module]:
    """The decoder layers of a Hugging Face model, in order; a ValueError if none of the known places holds them."""
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
            outputs[layer_id] = _hidden_states(output)

        return hook

    def captured() -> list[torch.Tensor]:
        if silent := [i for i in ids if i not in outputs]:
            raise ValueError(f"layers {silent} gave no output in the model's forward, so nothing can be captured there")
        return [outputs[i] for i in ids]

    handles = [layers[i].register_forward_hook(keep(i)) for i in ids]
    try:
        yield captured
    finally:
        for handle in handles:
            handle.remove()


def _hidden_states(output: Any) -> torch.Tensor:
    """A layer's hidden states: what it returns, or the first of several things."""
    if isinstance(output, torch.Tensor):
        return output
    if hasattr(output, "hidden_states"):
        return _hidden_states(output.hidden_states)
    if isinstance(output, Mapping):
        return _hidden_states(next(iter(output.values())))
    if dataclasses.is_dataclass(output):
        return _hidden_states(getattr(output, dataclasses.fields(output)[0].name))
    return _hidden_states(output[0])
