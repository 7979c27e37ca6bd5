"""The commands as TorchX jobs, on this machine or on a scheduler; docs/launch.md shows each:

torchx run -s local_cwd launch/components.py:train --config configs/qwen3-8b.yaml -j 1x8 -- train.max_steps=20
torchx run -s local_cwd dflash.train ...  # the same where dflash_dist is installed, from any folder
"""

# No `from __future__ import annotations`: TorchX reads the parameters' types, not their names. Nor does it know
# `X | None`, `dict[...]` and `list[...]`. What is no component has the latter, which keeps it out of `torchx builtins`.
# ruff: noqa: UP006, UP035, UP045

import shlex
from typing import Dict, List, Optional

from torchx import specs
from torchx.components import dist

IMAGE = "dflash_dist:latest"  # of launch/Dockerfile; local_cwd and slurm run what is installed and ignore it

# A process wants one core to feed its GPU and one to write checkpoints or to read features ahead; all of a node's
# tokenise the data before the first step.
CORES = 4
# Rank 0 holds a copy of the draft and of its optimiser state while it is written, 12 bytes a parameter, and every rank
# its share of the target's files while loading [GB].
MEMORY = 32


def train(
    *overrides: str,
    config: str,
    j: str = "1x8",
    gpu: int = -1,
    cpu: int = -1,
    mem: int = -1,
    image: str = IMAGE,
    env: Optional[Dict[str, str]] = None,
    mounts: Optional[List[str]] = None,
    retries: int = 0,
) -> specs.AppDef:
    """Trains a draft with torchrun on nodes x processes.

    Args:
        overrides: knobs of the config, such as train.lr=3e-4; after --
        config: YAML file of the run, or the name of a shipped one
        j: nodes x processes a node
        gpu: GPUs a node; by default one a process, 0 to train on CPU
        cpu: cores a node; by default 4 a process
        mem: memory a node [GB]; by default 32 a process, 0 asks for none, for Slurm clusters that refuse such requests
        image: container image, for schedulers that run containers
        env: environment of the processes (A=1,B=2)
        mounts: TorchX mounts, for schedulers that run containers (type=volume,src=claim,dst=/work/runs)
        retries: times that torchrun starts failed processes again, and that the scheduler starts a failed job again
    """
    arguments = ("train", "--config", config, *overrides)
    return _torchrun(*arguments, j=j, gpu=gpu, cpu=cpu, mem=mem, image=image, env=env, mounts=mounts, retries=retries)


def capture(
    *overrides: str,
    config: str,
    out: str,
    j: str = "1x8",
    gpu: int = -1,
    cpu: int = -1,
    mem: int = -1,
    image: str = IMAGE,
    env: Optional[Dict[str, str]] = None,
    mounts: Optional[List[str]] = None,
    retries: int = 0,
) -> specs.AppDef:
    """Stores the target's features with torchrun, so that training need not run it.

    Args:
        overrides: knobs of the config, such as data.path=answers.jsonl; after --
        config: YAML file of the run, or the name of a shipped one
        out: folder for the features, on a disk that all nodes share
        j: nodes x processes a node
        gpu: GPUs a node; by default one a process, 0 to run on CPU
        cpu: cores a node; by default 4 a process
        mem: memory a node [GB]; by default 32 a process, 0 asks for none, for Slurm clusters that refuse such requests
        image: container image, for schedulers that run containers
        env: environment of the processes (A=1,B=2)
        mounts: TorchX mounts, for schedulers that run containers (type=volume,src=claim,dst=/work/runs)
        retries: times that torchrun starts failed processes again, and that the scheduler starts a failed job again
    """
    arguments = ("capture", "--config", config, "--out", out, *overrides)
    return _torchrun(*arguments, j=j, gpu=gpu, cpu=cpu, mem=mem, image=image, env=env, mounts=mounts, retries=retries)


def regenerate(
    *options: str,
    target: str,
    prompts: str,
    out: str,
    j: str = "1x8",
    gpu: int = -1,
    cpu: int = -1,
    mem: int = -1,
    image: str = IMAGE,
    env: Optional[Dict[str, str]] = None,
    mounts: Optional[List[str]] = None,
    retries: int = 0,
) -> specs.AppDef:
    """Lets the target write the answers of a data set, every process with a whole copy of it.

    Args:
        options: further options of the command, such as --temperature 0.6; after --
        target: model folder or hub id
        prompts: conversations whose answers are written again
        out: JSONL to write, on a disk that all nodes share
        j: nodes x processes a node
        gpu: GPUs a node; by default one a process, 0 to generate on CPU
        cpu: cores a node; by default 4 a process
        mem: memory a node [GB]; by default 32 a process, 0 asks for none, for Slurm clusters that refuse such requests
        image: container image, for schedulers that run containers
        env: environment of the processes (A=1,B=2)
        mounts: TorchX mounts, for schedulers that run containers (type=volume,src=claim,dst=/work/runs)
        retries: times that torchrun starts failed processes again, and that the scheduler starts a failed job again
    """
    arguments = ("regenerate", "--target", target, "--prompts", prompts, "--out", out, *options)
    return _torchrun(*arguments, j=j, gpu=gpu, cpu=cpu, mem=mem, image=image, env=env, mounts=mounts, retries=retries)


def evaluate(
    *options: str,
    target: str,
    draft: str,
    json: str,
    j: str = "1x8",
    gpu: int = -1,
    cpu: int = -1,
    mem: int = -1,
    image: str = IMAGE,
    env: Optional[Dict[str, str]] = None,
    mounts: Optional[List[str]] = None,
    retries: int = 0,
) -> specs.AppDef:
    """Decodes speculatively and plainly with an exported draft, every process with whole copies of both models.

    Args:
        options: further options of the command, such as --suite humaneval mtbench gsm8k; after --
        target: model folder or hub id
        draft: draft folder or hub id
        json: report to write, on a disk that all nodes share
        j: nodes x processes a node
        gpu: GPUs a node; by default one a process, 0 to decode on CPU
        cpu: cores a node; by default 4 a process
        mem: memory a node [GB]; by default 32 a process, 0 asks for none, for Slurm clusters that refuse such requests
        image: container image, for schedulers that run containers
        env: environment of the processes (A=1,B=2)
        mounts: TorchX mounts, for schedulers that run containers (type=volume,src=claim,dst=/work/runs)
        retries: times that torchrun starts failed processes again, and that the scheduler starts a failed job again
    """
    arguments = ("evaluate", "--target", target, "--draft", draft, "--json", json, *options)
    return _torchrun(*arguments, j=j, gpu=gpu, cpu=cpu, mem=mem, image=image, env=env, mounts=mounts, retries=retries)


def debug(
    *overrides: str,
    config: str = "debug",
    cpu: int = 2,
    mem: int = 4,
    image: str = IMAGE,
    env: Optional[Dict[str, str]] = None,
) -> specs.AppDef:
    """Trains in one process, on CPU, without torchrun: whether a scheduler runs the program at all.

    Args:
        overrides: knobs of the config, such as train.max_steps=5; after --
        config: YAML file of the run, or the name of a shipped one
        cpu: cores
        mem: memory [GB]; 0 asks for none
        image: container image, for schedulers that run containers
        env: environment of the process (A=1,B=2)
    """
    return _alone("train", "--config", config, *overrides, cpu=cpu, mem=mem, image=image, env=env, mounts=None)


def export(
    *options: str,
    run: str,
    out: str,
    cpu: int = 4,
    mem: int = 32,
    image: str = IMAGE,
    env: Optional[Dict[str, str]] = None,
    mounts: Optional[List[str]] = None,
) -> specs.AppDef:
    """Writes a run's draft as serving engines load it: one process, no GPU.

    Args:
        options: further options of the command, such as --step best; after --
        run: folder of the run
        out: folder for the draft
        cpu: cores
        mem: memory [GB]; 0 asks for none
        image: container image, for schedulers that run containers
        env: environment of the process (A=1,B=2)
        mounts: TorchX mounts, for schedulers that run containers (type=volume,src=claim,dst=/work/runs)
    """
    arguments = ("export", "--run", run, "--out", out, *options)
    return _alone(*arguments, cpu=cpu, mem=mem, image=image, env=env, mounts=mounts)


def _alone(
    *arguments: str,
    cpu: int,
    mem: int,
    image: str,
    env: Optional[dict[str, str]],
    mounts: Optional[list[str]],
) -> specs.AppDef:
    """One process without torchrun and without a GPU."""
    role = specs.Role(
        name="dflash_dist",
        image=image,
        entrypoint="python",
        args=["-m", "dflash_dist", *arguments],
        env=_without_gpus(0) | (env or {}),
        resource=_resource(cpu, 0, mem),
        mounts=specs.parse_mounts(mounts) if mounts else [],
    )
    return specs.AppDef(name="dflash", roles=[role])


def _torchrun(
    *arguments: str,
    j: str,
    gpu: int,
    cpu: int,
    mem: int,
    image: str,
    env: Optional[dict[str, str]],
    mounts: Optional[list[str]],
    retries: int,
) -> specs.AppDef:
    """One agent a node. With several nodes they meet at the first one, over c10d on port 29500."""
    _, nodes, processes, _ = dist.parse_nnodes(j)
    gpus = processes if gpu < 0 else gpu
    settings = _without_gpus(gpus)
    if nodes > 1:
        # With the agents' store shared, agents that should start again after a lost process hung in some of the runs.
        settings["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        # A node may pull its image for minutes while the others wait for it: torchrun's own limits are 600 and 60 s.
        settings["PET_RDZV_CONF"] = "join_timeout=900,read_timeout=900"
    if retries:
        settings["PET_MAX_RESTARTS"] = str(retries)
    # Not here because torch does it by itself: a NCCL collective whose peer is gone is aborted
    # (TORCH_NCCL_ASYNC_ERROR_HANDLING). NCCL_SOCKET_IFNAME and the like depend on the cluster: --env.
    app = dist.ddp(
        *arguments,
        m="dflash_dist",
        name="dflash",
        image=image,
        j=j,
        max_retries=retries,
        mounts=mounts,
    )
    role = app.roles[0]
    role.resource = _resource(CORES * processes if cpu < 0 else cpu, gpus, MEMORY * processes if mem < 0 else mem)
    for name, value in (settings | (env or {})).items():
        if "," in value:  # srun --export, which TorchX uses on Slurm, would cut the value there: to the command instead
            role.args[1] = f"{name}={shlex.quote(value)} {role.args[1]}"
        else:
            role.env[name] = value
    return app


def _resource(cpu: int, gpu: int, mem: int) -> specs.Resource:
    # Not `specs.resource()`, nor the arguments of `dist.ddp`: these turn no memory into 1024 MB.
    return specs.Resource(cpu=cpu, gpu=gpu, memMB=1000 * mem)


def _without_gpus(gpus: int) -> dict[str, str]:
    """A job that asks for no GPU must not find one either: local_cwd would show it those of the machine."""
    return {} if gpus else {"CUDA_VISIBLE_DEVICES": ""}
