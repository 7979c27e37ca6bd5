"""The ranks of a run: many under torchrun, one otherwise, and the same code for both."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date, timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

from dflash_dist.machine import keep_freed_memory
from dflash_dist.ranks.watchdog import Activity, Watchdog

T = TypeVar("T")

# How long torch itself waits. To join, not long: torchrun starts the ranks together, they differ by their imports. In a
# collective, a day: one node may tokenise for hours while another waits for it, and hangs are the watchdog's to find.
JOIN, WAIT = timedelta(minutes=10), timedelta(days=1)


@dataclass(frozen=True)
class World:
    """This process among its peers.

    Collectives are no-ops in a world of one. Host numbers travel over gloo, device tensors over the device's backend,
    so that agreeing on a number never waits for a GPU.
    """

    rank: int
    size: int
    device: torch.device
    activity: Activity = field(default_factory=Activity, compare=False)
    sharing: int = 1  # neighbouring ranks that work on the same rows, each on a part of the model

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def rows_size(self) -> int:
        """Among how many the rows are shared out: groups of ranks that work on the same ones."""
        return self.size // self.sharing

    def share(self, rows: Sequence[T]) -> Sequence[T]:
        """This rank's contiguous slice, which is that of its group; the length must divide by `rows_size`."""
        assert len(rows) % self.rows_size == 0, f"{len(rows)} rows do not divide by {self.rows_size}"
        each, group = len(rows) // self.rows_size, self.rank // self.sharing
        return rows[group * each : (group + 1) * each]

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

    def agree_on_day(self, day: str) -> str:
        """The day that rank 0 brought (YYYY-MM-DD): midnight may lie between ranks."""
        [number] = self.sum_numbers(date.fromisoformat(day).toordinal() if self.is_main else 0)
        return date.fromordinal(int(number)).isoformat()

    def sum_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sums a device tensor over the ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def barrier(self) -> None:
        if self.size > 1:
            dist.all_reduce(torch.zeros(1))  # over gloo: a NCCL barrier would occupy the GPU

    @contextmanager
    def expects_progress(self, expected: bool = True) -> Iterator[None]:
        """In here every rank should be getting on, and the watchdog ends a run that does not; or need not (False)."""
        before, self.activity.expects_progress = self.activity.expects_progress, expected
        try:
            yield
        finally:
            self.activity.expects_progress = before

    def tick(self) -> None:
        """Tells the watchdog that this rank gets on, also where it does many things without a collective."""
        self.activity.ticks += 1


@contextmanager
def join_world(hang_timeout: float, logs: Path | None = None) -> Iterator[World]:
    """Joins the ranks that torchrun started, or makes a world of one; leaves cleanly.

    Args:
        hang_timeout: after how long [s] the watchdog ends a run that hangs; 0: never.
        logs: folder for what it finds.
    """
    device = _device(int(os.environ.get("LOCAL_RANK", "0")))
    if device.type == "cpu":
        keep_freed_memory()
    if "RANK" not in os.environ:
        yield World(0, 1, device)
        return
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "1000")  # the flight recorder, in collectives; read when torch joins
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store, rank, size = next(dist.rendezvous("env://", timeout=JOIN))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        # torchrun keeps its store when it starts ranks again, with the addresses of those that are gone. Several nodes
        # count their starts differently; there TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 gives each start its own store.
        store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT')}", store)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=JOIN)
    try:
        dist.distributed_c10d._set_pg_timeout(WAIT)
        world = World(rank, size, device)
        with _watched(world, hang_timeout, logs):
            yield world
    finally:
        dist.destroy_process_group()


@contextmanager
def _watched(world: World, hang_timeout: float, logs: Path | None) -> Iterator[None]:
    if world.size == 1 or hang_timeout == 0:
        yield
        return
    # A name for this start, see above.
    [start] = world.sum_numbers(time.time() if world.is_main else 0.0)

    def connect() -> dist.Store:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=60))
        return dist.PrefixStore(f"watchdog/{start}", store)

    watchdog = Watchdog(connect, world.rank, world.size, world.activity, hang_timeout, logs)
    watchdog.announce()
    world.barrier()
    watchdog.start()
    try:
        yield
    finally:
        watchdog.stop()


def _device(local_rank: int) -> torch.device:
    return torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
