"""Real gloo ranks for tests: `run_ranks(fn, n, *args)` calls `fn(world, *args)` on `n` processes.

The processes live for the whole test session, and are forks of one that has the imports behind it, which take seconds.
They meet through a file, so no port is taken.
"""

from __future__ import annotations

import multiprocessing as mp
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dflash_dist.ranks import World

_pools: dict[int, Pool] = {}


def run_ranks(fn: Callable[..., Any], ranks: int, *args: Any) -> list[Any]:
    """Results by rank. `fn` is a module-level function; what it takes and returns is pickled."""
    if ranks not in _pools:
        _pools[ranks] = Pool(ranks)
    try:
        return _pools[ranks].call(fn, args)
    except BaseException:
        _pools.pop(ranks).close()  # a rank may be stuck in a collective
        raise


def close_pools() -> None:
    while _pools:
        _pools.popitem()[1].close()


class Pool:
    def __init__(self, ranks: int):
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(["dflash_dist.training.trainer", "tests.tiny"])
        self.folder = tempfile.TemporaryDirectory()
        rendezvous = str(Path(self.folder.name) / "rendezvous")
        self.pipes, self.processes = [], []
        for rank in range(ranks):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, ranks, rendezvous, theirs), daemon=True)
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)

    def call(self, fn: Callable[..., Any], args: tuple) -> list[Any]:
        for pipe in self.pipes:
            pipe.send((fn, args))
        outcomes = [pipe.recv() for pipe in self.pipes]
        failures = [text for failed, text in outcomes if failed]
        if failures:
            raise AssertionError("a rank failed:\n" + "\n".join(failures))
        return [value for _, value in outcomes]

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self.folder.cleanup()


def _serve(rank: int, size: int, rendezvous: str, pipe: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=size, timeout=timedelta(seconds=60)
    )
    world = World(rank, size, torch.device("cpu"))
    while True:
        fn, args = pipe.recv()
        try:
            pipe.send((False, fn(world, *args)))
        except BaseException:
            pipe.send((True, f"[rank {rank}] {traceback.format_exc()}"))
