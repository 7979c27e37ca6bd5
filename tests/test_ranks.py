from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

from dflash_dist.ranks import World, join_world


def test_progress_is_expected_where_it_is_said(alone: World) -> None:
    assert not alone.activity.expects_progress
    with pytest.raises(KeyError), alone.expects_progress():
        with alone.expects_progress(False):
            assert not alone.activity.expects_progress
        assert alone.activity.expects_progress
        raise KeyError
    assert not alone.activity.expects_progress


def test_ticks_are_counted(alone: World) -> None:
    before = alone.activity.ticks
    alone.tick()
    assert alone.activity.ticks == before + 1


def test_numbers_are_summed_in_float64(alone: World) -> None:
    assert alone.sum_numbers(2**52 + 1, 0.1) == [2**52 + 1, 0.1]


def test_without_torchrun_the_world_has_one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with join_world(1.0) as world:
        assert (world.rank, world.size, world.is_main) == (0, 1, True)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="only glibc is told what to keep, and can say")
def test_memory_that_a_step_frees_is_kept_for_the_next() -> None:
    """Otherwise each step faults all of its pages in again. How many it does is chance: it depends on addresses."""
    program = """
import ctypes, torch
from dflash_dist.ranks import join_world

Heap = ctypes.c_size_t * 10  # of malloc.h: `arena` comes first, `hblkhd`, what was mapped on its own, is the fifth
class Returned(ctypes.Structure):
    _fields_ = [("sizes", Heap)]
mallinfo = ctypes.CDLL(None).mallinfo2
mallinfo.restype = Returned

def held():
    sizes = mallinfo().sizes
    return sizes[0] + sizes[4]

with join_world(0):
    tensors = [torch.ones(2**20) for _ in range(16)]  # 64 MiB
    full = held()
    del tensors
    print(held() - full)
"""
    environment = {"PATH": "", "CUDA_VISIBLE_DEVICES": ""}
    given_back = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert int(given_back) == 0
