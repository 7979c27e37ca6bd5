"""Training as a TorchX job, on this machine or on a scheduler:

torchx run -s local_cwd launch/components.py:train --config configs/debug.yaml -j 1x2 --gpu 0 -- train.max_steps=20
"""

# No `from __future__ import annotations`: TorchX reads the parameters' types, not their names.

from torchx import specs
from torchx.components import dist


def train(*overrides: str, config: str, j: str = "1x8", gpu: int = -1, image: str = "") -> specs.AppDef:
    """Trains a draft with torchrun on `nodes x processes`.

    Args:
        overrides: knobs of the config, such as train.lr=3e-4; after --
        config: YAML file of the run
        j: nodes x processes a node
        gpu: GPUs a node; by default one a process, 0 to train on CPU
        image: container image, for schedulers that run containers
    """
    processes = int(j.split("x")[-1])
    gpus = processes if gpu < 0 else gpu
    arguments = ("train", "--config", config, *overrides)
    # Cores and memory a process: enough to load a target's shard and to pack the data while the GPU computes.
    return dist.ddp(
        *arguments,
        m="dflash_dist",
        name="dflash",
        image=image,
        j=j,
        gpu=gpus,
        cpu=4 * processes,
        memMB=32_000 * processes,
    )
