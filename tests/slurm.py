"""The jobs of docs/launch.md on a real Slurm: one machine plays two nodes and keeps accounts while this runs.

`make slurm-test`, not part of `make test`: it installs what is missing of Debian's packages, so it wants root and a
machine that may have them, such as a container. Configuration, keys, state, logs and sockets stay in a scratch folder.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.conftest import REPOSITORY
from tests.test_commands import ENVIRONMENT, losses

PACKAGES = ["slurm-wlm", "slurmdbd", "munge", "mariadb-server"]
PROGRAMS = ["slurmctld", "slurmd", "srun", "slurmdbd", "sacct", "munged", "mariadbd", "mariadb-install-db"]
NODES = ["127.0.0.1", "127.0.0.2"]
PR_SET_CHILD_SUBREAPER = 36  # of <sys/prctl.h>
CONFIG = str(REPOSITORY / "configs/debug.yaml")

# Nodes are named by their addresses because torchrun looks up the name of the first one: nothing has to be added to
# /etc/hosts. A node has the cores of one task, or both tasks would land on the same. TorchX's jobs are heterogeneous,
# which only the backfill scheduler starts: by default it looks every 30 s. `cred_expire` is also how long a job waits
# that is queued again, by default 120 s.
SLURM_CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=10
StateSaveLocation={folder}
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=bf_interval=1
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={ports[1]}
AccountingStoragePass={folder}/munge.socket
NodeName={nodes[0]} NodeAddr={nodes[0]} NodeHostname={host} Port={ports[2]} CPUs=2
NodeName={nodes[1]} NodeAddr={nodes[1]} NodeHostname={host} Port={ports[3]} CPUs=2
PartitionName=all Nodes=ALL Default=YES
"""
SLURMDBD_CONF = """
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
DbdHost={host}
DbdAddr=127.0.0.1
DbdPort={ports[1]}
SlurmUser=root
StorageType=accounting_storage/mysql
StorageUser=root
PidFile={folder}/slurmdbd.pid
"""


def install() -> None:
    """All that the cluster needs; skips, and says why, where that cannot be."""
    if os.geteuid() != 0:
        pytest.skip("only root can install and run the daemons of Slurm")
    if all(map(shutil.which, PROGRAMS)):
        return
    if not shutil.which("apt-get"):
        pytest.skip(f"no apt-get to install {' '.join(PACKAGES)} with")
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    with no_services_started():
        subprocess.run(["apt-get", "update"], env=environment, capture_output=True)
        command = ["apt-get", "install", "--yes", "--no-install-recommends", *PACKAGES]
        installed = subprocess.run(command, env=environment, capture_output=True, text=True)
    if installed.returncode:
        pytest.skip(f"{' '.join(command)}: {installed.stderr.strip()}")


@contextlib.contextmanager
def no_services_started() -> Iterator[None]:
    """Debian's packages start their services as they are installed, unless this file says no."""
    policy = Path("/usr/sbin/policy-rc.d")
    if policy.exists():  # the machine's own, as containers have it
        yield
        return
    policy.write_text("#!/bin/sh\nexit 101\n")
    policy.chmod(0o755)
    try:
        yield
    finally:
        policy.unlink()


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def wait_for(what: str, holds: Callable[[], object], seconds: float = 240) -> None:
    """Asks again and again: a scheduler tells nobody when it is done."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"not within {seconds:.0f} s: {what}"
        time.sleep(0.2)


class Cluster:
    """Two nodes, their controller, and the accounting that TorchX asks for the state of a job."""

    def __init__(self, root: Path) -> None:
        self.root, self.folder = root, root / "jobs"
        self.folder.mkdir()
        self.environment = ENVIRONMENT | {
            "SLURM_CONF": str(root / "slurm.conf"),
            "MYSQL_UNIX_PORT": str(root / "database.socket"),
            "SRUN_CPUS_PER_TASK": "2",  # as docs/launch.md has it
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",  # as in an activated environment
        }

    def start(self) -> None:
        host = socket.gethostname().partition(".")[0]
        here = {"folder": self.root, "host": host, "nodes": NODES, "ports": free_ports(4)}
        self.write("slurm.conf", SLURM_CONF.format(**here).encode())
        self.write("slurmdbd.conf", SLURMDBD_CONF.format(**here).encode())
        self.write("munge.key", secrets.token_bytes(128))
        munge = [f"--{kind}-file={self.root}/munge.{kind}" for kind in ("key", "pid", "log", "seed")]
        self.daemon("munged", "--foreground", "--force", f"--socket={self.root}/munge.socket", *munge)
        database = ["--no-defaults", "--user=root", f"--datadir={self.root}/database"]
        self.run("mariadb-install-db", *database, "--skip-test-db")
        self.daemon("mariadbd", *database, f"--socket={self.root}/database.socket", "--skip-networking")
        self.wait_for("munge", "--no-input", f"--socket={self.root}/munge.socket")
        self.wait_for("mariadb-admin", "--no-defaults", f"--socket={self.root}/database.socket", "ping")
        self.daemon("slurmdbd", "-D")
        self.wait_for("sacctmgr", "--immediate", "add", "cluster", "test")
        self.daemon("slurmctld", "-D")
        for node in NODES:
            self.daemon("slurmd", "-D", "-N", node)
        self.wait_for("sinfo", "--noheader", "--states=idle", "--format=%D", output="^2$")

    def write(self, name: str, content: bytes) -> None:
        path = self.root / name
        path.touch(mode=0o600)  # the daemons refuse secrets that others may read
        path.write_bytes(content)

    def daemon(self, *command: str) -> None:
        """Started in a session of its own: Ctrl-C is for this program, which then stops the daemons."""
        with open(self.root / "daemons.log", "ab") as log:
            subprocess.Popen(command, env=self.environment, stdout=log, stderr=log, start_new_session=True)

    def stop(self) -> None:
        """Kills the daemons and whatever they have started; their state is thrown away anyhow."""
        while processes := psutil.Process().children(recursive=True):
            for process in processes:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(processes, timeout=1)  # a child of a killed one becomes ours, to be found again

    def run(self, *command: str, status: int = 0) -> str:
        """What a command prints that a user of the cluster gives, in the folder where the jobs run."""
        given = {"env": self.environment, "cwd": self.folder, "text": True, "timeout": 300}
        done = subprocess.run(command, capture_output=True, **given)
        assert done.returncode == status, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def wait_for(self, *command: str, output: str = "") -> None:
        """Waits until the command succeeds and prints what matches."""

        def holds() -> bool:
            done = subprocess.run(command, env=self.environment, capture_output=True, text=True)
            return done.returncode == 0 and re.search(output, done.stdout) is not None

        wait_for(" ".join(command), holds)

    def account(self, job: str, field: str) -> str:
        """What the accounting has about a job, one line for each of its parts."""
        return self.run("sacct", "--noheader", "--allocations", f"--jobs={job}", f"--format={field}%30")

    def train(self, run: Path, steps: int, *scheduler: str, status: int = 0) -> str:
        """Trains 2 x 2 ranks through TorchX and waits for the end; returns TorchX's name of the job."""
        component = [f"{REPOSITORY}/launch/components.py:train", "--config", CONFIG, "-j", "2x2"]
        asked = ["--gpu", "0", "--cpu", "2", "--mem", "0", "--env", "LOGLEVEL=INFO"]
        command = ["torchx", "run", "-s", "slurm", *scheduler, "--workspace=", "--wait", *component, *asked]
        return self.run(*command, "--", f"output_dir={run}", *knobs(steps), status=status).strip()


def knobs(steps: int) -> list[str]:
    every_step = ["train.micro_batch_size=1", "log.every=1", "validate.every=0", "checkpoint.every=1000000"]
    return [f"train.max_steps={steps}", *every_step]


def logged(run: Path) -> list[int]:
    return [step for step, _ in losses(run)] if (run / "metrics.jsonl").exists() else []


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    begun = time.monotonic()
    install()
    print(f"\ninstalled in {time.monotonic() - begun:.0f} s")
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)  # jobs, whose parents end early, become children of this process
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # TERM stops the daemons too, as Ctrl-C does
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        signal.signal(signal.SIGTERM, before)
        print(f"\n{time.monotonic() - begun:.0f} s in all; logs in {cluster.root}")


def test_torchx_trains_over_two_nodes(cluster: Cluster) -> None:
    run = cluster.folder / "two-nodes"
    job = cluster.train(run, 6)
    assert "State: SUCCEEDED" in cluster.run("torchx", "status", job)
    assert logged(run) == list(range(1, 7))
    log = cluster.run("torchx", "log", job)
    assert re.search(r"^dflash_dist/\d \[0\]:step 6/6 ", log, re.MULTILINE)
    # The agents' own account of whom they started, a node each.
    assert set(re.findall(r"global_ranks=\[(.*)\]", log)) == {"0, 1", "2, 3"}
    assert set(cluster.account(job.rpartition("/")[2], "NodeList").split()) == set(NODES)


def test_the_batch_script_saves_and_comes_back(cluster: Cluster) -> None:
    run, steps = cluster.folder / "preempted", 60
    script = [f"{REPOSITORY}/launch/slurm.sbatch", CONFIG, str(run), *knobs(steps)]
    job = cluster.run("sbatch", "--parsable", "--nodes=2", "--cpus-per-task=2", *script).strip()
    log = cluster.folder / f"slurm-{job}.out"
    wait_for("the first step", lambda: logged(run))
    cluster.run("scancel", "--signal=USR1", job)  # as `#SBATCH --signal` has it sent: to every process of the step
    wait_for("the run is saved", lambda: "stopped after step" in log.read_text())
    assert (run / "PREEMPTED").exists() and len(logged(run)) < steps
    wait_for("the job ends", lambda: "COMPLETED" in cluster.account(job, "State"))
    assert f"resuming from {run}/checkpoints/step-" in log.read_text()
    assert logged(run) == list(range(1, steps + 1))
    assert not (run / "PREEMPTED").exists()


def test_torchx_saves_at_the_time_limit(cluster: Cluster) -> None:
    run = cluster.folder / "limited"
    job = cluster.train(run, 1_000_000, "-cfg", "time=1", status=1)
    assert "Msg: TIMEOUT" in cluster.run("torchx", "status", job)
    wait_for("the run is saved", (run / "PREEMPTED").exists)  # the job is over for Slurm before its processes are
    (checkpoint,) = (run / "checkpoints").iterdir()
    assert checkpoint.name == f"step-{logged(run)[-1]:08}"
