"""`python -m tests.faulty FOLDER train ...`: the program, struck by signals at chosen lines of its own code.

`faults.json` in FOLDER lists a `Fault` for each life of the run (what a start, or a restart by torchrun, begins);
`struck-N` is there once the N-th has come. Without `faults.json`, a life counts how often each line runs in each place,
for a caller to choose from: `visits-RANK.json`.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

import dflash_dist
from dflash_dist.__main__ import main
from dflash_dist.training.checkpoint import Checkpoints
from dflash_dist.training.step import TrainingStep
from dflash_dist.training.trainer import Trainer
from dflash_dist.training.watch import Watch

PACKAGE = f"{Path(dflash_dist.__file__).parent}/"

# What a run is doing, by the innermost of these functions on the stack.
PLACES = {
    Trainer.__init__.__code__: "start",
    Trainer.resume.__code__: "resume",
    Watch.__init__.__code__: "resume",  # cuts the metrics back to the checkpoint
    TrainingStep.run.__code__: "step",
    Trainer.validate_and_show.__code__: "validation",
    Trainer.save.__code__: "save",
    Checkpoints._write.__code__: "save",  # in a thread, while training goes on
    Trainer.run.__code__: "between steps",
}


@dataclass(frozen=True)
class Fault:
    """`signal` to `victims` as any rank is about to run a line for the n-th time in a place."""

    signal: str
    victims: str  # rank 0, rank 1, all ranks, agent, or node: the agent and the ranks of whoever gets to the line
    place: str
    line: str  # file:number, below the package
    times: int
    delay: float = 0.0  # [s] later: then it may also strike inside of a kernel, a collective or a write


def place_of(frame: FrameType | None) -> str | None:
    while frame is not None:
        if place := PLACES.get(frame.f_code):
            return place
        frame = frame.f_back
    return None


class Tracer:
    """Counts the lines of the package that run in each place, and strikes at the fault's."""

    def __init__(self, folder: Path, fault: Fault | None, mark: Path | None):
        self.folder, self.fault, self.mark = folder, fault, mark
        self.visits: dict[str, Counter[str]] = {place: Counter() for place in PLACES.values()}
        threading.settrace(self.call)
        sys.settrace(self.call)

    def call(self, frame: FrameType, _event: str, _arg: object):
        return self.line if frame.f_code.co_filename.startswith(PACKAGE) else None

    def line(self, frame: FrameType, event: str, _arg: object):
        if event == "line" and (place := place_of(frame)):
            line = f"{frame.f_code.co_filename.removeprefix(PACKAGE)}:{frame.f_lineno}"
            self.visits[place][line] += 1
            fault = self.fault
            if fault and (place, line, self.visits[place][line]) == (fault.place, fault.line, fault.times):
                self.strike(fault)
        return self.line

    def strike(self, fault: Fault) -> None:
        assert self.mark is not None
        with contextlib.suppress(FileExistsError):
            self.mark.open("x").close()  # by the first rank that gets here
            if fault.delay:
                threading.Timer(fault.delay, self.kill, [fault]).start()
            else:
                self.kill(fault)

    def kill(self, fault: Fault) -> None:
        ranks = {int(path.name): json.loads(path.read_text()) for path in (self.folder / "ranks").iterdir()}
        mine = ranks[int(os.environ["RANK"])]
        pids = {
            "all ranks": [rank["pid"] for rank in ranks.values()],
            "agent": [mine["agent"]],
            "node": [mine["agent"], *(rank["pid"] for rank in ranks.values() if rank["agent"] == mine["agent"])],
        } | {f"rank {number}": [rank["pid"]] for number, rank in ranks.items()}
        for pid in sorted(pids[fault.victims], key=lambda pid: pid == os.getpid()):  # itself last
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.Signals[fault.signal])


def line_of(function: Callable, text: str) -> str:
    """The line of a function of the package that has `text`, as a fault names it."""
    function = inspect.unwrap(function)
    lines, first = inspect.getsourcelines(function)
    (number,) = (number for number, line in enumerate(lines, first) if text in line)
    return f"{inspect.getfile(function).removeprefix(PACKAGE)}:{number}"


def choose(folder: Path, faults: list[Fault]) -> None:
    (folder / "faults.json").write_text(json.dumps([asdict(fault) for fault in faults]))


def struck(folder: Path) -> int:
    """How many of the faults have come."""
    return len(list(folder.glob("struck-*")))


def run(folder: Path) -> None:
    rank = os.environ.get("RANK", "0")
    (folder / "ranks").mkdir(parents=True, exist_ok=True)
    (folder / "ranks" / rank).write_text(json.dumps({"pid": os.getpid(), "agent": os.getppid()}))
    faults = json.loads((folder / "faults.json").read_text()) if (folder / "faults.json").exists() else None
    done, tracer = struck(folder), None
    if faults is None:
        tracer = Tracer(folder, None, None)
    elif done < len(faults):
        tracer = Tracer(folder, Fault(**faults[done]), folder / f"struck-{done}")
    try:
        main()  # once all faults have come: untraced
    finally:
        sys.settrace(None)
    if tracer and faults is None:
        (folder / f"visits-{rank}.json").write_text(json.dumps(tracer.visits))


if __name__ == "__main__":
    run(Path(sys.argv.pop(1)))
