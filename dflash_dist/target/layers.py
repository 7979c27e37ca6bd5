"""Single parts of a target with their weights, on the host, to see what they compute: a layer of a model of any size
runs alone."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from dflash_dist.target.capture import decoder_layers
from dflash_dist.target.checkpoint import Checkpoint
from dflash_dist.target.load import TargetInfo, whole_class
from dflash_dist.target.rehearsal import skeleton


class DecoderParts:
    """The target's decoder without weights, and its parts by name, each to be had with its own, in float32.

    Rotary embeddings are those of the base frequency alone, without scaling.

    Raises:
        ValueError: the model has no decoder layers in a known place, or no safetensors files.
    """

    def __init__(self, info: TargetInfo):
        config = copy.deepcopy(info.config)
        _unscale(getattr(config.get_text_config(), "rope_parameters", None) or {})
        self.model = skeleton(whole_class(config), config, info.trust_remote_code, dtype=torch.float32).eval()
        self.layers = decoder_layers(self.model)
        self.decoder, self.list_name = _owner(self.model, self.layers[0])
        self.checkpoint = Checkpoint(info.path, info.revision, self.model)
        self.names = {module: name for name, module in self.model.named_modules()}
        self._of_layers = {
            name: value
            for name, value in vars(self.decoder.config).items()
            if isinstance(value, list) and len(value) == len(self.layers)
        }
        inside = {module for layer in self.layers for module in layer.modules()}
        for module in self.decoder.modules():
            if module not in inside:
                self._compute_buffers(module)

    def real(self, part: nn.Module) -> nn.Module:
        """A copy of a part of the decoder with its weights; a ValueError if the checkpoint lacks one of them."""
        real = copy.deepcopy(part).to_empty(device="cpu")
        for module in real.modules():
            self._compute_buffers(module)
        for name, tensor in real.state_dict().items():
            tensor.copy_(self.checkpoint.read(f"{self.names[part]}.{name}"))
        return real

    def run(self, layer: nn.Module, number: int, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Input and output [1, T, H] of `layer`, the decoder's only one, with what the decoder gives to its layer
        `number`: masks and positions of one text [1, T, H]. A ValueError if it does not run alone."""
        seen: list[torch.Tensor] = []

        def keep(_module: nn.Module, args: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
            seen.extend(
                (args[0] if args else named["hidden_states"], output[0] if isinstance(output, tuple) else output)
            )
            raise _Done

        config = self.decoder.config
        vars(config).update({name: [value[number]] for name, value in self._of_layers.items()}, num_hidden_layers=1)
        setattr(self.decoder, self.list_name, nn.ModuleList([layer]))
        handle = layer.register_forward_hook(keep, with_kwargs=True)
        try:
            self.decoder(inputs_embeds=states, use_cache=False)
        except _Done:
            pass
        except Exception as error:  # of a library's code for any model, which expects a whole one
            raise ValueError(f"which does not run alone ({type(error).__name__}: {error})") from error
        finally:
            handle.remove()
        return seen[0], seen[1]

    def _compute_buffers(self, module: nn.Module) -> None:
        """Tables that no checkpoint holds, such as rotary frequencies."""
        names = module._non_persistent_buffers_set & {name for name, _ in module.named_buffers(recurse=False)}
        for name in names:
            setattr(module, name, torch.empty_like(getattr(module, name), device="cpu"))
        if names:
            self.model._init_weights(module)


class _Done(Exception):
    """The layer was run; nothing that would follow is needed."""


def _owner(model: nn.Module, layer: nn.Module) -> tuple[Any, str]:
    """The module that runs the decoder's layers, and under which name it has them."""
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.ModuleList) and len(child) and child[0] is layer:
                return module, name
    raise AssertionError("decoder_layers gives the children of some module")


def _unscale(rope: dict[str, Any]) -> None:
    """Leaves the base frequency of a config's rotary parameters, which some give for each kind of layer."""
    for value in rope.values():
        if isinstance(value, dict):
            _unscale(value)
    if "rope_type" in rope:
        rope["rope_type"] = "default"
