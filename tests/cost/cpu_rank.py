"""One rank as a run on this machine's CPU would be, so that what is foretold of it can be measured."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dflash_dist.config import Config
from dflash_dist.cost import bench
from dflash_dist.cost.counter import StepCounter
from dflash_dist.cost.rank import Rank, one_rank
from dflash_dist.data.chat import Document
from dflash_dist.data.documents import Documents
from dflash_dist.data.packing import PackedRows
from dflash_dist.kernels.target_attention_cpu import suit_device


class HostNumbers(TorchDispatchMode):
    """What says where things are, and what is made of that alone, has its numbers: on a CPU they are read. Weights, and
    what is made of them, have none."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        real = not any(isinstance(tensor, FakeTensor) for tensor in tensors)
        if not tensors:
            of_places = func._overloadpacket in (torch.ops.aten.arange, torch.ops.aten.scalar_tensor)
            real = of_places or (kwargs or {}).get("dtype") in (torch.int64, torch.bool)
        with unset_fake_temporarily() if real else contextlib.nullcontext():
            return func(*args, **kwargs or {})


class CpuRank(Rank):
    def modes(self, counter: StepCounter) -> list[AbstractContextManager]:
        return [self.memory, HostNumbers(), counter]

    def rows(self, config: Config) -> PackedRows:
        return rows_of_two(config)


@contextlib.contextmanager
def one_cpu_rank(trial: bench.Trial) -> Iterator[CpuRank]:
    with one_rank(trial.config, trial.target, 1):
        rank = CpuRank(trial.config, trial.target, 1)
        suit_device(rank.target)
        yield rank


def rows_of_two(config: Config) -> PackedRows:
    """As training has them: the target needs a mask only where a row holds several documents."""
    length = config.data.seq_len
    tokens = np.random.default_rng(0).integers(1, 256, (64, length // 2), np.int32)
    documents = Documents.of([Document(ids, [(0, len(ids))]) for ids in tokens])
    return PackedRows(documents, np.arange(len(tokens)), length, bench.MASK_TOKEN)
