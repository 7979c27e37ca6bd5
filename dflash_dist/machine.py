"""What this machine is good at, found by trying it, and what it is told."""

from __future__ import annotations

import ctypes
import functools
import math
import time

import torch

# Peaks of dense products in bfloat16 [TFLOP/s], from the vendors' data sheets, by what the GPU's name has in it; of
# several the first counts.
BFLOAT16_PEAKS = {
    "B200": 2250,
    "H200": 989,
    "H100 PCIe": 756,
    "H100": 989,
    "A100": 312,
    "L40S": 362,
    "MI300X": 1307,
}
# Times as long as in float32: CPUs with instructions for bfloat16 take less, and those without 3 to 5 times as long.
TOO_SLOW = 1.5


def matmul_flops_per_s(dtype: torch.dtype, device: torch.device, size: int | None = None, times: int = 20) -> float:
    """The best of several products of square matrices, on as many threads as torch uses now."""
    size = size or (8192 if device.type == "cuda" else 1024)
    a, b = torch.randn(2, size, size, device=device, dtype=torch.float32).to(dtype)
    best = math.inf
    for _ in range(times):
        begin = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best


@functools.cache
def peak_flops_per_s(dtype: torch.dtype, device: torch.device) -> float:
    """What the device could do at most: by its name, or as products of matrices show within a fraction of a second."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        if peaks := [peak for part, peak in BFLOAT16_PEAKS.items() if part in name]:
            return peaks[0] * 1e12
    return matmul_flops_per_s(dtype, device, size=None if device.type == "cuda" else 512, times=5)


def bfloat16_slowdown(device: torch.device) -> float:
    """How many times as long as in float32 a product takes in bfloat16: a tenth of a second tells."""
    of_float32, of_bfloat16 = (
        matmul_flops_per_s(dtype, device, size=512, times=5) for dtype in (torch.float32, torch.bfloat16)
    )
    return of_float32 / of_bfloat16


def say_slow_bfloat16(device: torch.device, faster: str) -> None:
    """Says it where this machine's CPU computes slowly in bfloat16, and what is `faster`."""
    if device.type == "cpu" and (slowdown := bfloat16_slowdown(device)) > TOO_SLOW:
        print(
            f"bfloat16 takes {slowdown:.1f} times as long as float32 on this CPU, which has no instructions for it:"
            f" {faster} is faster"
        )


def keep_freed_memory() -> None:
    """Has glibc keep the tensors' memory that a step frees for the next one, which would fault in every page anew.

    The most that a process holds stays what it was. Other C libraries are left as they are.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        trim_threshold, mmap_threshold = -1, -3  # names of parameters, from malloc.h; the values are bytes
        libc.mallopt(trim_threshold, 2**31 - 1)
        libc.mallopt(mmap_threshold, 32 * 2**20)  # the most that it takes; what is larger is given back at once
