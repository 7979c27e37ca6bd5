"""The ranks of a run: many under torchrun, one otherwise, and the same code for both."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among its peers.

    Collectives are no-ops in a world of one. Host numbers travel over gloo, device tensors over the device's backend,
    so that agreeing on a number never waits for a GPU.
    """

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This rank's contiguous slice; the length must divide by the world size."""
        assert len(items) % self.size == 0, f"{len(items)} items do not divide by {self.size} ranks"
        each = len(items) // self.size
        return items[self.rank * each : (self.rank + 1) * each]

    def sum_numbers(self, *numbers: float) -> list[float]:
        """Sums host numbers over the ranks, in float64."""
        total = torch.tensor(numbers, dtype=torch.float64)
        if self.size > 1:
            dist.all_reduce(total)
        return total.tolist()

    def agrees_on(self, number: float) -> bool:
        """Whether all ranks brought the same number; every rank gets the same answer."""
        bounds = torch.tensor([number, -number], dtype=torch.float64)
        if self.size > 1:
            dist.all_reduce(bounds, op=dist.ReduceOp.MAX)
        return bool(bounds[0] == -bounds[1])

    def sum_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sums a device tensor over the ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def barrier(self) -> None:
        if self.size > 1:
            dist.all_reduce(torch.zeros(1))  # over gloo: a NCCL barrier would occupy the GPU


@contextmanager
def join_world() -> Iterator[World]:
    """Joins the ranks that torchrun started, or makes a world of one; leaves cleanly."""
    if "RANK" not in os.environ:
        yield World(0, 1, _device(0))
        return
    device = _device(int(os.environ["LOCAL_RANK"]))
    if device.type == "cuda":
        torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl")
    else:
        dist.init_process_group("gloo")
    try:
        yield World(dist.get_rank(), dist.get_world_size(), device)
    finally:
        dist.destroy_process_group()


def _device(local_rank: int) -> torch.device:
    return torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
