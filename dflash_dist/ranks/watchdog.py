"""Ends a run that hangs, with a message that names the rank that stopped taking part.

A collective waits for every rank, so one that is frozen or stuck stops all of them, in silence. Here every rank tells
the others through the job's store, every few seconds and from a thread of its own, how far it has come:

* A rank whose word does not change any more is stopped: its process, its node or its network. That holds always.
* Ranks that get nowhere are stuck, if all of them expect to get on (`Activity`). Those that have begun the fewest
  collectives are what the others wait for. Outside of a training loop a rank may well wait for hours.

Time counts while this process runs: one that was suspended as a whole, and goes on, accuses nobody.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import pickle
import platform
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dflash_dist.logs import say_on_terminal

PACKAGE = str(Path(__file__).parents[1])
LAST = 20  # collectives in a report
LAST_WORDS = 60.0  # [s] after which a process that is to end does so, even if a dead disk or GPU holds up its report


@dataclass
class Activity:
    """What the program says of itself."""

    ticks: int = 0  # counts work between collectives, such as micro-batches
    expects_progress: bool = False  # every rank should be getting on: none may wait for long


@dataclass(frozen=True)
class State:
    """How far a rank has come."""

    beat: int  # new each time
    name: str
    collectives: int  # begun, in all process groups
    ticks: int
    expects_progress: bool
    left: bool  # it ended its part cleanly
    where: str  # its main thread

    @property
    def progress(self) -> tuple[int, int, bool, bool]:
        return self.collectives, self.ticks, self.expects_progress, self.left


class Watchdog:
    """Threads that tell and watch, from `start` to `stop`.

    Args:
        connect: a new connection to the job's store, with keys that no other start of the job uses. It must be this
            object's own: operations on a shared one wait for each other.
        timeout: how long a rank may be silent, or all ranks get nowhere [s].
        folder: gets `hang-rank-N.txt`: the stacks of all threads and the last collectives. None: they are printed.
    """

    def __init__(
        self,
        connect: Callable[[], dist.Store],
        rank: int,
        size: int,
        activity: Activity,
        timeout: float,
        folder: Path | None,
    ):
        self.connect, self.rank, self.activity, self.timeout, self.folder = connect, rank, activity, timeout, folder
        self.interval = min(timeout / 10, 5.0)
        self.keys = [*(f"rank {r}" for r in range(size)), "verdict"]
        self.name = f"rank {rank} ({platform.node()}, process {os.getpid()})"
        self.main_thread = threading.get_ident()
        self.stopped, self.ending = threading.Event(), threading.Lock()
        self.rounds, self.asking, self.lost = 0, False, False
        self.seen: list[State] = []
        self.silent, self.still = [0.0] * size, 0.0  # [s]
        # Telling may block for good, where the store's node is gone; so a second thread looks after the first.
        self.teller = threading.Thread(target=self._tell, name="watchdog", daemon=True)
        self.guard = threading.Thread(target=self._guard, name="watchdog's guard", daemon=True)

    def announce(self) -> None:
        """Gives this rank's first word. All must have, before one starts to read them."""
        self.store: dist.Store | None = self.connect()
        self.store.set(self.keys[self.rank], self._word(0))
        if self.rank == 0:
            self.store.set("verdict", "")

    def start(self) -> None:
        self.teller.start()
        self.guard.start()

    def stop(self) -> None:
        """Leaves: the others do not miss this rank any more."""
        self.stopped.set()
        self.teller.join(timeout=2 * self.interval)

    # ------------------------------------------------------------------------------------------------ the threads

    def _rounds(self) -> Iterator[float]:
        """Gives, every interval until the end, the seconds since the last one in which this process may have run."""
        last = time.monotonic()
        while not self.stopped.wait(self.interval):
            now = time.monotonic()
            yield min(now - last, 2 * self.interval)
            last = now

    def _tell(self) -> None:
        for seconds in self._rounds():
            if self.lost and not self.activity.expects_progress:
                continue  # the rank that holds the store may have ended, and well
            self.asking = True
            try:
                self.store = self.store or self.connect()
                self.store.set(self.keys[self.rank], self._word(self.rounds + 1))
                *words, verdict = self.store.multi_get(self.keys)
            except RuntimeError:  # the guard counts how long this lasts
                self.store, self.lost = None, True
                continue
            self.lost = self.asking = False
            self.rounds += 1
            if verdict:
                self._end(verdict.decode(), mine=False)
            accusation = self.judge([State(**json.loads(word)) for word in words], seconds)
            if accusation:
                self._accuse(accusation, self.store)
        with contextlib.suppress(RuntimeError):
            if self.store is not None:
                self.store.set(self.keys[self.rank], self._word(self.rounds + 1, left=True))

    def _guard(self) -> None:
        rounds, silent = self.rounds, 0.0
        for seconds in self._rounds():
            if not self.teller.is_alive():
                return
            silent += seconds
            allowed = not self.asking or (self.lost and not self.activity.expects_progress)
            if self.rounds != rounds or allowed:
                rounds, silent = self.rounds, 0.0
            if silent >= self.timeout:
                store = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
                self._end(
                    f"{self.name} cannot reach the job's store at {store} any more, for {silent:.0f} s: the node of"
                    " rank 0, or the network, is gone.",
                    mine=True,
                )

    def _word(self, beat: int, left: bool = False) -> str:
        frame = sys._current_frames().get(self.main_thread)
        where = "nowhere" if left or frame is None else _site(_frames(frame))
        state = State(beat, self.name, _collectives_begun(), left=left, where=where, **vars(self.activity))
        return json.dumps(vars(state))

    # ------------------------------------------------------------------------------------------------ the verdict

    def judge(self, states: list[State], seconds: float) -> str | None:
        """What is wrong, if anything, with what the ranks say `seconds` after they were last heard."""
        before, self.seen = self.seen, states
        if not before:
            return None
        heard = [old.beat != new.beat or new.left for old, new in zip(before, states)]
        self.silent = [0.0 if new else so_far + seconds for new, so_far in zip(heard, self.silent)]
        moved = any(old.progress != new.progress for old, new in zip(before, states))
        self.still = 0.0 if moved else self.still + seconds

        stopped = [rank for rank, silent in enumerate(self.silent) if silent >= self.timeout]
        if stopped:
            words = [
                f"{states[r].name} has stopped: no sign of life for {self.silent[r]:.0f} s. It had begun"
                f" {states[r].collectives} collectives and was at {states[r].where}."
                for r in stopped
            ]
            return "\n  ".join(words)
        if self.still < self.timeout or not all(state.expects_progress or state.left for state in states):
            return None
        counts = [-1 if state.left else state.collectives for state in states]
        behind = [rank for rank, count in enumerate(counts) if count == min(counts)]
        if len(behind) == len(states):
            words = [f"no rank has got on for {self.still:.0f} s, and all have begun {counts[0]} collectives."]
            words += [f"{state.name} is at {state.where}." for state in states[:8]]
            return "\n  ".join(words)
        if self.rank in behind and self.still < 2 * self.timeout:
            return None  # those that wait know in which collective, and will have spoken by then
        words = [
            f"{states[r].name} takes no part any more: it has left."
            if states[r].left
            else f"{states[r].name} takes no part any more: for {self.still:.0f} s it has been at {states[r].where},"
            f" with {counts[r]} collectives begun, where others have begun {max(counts)}."
            for r in behind
        ]
        return "\n  ".join(words)

    def _accuse(self, accusation: str, store: dist.Store) -> None:
        """Ends all ranks. The first to find something speaks for all: several would contradict each other."""
        faulthandler.dump_traceback_later(LAST_WORDS, exit=True)
        verdict = agreed = f"{accusation}\n  {_waits(self.rank)}"
        with contextlib.suppress(RuntimeError):  # alone, then
            agreed = store.compare_set("verdict", "", verdict).decode()
        self._end(agreed, mine=agreed == verdict)

    def _end(self, verdict: str, mine: bool) -> None:
        """Says and writes down what is known, and ends the process at once: its main thread is stuck."""
        self.ending.acquire()  # never given back: the other thread comes no further
        faulthandler.dump_traceback_later(LAST_WORDS, exit=True)
        text = f"HANG: {verdict}"
        if self.folder:
            text += f"\n  Stacks and last collectives of all ranks: {self.folder}/hang-rank-*.txt"
        text += "\n  The same command continues where the run was saved. Where a rank was only slow: train.hang_timeout"
        if mine:
            say_on_terminal(f"[rank {self.rank}] {text}")
            tell_torchrun(text)
        else:
            print(f"[rank {self.rank}] ends, as all do: {text.splitlines()[0]}", file=sys.stderr, flush=True)
        with contextlib.suppress(OSError):
            path = self.folder / f"hang-rank-{self.rank}.txt" if self.folder else None
            report = path.open("a", encoding="utf-8") if path else sys.stderr
            report.write(f"{time.strftime('%F %T')} {self.name}\n{text}\n\nthe last collectives of this rank\n")
            report.writelines(f"  {_describe(entry)}\n" for entry in _recorded()[-LAST:])
            report.write("\nstacks of this rank\n")
            report.flush()
            faulthandler.dump_traceback(file=report)
        if mine:
            time.sleep(2 * self.interval)  # torchrun ends the others of this node after us: let them write theirs
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(1)


# ------------------------------------------------------------------------------------------------ what torch knows


def _collectives_begun() -> int:
    with contextlib.suppress(Exception):  # private; and groups come and go
        groups = list(dist.distributed_c10d._world.pg_map)
        backends: set[Any] = {group._get_backend(device) for group in groups for device in group._device_types}
        return sum(backend._get_sequence_number_for_group() for backend in backends)
    return 0


def _recorded() -> list[dict[str, Any]]:
    """The flight recorder's entries, oldest first; torch keeps one for gloo and one for NCCL."""
    entries = []
    for name in ("_dump_fr_trace", "_dump_nccl_trace"):
        with contextlib.suppress(Exception):  # private, and absent in some builds: a message without it is still one
            entries += pickle.loads(getattr(torch._C._distributed_c10d, name)()).get("entries", [])
    return sorted(entries, key=lambda entry: entry["time_created_ns"])


def _waits(rank: int) -> str:
    """In which collective this rank waits, as a sentence."""
    waiting = [entry for entry in _recorded() if not entry["retired"] and entry["state"] != "completed"]
    return f"Rank {rank} waits in {_describe(waiting[0])}." if waiting else f"Rank {rank} waits in no collective."


def _describe(entry: dict[str, Any]) -> str:
    frames = ((frame["filename"], frame["line"], frame["name"]) for frame in entry.get("frames", []))
    state = "done" if entry["retired"] else entry["state"]
    return (
        f"{entry['profiling_name']} {entry['input_sizes']} (number {entry['collective_seq_id']} of its group, {state})"
        f" from {_site(frames)}"
    )


def _frames(frame: Any) -> Iterable[tuple[str, int, str]]:
    while frame is not None:
        yield frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name
        frame = frame.f_back


def _site(frames: Iterable[tuple[str, int, str]]) -> str:
    """The two innermost frames of this package, or of anything."""
    known = list(frames)
    ours = [frame for frame in known if frame[0].startswith(PACKAGE) and frame[0] != __file__] or known
    return " < ".join(f"{_short(file)}:{line} {name}" for file, line, name in ours[:2]) or "a place unknown"


def _short(file: str) -> str:
    return str(Path(file).relative_to(PACKAGE)) if file.startswith(PACKAGE) else Path(file).name


# ------------------------------------------------------------------------------------------------ who is told


def tell_torchrun(message: str) -> None:
    """Leaves the message where torchrun looks for what to show of a failed rank in its last report."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        with contextlib.suppress(OSError):
            details = {"py_callstack": message, "timestamp": str(int(time.time()))}
            Path(path).write_text(json.dumps({"message": {"message": message, "extraInfo": details}}))
