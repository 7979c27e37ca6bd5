from __future__ import annotations

import platform
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


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told what to keep")
def test_memory_that_a_step_frees_is_not_faulted_in_again_by_the_next() -> None:
    program = """
import resource, torch
from dflash_dist.ranks import join_world

def step():
    tensors = [torch.ones(2**20) for _ in range(16)]  # 64 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

with join_world(0):
    faults = [step() for _ in range(5)]
    print(faults[4] - faults[3])
"""
    environment = {"PATH": "", "CUDA_VISIBLE_DEVICES": ""}
    faults = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert int(faults) < 100  # of the 16,384 pages
