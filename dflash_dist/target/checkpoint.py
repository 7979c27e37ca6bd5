"""A checkpoint's tensors under the names of the model's parameters, each read alone."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.utils import cached_file

from dflash_dist.reading import read_shards, reading
from dflash_dist.target.folder import AGAIN, INDEX, WEIGHTS, weight_files


class Checkpoint:
    """The safetensors files of a model.

    Which tensor is which parameter is decided as transformers decides it in loading: by the renamings of the model's
    class. The end of a name tells too little, since parts of a model share it: of a hybrid layer, `norm.weight`.

    Args:
        path: folder or hub id.
        revision: of a hub id.
        model: the transformers model whose parameters are asked for; its weights may be on the meta device.

    Raises:
        ValueError: there are no safetensors files.
    """

    def __init__(self, path: str, revision: str, model: Any):
        self.path, self.revision = path, revision
        self.files = _files_of_tensors(path, revision)
        self._tensors: dict[str, list[str]] = {}  # by parameter
        self._converted: set[str] = set()  # parameters that are made from several tensors, or from a part of one
        transforms = get_model_conversion_mapping(model)
        renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
        converters = [each for each in transforms if isinstance(each, WeightConverter)]
        prefix, parameters = model.base_model_prefix, model.state_dict()
        for tensor in self.files:
            name, conversion = rename_source_key(tensor, renamings, converters, prefix, parameters)
            if name not in parameters and tensor in parameters:
                name, conversion = tensor, None
            self._tensors.setdefault(name, []).append(tensor)
            if conversion is not None:
                self._converted.add(name)

    def read(self, parameter: str) -> torch.Tensor:
        """The tensor of a parameter, as it is stored; a ValueError if the checkpoint has none, or several, or not as
        floating-point numbers."""
        found = self._tensors.get(parameter, [])
        if parameter in self._converted or len(found) > 1:
            raise ValueError(f"the checkpoint of {self.path} makes {parameter} from {', '.join(found)}")
        if not found:
            raise ValueError(f"the checkpoint of {self.path} has no tensor {parameter}")
        with _reading(self.path, self.revision), safe_open(self.files[found[0]], "pt") as file:
            tensor = file.get_tensor(found[0])
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"the checkpoint of {self.path} has {found[0]} quantised, as {tensor.dtype}")
        return tensor


def _files_of_tensors(path: str, revision: str) -> dict[str, str]:
    """The file of every tensor."""

    def file(name: str) -> str | None:
        return cached_file(path, name, revision=revision, _raise_exceptions_for_missing_entries=False)

    with _reading(path, revision):
        if single := file(WEIGHTS):
            with safe_open(single, "pt") as opened:
                return dict.fromkeys(opened.keys(), single)
        if index := file(INDEX):
            shards = read_shards(Path(index), AGAIN)
            places = {shard: str(file(shard)) for shard in set(shards.values())}
            return {tensor: places[shard] for tensor, shard in shards.items()}
    raise ValueError(f"the checkpoint of {path} has no safetensors files")


def _reading(path: str, revision: str) -> contextlib.AbstractContextManager[None]:
    return reading(f"the checkpoint of {path}", AGAIN, lambda: weight_files(path, revision))
