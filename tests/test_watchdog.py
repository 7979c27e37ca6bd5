"""Hangs are found: who is named, and real ranks that stop, get stuck, or lose the job's store."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from dflash_dist.config import TrainConfig
from dflash_dist.logs import LOGS
from dflash_dist.ranks import watchdog as module
from dflash_dist.ranks.watchdog import Activity, State, Watchdog
from tests.conftest import REPOSITORY
from tests.test_commands import ENVIRONMENT, TORCHRUN, debug, read_until, start

# ------------------------------------------------------------------------------------------------ who is named


class Ranks:
    """Three ranks as rank 0 sees them, one beat a call."""

    def __init__(self, expects_progress: bool = True):
        self.watchdog = Watchdog(lambda: None, 0, 3, Activity(), timeout=10.0, folder=None)  # type: ignore[arg-type]
        self.states = [
            State(0, f"rank {rank}", 7, 0, expects_progress, left=False, where=f"here.py:{rank} work")
            for rank in range(3)
        ]

    def after(self, seconds: float, *changes: dict[str, Any]) -> str | None:
        """The verdict `seconds` later, with a beat of every rank where `changes` do not say otherwise."""
        changes = changes or ({}, {}, {})
        self.states = [
            State(**{**vars(state), "beat": state.beat + 1, **change}) for state, change in zip(self.states, changes)
        ]
        return self.watchdog.judge(self.states, seconds)


def test_a_silent_rank_is_named_wherever_the_run_is() -> None:
    ranks = Ranks(expects_progress=False)
    assert ranks.after(99) is None
    assert ranks.after(9, {}, {"beat": 1}, {}) is None
    verdict = ranks.after(1, {}, {"beat": 1}, {})
    assert verdict is not None
    assert verdict.startswith("rank 1 has stopped: no sign of life for 10 s.")
    assert "here.py:1 work" in verdict and "rank 0 has" not in verdict and "rank 2" not in verdict


def test_a_rank_that_left_is_not_missed() -> None:
    ranks = Ranks(expects_progress=False)
    ranks.after(1, {}, {"left": True}, {})
    assert all(ranks.after(9, {}, {"beat": 1}, {}) is None for _ in range(9))


def test_ranks_may_wait_for_hours_where_nobody_expects_progress() -> None:
    ranks = Ranks(expects_progress=False)
    assert all(ranks.after(9) is None for _ in range(9))
    ranks = Ranks()  # one of them writes a checkpoint
    assert all(ranks.after(9, {"expects_progress": False}, {}, {}) is None for _ in range(9))


def test_any_rank_that_gets_on_is_progress_of_all() -> None:
    ranks = Ranks()
    assert all(ranks.after(9, {}, {"ticks": number}, {}) is None for number in range(9))  # a long validation
    assert all(ranks.after(9, {"collectives": number}, {}, {}) is None for number in range(9))


def test_the_rank_that_the_others_wait_for_is_named() -> None:
    ranks = Ranks()
    ranks.after(1, {"collectives": 8}, {"collectives": 8}, {})
    ranks.after(9)
    verdict = ranks.after(1)
    assert verdict is not None
    assert verdict.startswith(
        "rank 2 takes no part any more: for 10 s it has been at here.py:2 work, with 7 collectives"
    )
    assert "others have begun 8" in verdict and "rank 1" not in verdict


def test_the_waiting_rank_speaks_before_the_stuck_one_does() -> None:
    ranks = Ranks()  # rank 0, whose view this is, is the stuck one
    ranks.after(1, {}, {"collectives": 8}, {"collectives": 8})
    assert ranks.after(10) is None
    verdict = ranks.after(10)
    assert verdict is not None and verdict.startswith("rank 0 takes no part any more")


def test_a_rank_that_left_the_others_in_the_middle_is_named() -> None:
    ranks = Ranks()
    ranks.after(1, {}, {"left": True, "expects_progress": False}, {})
    verdict = ranks.after(10)
    assert verdict is not None and verdict.startswith("rank 1 takes no part any more: it has left.")


def test_where_all_wait_in_the_same_collective_all_are_shown() -> None:
    ranks = Ranks()
    ranks.after(1)
    verdict = ranks.after(10)
    assert verdict is not None and verdict.startswith("no rank has got on for 10 s, and all have begun 7 collectives.")
    assert "rank 2 is at here.py:2 work" in verdict


# ------------------------------------------------------------------------------------------------ when it watches


def test_it_watches_by_default() -> None:
    assert TrainConfig().hang_timeout == 600
    assert "`train.hang_timeout` (600 s; 0: never)" in (REPOSITORY / "docs/launch.md").read_text()


class Clock:
    """The clock of a watchdog's thread and what it waits on: every round begins at the next of some times."""

    def __init__(self, times: Iterable[float]):
        self.times = iter(times)
        self.now: float | None = next(self.times)

    def monotonic(self) -> float | None:
        return self.now

    def wait(self, _interval: float) -> bool:
        self.now = next(self.times, None)
        return self.now is None  # the end

    def set(self) -> None:
        self.times = iter(())


# A round a second; but the whole job is suspended for an hour behind the third.
SUSPENDED = [0, 1, 2, *range(3602, 3609)]


@pytest.mark.parametrize(("times", "found"), [(SUSPENDED, 0), ([*SUSPENDED, 3609], 1)])
def test_time_in_which_the_job_was_suspended_is_not_a_ranks_silence(monkeypatch, times, found) -> None:
    store = dist.HashStore()
    ours, theirs = (Watchdog(lambda: store, rank, 2, Activity(), 10.0, None) for rank in (0, 1))
    ours.announce()
    theirs.announce()  # and it is never heard again
    clock, accusations = Clock(times), []
    monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(ours, "stopped", clock)
    monkeypatch.setattr(ours, "_accuse", lambda accusation, _store: accusations.append(accusation))
    ours._tell()
    assert len(accusations) == found and all("no sign of life for 10 s" in told for told in accusations)


@pytest.mark.parametrize(("times", "found"), [(SUSPENDED[:-1], 0), (SUSPENDED, 1)])
def test_nor_is_it_silence_of_the_jobs_store(monkeypatch, times, found) -> None:
    ours = Watchdog(dist.HashStore, 0, 2, Activity(), 10.0, None)
    ours.asking, ours.teller = True, threading.current_thread()  # it asked, and got no answer yet
    clock, said = Clock(times), []
    monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(ours, "stopped", clock)
    monkeypatch.setattr(ours, "_end", lambda verdict, mine: (said.append(verdict), clock.set()))
    ours._guard()
    assert len(said) == found and all("for 10 s" in told for told in said)


# ------------------------------------------------------------------------------------------------ real ranks


HOST = """
import sys, torch.distributed as dist
store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
print(store.port, flush=True)
sys.stdin.read()
"""


def begin(folder: Path, what: str, port: int) -> list[subprocess.Popen]:
    """Two ranks of tests/hanging.py that meet at a store."""
    environment = ENVIRONMENT | {
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "WORLD_SIZE": "2",
    }
    return [
        subprocess.Popen(
            [sys.executable, "-m", "tests.hanging", str(folder), what],
            env=environment | {"RANK": rank, "LOCAL_RANK": rank, "TORCHELASTIC_ERROR_FILE": f"{folder}-{rank}.json"},
            cwd=REPOSITORY,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank in "01"
    ]


def test_a_stuck_rank_and_a_lost_store_end_all_ranks(tmp_path: Path) -> None:
    ours = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    host = subprocess.Popen([sys.executable, "-c", HOST], text=True, **pipes)
    stuck = begin(tmp_path / "stuck", "stuck", ours.port)
    assert host.stdout is not None
    lost = begin(tmp_path / "lost", "waiting", int(host.stdout.readline()))
    read_until(lost[0], "ready")
    host.send_signal(signal.SIGSTOP)

    terminal, silent = (process.communicate()[0] for process in stuck)
    assert [process.returncode for process in stuck] == [1, 1]
    assert f"rank 1 ({os.uname().nodename}, process {stuck[1].pid}) takes no part any more: for 3 s" in terminal
    assert re.search(r"it has been at ranks/world.py:\d+ share, with \d+ collectives begun, where others", terminal)
    assert re.search(r"Rank 0 waits in gloo:all_reduce \[\[2\]\] .* from ranks/world.py:\d+ sum_numbers", terminal)
    assert silent == ""
    logs = tmp_path / "stuck" / LOGS
    assert "rank 1" in (logs / "rank-1.log").read_text().splitlines()[0]
    assert "HANG: rank 1" in (logs / "rank-0.log").read_text() and "HANG: rank 1" in (logs / "rank-1.log").read_text()
    assert "in __len__" in (logs / "hang-rank-1.txt").read_text()
    assert "gloo:all_reduce [[2]]" in (logs / "hang-rank-0.txt").read_text()
    assert "HANG: rank 1" in (tmp_path / "stuck-0.json").read_text(), "for torchrun's report"

    outputs = [process.communicate()[0] for process in lost]
    assert [process.returncode for process in lost] == [1, 1]
    assert all("cannot reach the job's store" in output for output in outputs)
    host.kill()
    host.communicate()


@pytest.mark.long
def test_a_stopped_rank_ends_a_torchrun(tmp_path: Path) -> None:
    run = start(
        TORCHRUN, *debug(tmp_path / "run", "train.max_steps=100000", "validate.every=0", "train.hang_timeout=5")
    )
    read_until(run, "step 2/")
    logs = tmp_path / "run" / LOGS
    header = (logs / "rank-1.log").read_text().splitlines()[0]
    pid = int(header.split("process ")[1].split()[0])
    os.kill(pid, signal.SIGSTOP)
    read_until(run, "HANG: rank 1")
    os.kill(pid, signal.SIGKILL)  # torchrun would give it 30 s
    output, _ = run.communicate()
    assert run.returncode != 0
    assert f"process {pid}) has stopped: no sign of life for 5 s" in output, "in torchrun's report as well"
    assert "gloo:all_" in (logs / "hang-rank-0.txt").read_text()
