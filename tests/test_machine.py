from __future__ import annotations

import pytest
import torch

from dflash_dist import demo, machine
from dflash_dist.machine import bfloat16_slowdown, matmul_flops_per_s, peak_flops_per_s
from dflash_dist.training.trainer import Trainer

CPU = torch.device("cpu")


def test_a_product_of_half_the_speed_is_twice_as_slow(monkeypatch) -> None:
    assert matmul_flops_per_s(torch.float32, CPU, size=64, times=2) > 0
    monkeypatch.setattr(machine, "matmul_flops_per_s", lambda dtype, *_, **__: 2e9 if dtype == torch.float32 else 1e9)
    assert bfloat16_slowdown(CPU) == 2


@pytest.mark.parametrize("slowdown", [0.2, 4.25])
def test_a_run_in_bfloat16_says_where_float32_is_faster(debug_config, alone, monkeypatch, capsys, slowdown) -> None:
    monkeypatch.setattr(machine, "bfloat16_slowdown", lambda device: slowdown)
    knobs = "target.dtype=float32 train.precision=float32"
    for told in (["train.precision=bfloat16"], ["target.dtype=bfloat16"], knobs.split()):
        # Ends where nothing has been loaded yet.
        with pytest.raises(ValueError, match="does not exist"):
            Trainer(debug_config(*told, "target.path=nowhere"), alone)
        said, slow = capsys.readouterr().out, slowdown > 1 and told != knobs.split()
        assert ("4.2 times as long as float32 on this CPU" in said) == (f"{knobs} is faster" in said) == slow


@pytest.mark.parametrize("slowdown", [0.2, 4.25])
def test_the_demo_trains_in_the_faster_dtype(monkeypatch, slowdown) -> None:
    monkeypatch.setattr(machine, "bfloat16_slowdown", lambda device: slowdown)
    knobs = ["target.dtype=float32", "train.precision=float32"]
    assert demo.fast_dtypes.__wrapped__() == (knobs if slowdown > 1 else [])


@pytest.mark.parametrize(
    ("name", "peak"),
    [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA A100-SXM4-80GB", 312e12)],
)
def test_the_peak_of_a_gpu_is_known_by_its_name(monkeypatch, name: str, peak: float) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    peak_flops_per_s.cache_clear()
    assert peak_flops_per_s(torch.bfloat16, torch.device("cuda", 0)) == peak
    monkeypatch.setattr(machine, "matmul_flops_per_s", lambda *_, **__: 7.0)
    assert peak_flops_per_s(torch.float32, torch.device("cuda", 0)) == 7.0, "another unit's, which is tried"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU of tomorrow")
    peak_flops_per_s.cache_clear()
    assert peak_flops_per_s(torch.bfloat16, torch.device("cuda", 0)) == 7.0
    peak_flops_per_s.cache_clear()
