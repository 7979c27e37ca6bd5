"""What this machine is good at, found by trying it."""

from __future__ import annotations

import math
import time

import torch

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


def bfloat16_slowdown(device: torch.device) -> float:
    """How many times as long as in float32 a product takes in bfloat16: a tenth of a second tells."""
    of_float32, of_bfloat16 = (
        matmul_flops_per_s(dtype, device, size=512, times=5) for dtype in (torch.float32, torch.bfloat16)
    )
    return of_float32 / of_bfloat16
