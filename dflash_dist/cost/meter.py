"""Measuring steps: time, memory, the peak of matrix products, bytes handed to collectives."""

from __future__ import annotations

import gc
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

from dflash_dist.training.metrics import peak_memory_mib

WARM_UP = 2  # steps before any is timed: allocators, optimiser state, compilation


class Meter:
    """Times steps, and watches the memory that they take above that of the process at rest."""

    def __init__(self, step: Callable[[], None], device: torch.device):
        self.step, self.device = step, device
        gc.collect()
        self.resting_mib = resting_mib(self.device)
        for _ in range(WARM_UP):
            step()

    def times(self, steps: int) -> list[Time]:
        return [self.time(self.step) for _ in range(steps)]

    def time(self, work: Callable[[], Any]) -> Time:
        begin = self._now()
        work()
        end = self._now()
        return Time(end.seconds - begin.seconds, end.cpu_seconds - begin.cpu_seconds)

    def _now(self) -> Time:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return Time(time.perf_counter(), time.process_time())

    def report(self, times: list[Time]) -> dict[str, Any]:
        return {
            "seconds_per_step": statistics.median(t.seconds for t in times),
            "cpu_seconds_per_step": statistics.median(t.cpu_seconds for t in times),
            "resting_mib": self.resting_mib,
            # The system counts resident pages in two ways, which a small step can turn around.
            "peak_mib": max(peak_memory_mib(self.device), self.resting_mib),
        }


@dataclass(frozen=True)
class Time:
    seconds: float  # on the clock
    cpu_seconds: float  # of all threads of the process


def resting_mib(device: torch.device) -> float:
    """Memory in use now [MiB]; from here on `peak_memory_mib` tells the most."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far, see proc(5)
    return psutil.Process().memory_info().rss / 2**20


def collective_mib(step: Callable[[], Any]) -> float:
    """What one rank hands to collectives in a step [MiB], as torch's flight recorder has it."""
    if not dist.is_initialized():
        return 0.0
    last = max((entry["record_id"] for entry in recorded_collectives()), default=-1)
    step()
    new = [entry for entry in recorded_collectives() if entry["record_id"] > last]
    sizes = {"Float": 4, "Double": 8, "BFloat16": 2, "Half": 2, "Long": 8, "Int": 4, "Byte": 1}
    return (
        sum(
            sizes[dtype] * math.prod(shape)
            for entry in new
            for shape, dtype in zip(entry["input_sizes"], entry["input_dtypes"])
        )
        / 2**20
    )


def recorded_collectives() -> list[dict[str, Any]]:
    """Of this rank so far; none where a rank is alone."""
    return json.loads(torch._C._distributed_c10d._dump_fr_trace_json()).get("entries", [])  # type: ignore[attr-defined]
