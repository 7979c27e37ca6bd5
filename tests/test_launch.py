"""What would be submitted, word by word, and what two agents do without any scheduler."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shlex
import signal
import socket
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from configparser import ConfigParser
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from torchx.runner import get_runner
from torchx.schedulers import get_scheduler_factories
from torchx.specs.finder import ModuleComponentsFinder, get_components

from tests.conftest import REPOSITORY
from tests.test_commands import ENVIRONMENT, PROGRAM, finish, losses, read_until

COMPONENTS = str(REPOSITORY / "launch/components.py")
SCHEDULERS = [
    "local_cwd",
    "slurm",
    pytest.param(
        "kubernetes",
        marks=pytest.mark.skipif(importlib.util.find_spec("kubernetes") is None, reason="pip install kubernetes"),
    ),
]
# What several agents need, and what a job without GPUs must not see.
NODES = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
TIMEOUTS = "PET_RDZV_CONF=join_timeout=900,read_timeout=900 "
HIDDEN = {"CUDA_VISIBLE_DEVICES": ""}
# How the second task learns where the first one runs.
FIRST_NODE = {
    "local_cwd": "TORCHX_RANK0_HOST",
    "slurm": "SLURM_JOB_NODELIST_HET_GROUP_0",
    "kubernetes": "VC_DFLASHDIST_0_HOSTS",
}
REGENERATE = ["--target", "t", "--prompts", "p.jsonl", "--out", "o.jsonl"]
EVALUATE = ["--target", "t", "--draft", "d", "--json", "r.json"]

# name -> (component, its arguments, tasks, GPUs, cores and MB of one, environment, command)
# In a command, {agents} stands for what torchrun is told about N nodes.
CASES: dict[str, tuple[str, list[str], int, tuple[int, int, int], dict[str, str], str]] = {
    "train": (
        "train",
        ["--config", "a.yaml", "--", "train.lr=3e-4", "data.path=it's here"],
        1,
        (8, 32, 256_000),
        {},
        "torchrun {agents} --nnodes 1 --nproc_per_node 8 --tee 3 --role '' "
        """-m dflash_dist train --config a.yaml train.lr=3e-4 'data.path=it'"'"'s here'""",
    ),
    "train on nodes": (
        "train",
        ["--config", "a.yaml", "-j", "2x4", "--retries", "3", "--env", "NCCL_IB_HCA=mlx5_0,mlx5_1,NCCL_DEBUG=INFO"],
        2,
        (4, 16, 128_000),
        NODES | {"NCCL_DEBUG": "INFO", "PET_MAX_RESTARTS": "3"},
        "NCCL_IB_HCA=mlx5_0,mlx5_1 " + TIMEOUTS + "torchrun {agents} --nnodes 2 --nproc_per_node 4 --tee 3 --role '' "
        "-m dflash_dist train --config a.yaml",
    ),
    "train on CPU": (
        "train",
        ["--config", "a.yaml", "-j", "1x2", "--gpu", "0", "--cpu", "2", "--mem", "0"],
        1,
        (0, 2, 0),
        HIDDEN,
        "torchrun {agents} --nnodes 1 --nproc_per_node 2 --tee 3 --role '' -m dflash_dist train --config a.yaml",
    ),
    "regenerate": (
        "regenerate",
        [*REGENERATE, "-j", "2x2", "--", "--temperature", "0.6"],
        2,
        (2, 8, 64_000),
        NODES,
        TIMEOUTS + "torchrun {agents} --nnodes 2 --nproc_per_node 2 --tee 3 --role '' "
        "-m dflash_dist regenerate --target t --prompts p.jsonl --out o.jsonl --temperature 0.6",
    ),
    "evaluate": (
        "evaluate",
        [*EVALUATE, "--", "--suite", "humaneval", "gsm8k"],
        1,
        (8, 32, 256_000),
        {},
        "torchrun {agents} --nnodes 1 --nproc_per_node 8 --tee 3 --role '' "
        "-m dflash_dist evaluate --target t --draft d --json r.json --suite humaneval gsm8k",
    ),
    "debug": (
        "debug",
        ["--", "train.max_steps=5"],
        1,
        (0, 2, 4_000),
        HIDDEN,
        "python -m dflash_dist train --config debug train.max_steps=5",
    ),
    "capture": (
        "capture",
        ["--config", "a.yaml", "--out", "features", "-j", "1x2", "--", "data.path=d.jsonl"],
        1,
        (2, 8, 64_000),
        {},
        "torchrun {agents} --nnodes 1 --nproc_per_node 2 --tee 3 --role '' "
        "-m dflash_dist capture --config a.yaml --out features data.path=d.jsonl",
    ),
    "export": (
        "export",
        ["--run", "runs/a", "--out", "drafts/a", "--", "--step", "best"],
        1,
        (0, 4, 32_000),
        HIDDEN,
        "python -m dflash_dist export --run runs/a --out drafts/a --step best",
    ),
}


@pytest.fixture(autouse=True)
def signals_stay() -> Iterator[None]:
    """TorchX's local scheduler takes over this process's signals, and does not give them back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def tasks_of(scheduler: str, request: Any) -> list[tuple[list[str], dict[str, str], dict[str, Any]]]:
    """Command, environment and resources of each task that the scheduler would get, read from its own request."""
    if scheduler == "local_cwd":
        return [(task.args, task.env, {}) for task in request.role_params["dflash_dist"]]
    if scheduler == "slurm":
        tasks = []
        for task in request.replicas.values():
            options, step = task.materialize()
            exports = next(word for word in step if word.startswith("--export="))
            environment = dict(pair.split("=", 1) for pair in exports.removeprefix("--export=ALL,").split(","))
            command = " ".join(step[step.index(exports) + 1 :]).replace('"$SLURM_JOB_ID"', "JOB")
            tasks.append((shlex.split(command), environment, dict(o[2:].partition("=")[::2] for o in options)))
        return tasks
    tasks = []
    for task in request.resource["spec"]["tasks"]:
        container = task["template"].spec.containers[0]
        environment = {variable.name: variable.value for variable in container.env}
        tasks.append((container.command, environment, container.resources.limits))
    return tasks


def resources(scheduler: str, gpus: int, cores: int, memory: int) -> dict[str, str]:
    if scheduler == "slurm":
        named = {"gpus-per-task": gpus, "cpus-per-task": cores, "mem": memory}
        return {name: str(number) for name, number in named.items() if number}
    return {
        name: number
        for name, number in {
            "nvidia.com/gpu": str(gpus),
            "cpu": f"{1000 * cores}m",
            "memory": f"{memory}M",
        }.items()
        if number not in ("0", "0M")
    }


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("name", CASES)
def test_what_is_submitted_is_what_is_meant(name: str, scheduler: str) -> None:
    component, arguments, count, (gpus, cores, memory), environment, command = CASES[name]
    options = {"queue": "default"} if scheduler == "kubernetes" else {}
    with get_runner() as runner:
        submitted = runner.dryrun_component(f"{COMPONENTS}:{component}", arguments, scheduler, options)
    assert submitted._app is not None
    role = submitted._app.roles[0]
    assert (role.resource.gpu, role.resource.cpu, role.resource.memMB) == (gpus, cores, memory)
    assert role.max_retries == (3 if "--retries" in arguments else 0)
    tasks = tasks_of(scheduler, submitted.request)
    assert len(tasks) == count
    for index, (words, variables, asked) in enumerate(tasks):
        if words[0] == "bash":
            assert words[:2] == ["bash", "-c"] and len(words) == 3
            found = words[2]
        else:
            found = shlex.join(words)
        # What a job is called differs from one to the next; all of its agents must have the same name for it.
        rendezvous = found.partition("--rdzv_id ")[2].split(" ")[0]
        first = FIRST_NODE[scheduler] if scheduler != "kubernetes" or index else "TORCHX_RANK0_HOST"
        endpoint = "localhost:0" if count == 1 else f"${{{first}:=localhost}}:29500"
        agents = f"--rdzv_backend c10d --rdzv_endpoint {endpoint} --rdzv_id {rendezvous}"
        assert found == command.replace("{agents}", agents)
        given = "TORCHX_", "TORCHELASTIC_", "PET_LOG_DIR", "LOGLEVEL", "PATH"
        assert {k: v for k, v in variables.items() if not k.startswith(given)} == environment
        if scheduler == "slurm":
            assert asked.pop("ntasks-per-node") == "1" and asked.pop("requeue") == ""
            assert asked.pop("job-name") == f"dflash_dist-{index}"
        if scheduler != "local_cwd":
            assert asked == resources(scheduler, gpus, cores, memory)


def test_once_installed_the_components_have_names_and_torchx_keeps_its_own() -> None:
    def names(module: str, group: str) -> set[str]:
        return {found.name for found in ModuleComponentsFinder(module, group).find() if not found.validation_errors}

    table = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    folders = table["tool"]["setuptools"]["package-dir"]
    try:
        distribution("dflash_dist")
        known = set(get_components())
    except PackageNotFoundError:  # what an installation would register
        known = set()
        for group, module in table["project"]["entry-points"]["torchx.components"].items():
            package, _, name = module.rpartition(".")
            known |= names(f"{folders.get(package, package)}.{name}", "" if group.startswith("_") else group)
    commands = ("train", "capture", "regenerate", "evaluate", "export", "debug")
    ours = {f"dflash.{name}" for name in commands}
    assert known == ours | names("torchx.components", "")


def test_every_package_is_installed() -> None:
    settings = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["setuptools"]
    packages = {path.parent.relative_to(REPOSITORY) for path in (REPOSITORY / "dflash_dist").rglob("__init__.py")}
    expected = {str(package).replace("/", ".") for package in packages} | settings["package-dir"].keys()
    assert sorted(expected) == settings["packages"]


def test_the_page_shows_what_torchx_submits_to_slurm() -> None:
    page = (REPOSITORY / "docs/launch.md").read_text()
    command = page.partition("torchx run -s slurm ")[2].partition("\n```")[0]
    words = shlex.split(command.replace("\\\n", ""))
    options = dict(pair.split("=", 1) for pair in words[words.index("-cfg") + 1].split(","))
    arguments = words[words.index("launch/components.py:train") + 1 :]
    with get_runner() as runner:
        submitted = runner.dryrun_component(f"{COMPONENTS}:train", arguments, "slurm", options)
    script = submitted.request.materialize().partition("#SBATCH")[2]
    assert script in page, "renew it with `torchx run -s slurm --dryrun`"


def test_the_defaults_name_options_that_the_schedulers_have() -> None:
    config = ConfigParser()
    config.read(REPOSITORY / ".torchxconfig")
    assert set(config.sections()) == {"local_cwd", "slurm", "kubernetes"}
    commented = {"slurm": {"partition", "time", "mail-user", "mail-type", "job_dir"}, "kubernetes": {"image_repo"}}
    for name in config.sections():
        if name == "kubernetes" and importlib.util.find_spec("kubernetes") is None:
            continue
        known = {option for option, _ in get_scheduler_factories()[name]("test").run_opts()}
        assert set(config[name]) | commented.get(name, set()) <= known


def test_torchx_runs_two_ranks_here(tmp_path: Path) -> None:
    torchx = Path(sys.executable).with_name("torchx")
    path = {"PATH": f"{torchx.parent}:{os.environ['PATH']}"}  # as in an activated environment
    job = ["launch/components.py:train", "--config", "configs/debug.yaml", "-j", "1x2", "--gpu", "0", "--"]
    knobs = [f"output_dir={tmp_path / 'run'}", "train.max_steps=2", "log.every=1", "validate.every=0"]
    command = [str(torchx), "run", "-s", "local_cwd", *job, *knobs]
    subprocess.run(command, env=ENVIRONMENT | path, cwd=REPOSITORY, check=True, stderr=subprocess.DEVNULL)
    assert [step for step, _ in losses(tmp_path / "run")] == [1, 2]


def kubernetes_job() -> tuple[dict, dict]:
    service, job = yaml.safe_load_all((REPOSITORY / "launch/kubernetes.yaml").read_text())
    return service, job


def test_the_manifest_agrees_with_itself() -> None:
    service, job = kubernetes_job()
    pod = job["spec"]["template"]["spec"]
    container = pod["containers"][0]
    (script,) = container["args"]
    name, pods = job["metadata"]["name"], job["spec"]["completions"]
    assert (service["kind"], job["kind"], job["spec"]["completionMode"]) == ("Service", "Job", "Indexed")
    assert service["spec"]["clusterIP"] == "None" and service["spec"]["selector"] == {"job-name": name}
    assert service["metadata"]["name"] == pod["subdomain"]
    assert job["spec"]["parallelism"] == pods and f"--nnodes={pods} " in script
    assert f"--nproc_per_node={container['resources']['limits']['nvidia.com/gpu']} " in script
    port = container["ports"][0]["containerPort"]
    assert f"--rdzv_endpoint={name}-0.{pod['subdomain']}:{port} " in script
    variables = {variable["name"]: variable["value"] for variable in container["env"]}
    assert variables["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
    assert (REPOSITORY / variables["CONFIG"]).is_file()
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


def kubeflow_job() -> dict:
    return yaml.safe_load((REPOSITORY / "launch/pytorchjob.yaml").read_text())


def test_kubeflows_manifest_asks_for_the_same() -> None:
    spec = kubeflow_job()["spec"]
    worker, policy = spec["pytorchReplicaSpecs"]["Worker"], spec["elasticPolicy"]
    assert worker["replicas"] == policy["minReplicas"] == policy["maxReplicas"]
    ours, pod = kubernetes_job()[1]["spec"], worker["template"]["spec"]
    other = ours["template"]["spec"]
    assert worker["replicas"] == ours["completions"]
    (container,), (wanted,) = pod["containers"], other["containers"]
    assert container["name"] == "pytorch" and container["ports"][0]["name"] == "pytorchjob-port"
    assert f"--nproc_per_node={container['resources']['limits']['nvidia.com/gpu']} " in container["args"][0]
    assert all(pod[name] == other[name] for name in ("terminationGracePeriodSeconds", "volumes"))
    assert all(container[name] == wanted[name] for name in ("image", "command", "env", "resources", "volumeMounts"))


@pytest.fixture
def fake(tmp_path: Path):
    """Puts programs of a cluster on the path, which note how they were called in `calls`."""
    (tmp_path / "bin").mkdir()

    def make(name: str, script: str) -> None:
        program = tmp_path / "bin" / name
        program.write_text(f'#!/bin/bash\necho "{name} $*" >> {tmp_path}/calls\n{script}\n')
        program.chmod(0o755)

    return make


def shell(tmp_path: Path, command: list[str], **variables: str) -> subprocess.Popen:
    environment = os.environ | {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}"} | variables
    return subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=subprocess.PIPE, text=True)


def test_what_slurm_reads_of_the_batch_script() -> None:
    lines = (REPOSITORY / "launch/slurm.sbatch").read_text().splitlines()
    options = dict(line.removeprefix("#SBATCH --").partition("=")[::2] for line in lines if line.startswith("#SBATCH"))
    assert options == {
        "job-name": "dflash",
        "ntasks-per-node": "1",  # an agent
        "cpus-per-task": "32",
        "output": "slurm-%j.out",
        "open-mode": "append",  # a job that comes back goes on in its file
        "requeue": "",
        "signal": "USR1@90",  # to the steps' processes; with B: to the batch script alone
    }


@pytest.mark.parametrize(("stopped", "failed"), [(False, 0), (True, 0), (True, 1), (False, 3)])
def test_a_slurm_job_comes_back_only_if_it_was_stopped(tmp_path: Path, fake, stopped: bool, failed: int) -> None:
    script = str(REPOSITORY / "launch/slurm.sbatch")
    subprocess.run(["bash", "-n", script], check=True)
    fake("scontrol", "[ $1 = requeue ] || printf 'first\\nsecond\\n'")
    fake("srun", 'shift 2; exec "$@"')
    fake("torchrun", f"{'mkdir run; touch run/PREEMPTED; ' if stopped else ''}exit {failed}")
    about = {"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "9", "SLURM_GPUS_ON_NODE": "4"}
    job = shell(tmp_path, ["bash", script, "a.yaml", "run", "train.lr=1", "data.path=it's here"], **about)
    assert job.wait() == failed
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls[2] == (
        "torchrun --nnodes 2 --nproc_per_node 4 --max_restarts 3 --rdzv_backend c10d --rdzv_id 9 "
        "--rdzv_endpoint first:20009 -m dflash_dist train --config a.yaml output_dir=run train.lr=1 data.path=it's here"
    )
    assert calls[3:] == (["scontrol requeue 9"] if stopped else [])


@pytest.mark.parametrize("manifest", ["kubernetes", "kubeflow"])
def test_a_pod_passes_the_signal_on_and_asks_to_be_made_again(tmp_path: Path, fake, manifest: str) -> None:
    kubeflow = kubeflow_job()["spec"]["pytorchReplicaSpecs"]["Worker"]
    template = kubeflow["template"] if manifest == "kubeflow" else kubernetes_job()[1]["spec"]["template"]
    container = template["spec"]["containers"][0]
    # Like torchrun: takes TERM, gives its processes a moment to save, ends with an error.
    fake("torchrun", "trap 'sleep 0.3; mkdir run; touch run/PREEMPTED; exit 1' TERM; echo ready; sleep 60 & wait")
    about = {"CONFIG": "a.yaml", "OUTPUT_DIR": "run", "JOB_COMPLETION_INDEX": "0", "HOSTNAME": "dflash-worker-0"}
    pod = shell(tmp_path, [*container["command"], *container["args"]], **about)
    read_until(pod, "ready")
    pod.send_signal(signal.SIGTERM)
    assert pod.wait(20) == 75
    assert "--rdzv_conf=is_host=1," in (tmp_path / "calls").read_text()
    rules = kubernetes_job()[1]["spec"]["podFailurePolicy"]["rules"]
    assert {"action": "Ignore", "onExitCodes": {"operator": "In", "values": [75]}} in rules


@pytest.mark.long
def test_two_nodes_of_a_slurm_job_save_on_its_signal_and_the_job_goes_on_where_they_were(tmp_path: Path, fake) -> None:
    """launch/slurm.sbatch itself, where srun starts what it is given twice, on this machine, as on two nodes."""
    fake("scontrol", "[ $1 = requeue ] || echo localhost")
    fake("srun", 'shift 2; "$@" & first=$!; "$@" & wait $! && wait $first')
    run, steps = tmp_path / "run", 24
    job = str(free_port() - 20_000)  # of which the script makes the port
    about = {"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": job, "SLURM_GPUS_ON_NODE": "1"}
    path = {"PATH": f"{tmp_path}/bin:{Path(sys.executable).parent}:{os.environ['PATH']}"}
    short = [f"train.max_steps={steps}", "log.every=1", "validate.every=0", "checkpoint.every=1000"]
    batch = subprocess.Popen(
        ["bash", "launch/slurm.sbatch", "configs/debug.yaml", str(run), *short],
        env=ENVIRONMENT | about | path,
        cwd=REPOSITORY,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    read_until(batch, "step 1/")  # of whichever node has rank 0
    [srun] = psutil.Process(batch.pid).children()
    for process in srun.children(recursive=True):  # as Slurm does it: every process of the step
        process.send_signal(signal.SIGUSR1)
    output, _ = batch.communicate()
    assert batch.returncode == 0, output
    assert (run / "PREEMPTED").exists() and 1 <= len(losses(run)) < steps
    assert (tmp_path / "calls").read_text().splitlines()[-1] == f"scontrol requeue {job}"
    training = ["train", "--config", "configs/debug.yaml", f"output_dir={run}", *short]
    assert "resuming from" in finish(PROGRAM, *training)  # on another number of ranks, even
    assert [step for step, _ in losses(run)] == list(range(1, steps + 1))
    assert not (run / "PREEMPTED").exists()


def free_port() -> int:
    """Of those that launch/slurm.sbatch makes of a job's number."""
    for port in range(20_000 + os.getpid() % 9_000, 30_000):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("localhost", port))
            return port
    raise AssertionError("no port is free")
