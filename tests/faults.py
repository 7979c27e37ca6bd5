"""The fault campaign, `make fault-test`: runs of 2 ranks, struck at chosen moments, end as the undisturbed one.

What strikes, whom and where is drawn from FAULT_SEED; a run's number and the seed are enough to repeat it:
`FAULT_SEED=0 pytest tests/faults.py -s -k 'run17-'`. Not collected by `make test`, which has a run of its own
(tests/test_commands.py).
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from dflash_dist.training.checkpoint import step_folders
from tests.conftest import REPOSITORY
from tests.faulty import Fault, choose, struck
from tests.test_commands import ENVIRONMENT, losses

SEED = int(os.environ.get("FAULT_SEED", "0"))
STEPS, SAVE_EVERY = 8, 2
KNOBS = [f"train.max_steps={STEPS}", f"checkpoint.every={SAVE_EVERY}", "validate.every=3", "log.every=1"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
BOUND = 300  # [s] after which a life counts as hanging

# How a run comes back, and how many runs are tried. With --max_restarts torchrun does it, and nothing is started again.
AGAIN, OTHERS, ALONE = "same command", "one agent instead of two", "one rank instead of two"
IN_PLACE, TWO_AGENTS = "--max_restarts", "--max_restarts on both of two agents"
DAMAGED, TWICE = "same command, newest checkpoint cut", "same command, struck again while resuming"
ANYWHERE = (AGAIN, IN_PLACE, TWO_AGENTS)  # the others need a checkpoint to come back to
RUNS = {AGAIN: 12, IN_PLACE: 7, TWO_AGENTS: 4, DAMAGED: 3, TWICE: 4, OTHERS: 3, ALONE: 3}

PLACES = ["start", "step", "validation", "save", "between steps"]
KILLED = [("SIGKILL", victims) for victims in ("rank 0", "rank 1", "all ranks", "agent", "node")]
STOPPED = [("SIGTERM", victims) for victims in ("rank 0", "rank 1", "all ranks", "agent", "node")]


def draw() -> list[tuple[str, str, str, str]]:
    """Way back, signal, victims and place of each run. Places and victims are dealt like cards, so that all occur."""
    chance = random.Random(SEED)

    def deal(cards: list) -> Iterator:
        while True:
            yield from chance.sample(cards, len(cards))

    faults = {way: deal([*KILLED, *STOPPED]) for way in (AGAIN, TWICE, ALONE)}
    # torchrun brings back what dies; what saves and ends well, or the agent itself, is not its business.
    faults |= {IN_PLACE: deal(KILLED[:3]), TWO_AGENTS: deal(KILLED[:2]), DAMAGED: deal(KILLED)}
    # Not an agent alone: having stopped well, the other one would wait 5 minutes for it.
    faults[OTHERS] = deal([*KILLED[:3], KILLED[4], *STOPPED[:3]])
    early, late = deal(PLACES), deal(PLACES[1:])
    return [
        (way, *next(faults[way]), next(early if way in ANYWHERE else late))
        for way, count in RUNS.items()
        for _ in range(count)
    ]


@dataclass
class Job:
    """A run folder, what strikes it, and the processes that work on it."""

    folder: Path
    output: list[str] = field(default_factory=list)

    @property
    def run(self) -> Path:
        return self.folder / "run"

    def live(self, agents: int = 1, ranks: int = 2, restarts: int = 0) -> bool:
        """Starts the job once and waits; whether it ended well, at its last step."""
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            endpoint = f"localhost:{probe.getsockname()[1]}"
        nodes = ["--nnodes", str(agents), "--nproc_per_node", str(ranks // agents), "--max_restarts", str(restarts)]
        meeting = ["--rdzv_backend", "c10d", "--rdzv_id", "faults", "--rdzv_endpoint", endpoint]
        program = ["-m", "tests.faulty", str(self.folder), "train", "--config", "configs/debug.yaml"]
        # Tokenising is part of a start: each run has a cache of its own.
        own = {"XDG_CACHE_HOME": str(self.folder / "cache"), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        log = self.folder / f"life-{len(self.output)}.log"
        with log.open("w") as output:
            processes = [
                subprocess.Popen(
                    [*TORCHRUN, *nodes, *meeting, *program, f"output_dir={self.run}", *KNOBS],
                    env=ENVIRONMENT | own,
                    cwd=REPOSITORY,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
                for _ in range(agents)
            ]
            try:
                codes = [process.wait(BOUND) for process in processes]
            except subprocess.TimeoutExpired:
                for process in processes:
                    for hanging in (*psutil.Process(process.pid).children(recursive=True), process):
                        hanging.kill()
                raise
        self.output.append(log.read_text())
        return not any(codes) and not (self.run / "PREEMPTED").exists()

    def wait_for_orphans(self) -> None:
        """Ranks outlive an agent that was killed, and hold the run folder. On a cluster the scheduler ends them."""
        subprocess.run(["flock", str(self.run / ".lock"), "true"], check=True, timeout=BOUND)

    @property
    def newest(self) -> Path:
        return max(step_folders(self.run / "checkpoints").items())[1]

    def rows(self) -> list[dict[str, float]]:
        """What was logged, without what depends on the machine."""
        lines = (self.run / "metrics.jsonl").read_text().splitlines()
        return [{k: v for k, v in json.loads(line).items() if not k.startswith("perf/")} for line in lines]

    def saved(self) -> dict[str, bytes]:
        assert self.newest.name == f"step-{STEPS:08d}"
        return {path.name: path.read_bytes() for path in self.newest.iterdir()}

    def steps_done(self) -> int:
        logs = (path.read_text() for path in self.folder.glob("life-*.log"))  # orphans have written more since
        return sum(len(re.findall(rf"^step \d+/{STEPS} ", log, re.MULTILINE)) for log in logs)


@dataclass(frozen=True)
class Undisturbed:
    job: Job
    visits: dict[str, dict[str, int]]  # place -> line -> times

    def choose(self, chance: random.Random, signal: str, victims: str, place: str, late: bool = False) -> Fault:
        """A fault at any line of the place, at any of its times; `late`: in the second half of the run, when there is
        a checkpoint to come back to."""
        lines = sorted((line, times) for line, times in self.visits[place].items() if not late or times >= 4)
        line, times = chance.choice(lines)
        delay = chance.choice([0.0, chance.uniform(0, 0.05)])
        return Fault(signal, victims, place, line, chance.randint(times // 2 + 1 if late else 1, times), delay)


def visits(folder: Path) -> dict[str, dict[str, int]]:
    """Of whichever rank got there more often: which one tokenises, for example, is a matter of chance."""
    merged: dict[str, Counter[str]] = {}
    for path in folder.glob("visits-*.json"):
        for place, lines in json.loads(path.read_text()).items():
            merged[place] = merged.get(place, Counter()) | Counter(lines)
    return {place: dict(lines) for place, lines in merged.items()}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    whole = Job(tmp_path_factory.mktemp("undisturbed"))
    assert whole.live(), whole.output
    resumed = Job(tmp_path_factory.mktemp("resumed"))
    shutil.copytree(whole.run, resumed.run)
    shutil.rmtree(resumed.newest)
    assert resumed.live(), resumed.output
    assert resumed.rows() == whole.rows() and resumed.saved() == whole.saved()
    return Undisturbed(whole, visits(whole.folder) | {"resume": visits(resumed.folder)["resume"]})


@dataclass(frozen=True)
class Outcome:
    number: int
    way: str
    faults: list[Fault]
    starts: int
    again: int  # steps logged more than once

    @property
    def row(self) -> str:
        struck = (f"{f.signal} to {f.victims}, {f.place}: {f.line}, {f.times}. time" for f in self.faults)
        return f"| {self.number} | {self.way} | {'; then '.join(struck)} | {self.starts} | {self.again} |"


@pytest.fixture(scope="module")
def outcomes() -> Iterator[list[Outcome]]:
    """What became of each run; printed as the tables of docs/reliability.md."""
    outcomes: list[Outcome] = []
    yield outcomes
    print(f"\n\nFAULT_SEED={SEED}: {len(outcomes)} runs ended as the undisturbed one\n")
    print("| run | comes back by | fault | starts | steps again |", "|---" * 5 + "|", sep="\n")
    print(*(outcome.row for outcome in outcomes), sep="\n")
    places = [*PLACES, "resume"]
    faults = Counter((f.signal, f.victims, f.place) for outcome in outcomes for f in outcome.faults)
    print(f"\n| fault | {' | '.join(places)} |", "|---" * (1 + len(places)) + "|", sep="\n")
    for signal, victims in [*KILLED, *STOPPED]:
        counts = [str(faults[signal, victims, place] or "") for place in places]
        print(f"| {signal} to {victims} | {' | '.join(counts)} |")
    print("\n| comes back by | runs | starts | steps again, at most |", "|---" * 4 + "|", sep="\n")
    for way in RUNS:
        if those := [outcome for outcome in outcomes if outcome.way == way]:
            starts, again = sum(one.starts for one in those), max(one.again for one in those)
            print(f"| {way} | {len(those)} | {starts} | {again} |")


DRAWN = draw()


@pytest.mark.parametrize("number", range(len(DRAWN)), ids=[f"run{n}-" for n in range(len(DRAWN))])
def test_a_struck_run_ends_as_the_undisturbed_one(
    undisturbed: Undisturbed, outcomes: list[Outcome], tmp_path: Path, number: int
) -> None:
    way, signal, victims, place = DRAWN[number]
    chance = random.Random(f"{SEED} {number}")
    late = way not in ANYWHERE
    faults = [undisturbed.choose(chance, signal, victims, place, late)]
    if way == TWICE:
        faults.append(undisturbed.choose(chance, *chance.choice([*KILLED, *STOPPED]), "resume"))
    print(f"\n[{number}] {way}: {faults}", flush=True)
    choose(tmp_path, faults)
    job = Job(tmp_path)
    ended = job.live(agents=2 if way in (TWO_AGENTS, OTHERS) else 1, restarts=3 if way in (IN_PLACE, TWO_AGENTS) else 0)
    if way == DAMAGED:
        job.wait_for_orphans()
        draft = job.newest / "draft.safetensors"
        os.truncate(draft, draft.stat().st_size // 2)
    refused = 0
    while not ended:
        assert len(job.output) - refused <= len(faults), "one start a fault is enough:\n" + "\n".join(job.output)
        if "is in use by process" in job.output[-1]:
            refused += 1
            job.wait_for_orphans()
        ended = job.live(ranks=1 if way == ALONE else 2)
    assert struck(tmp_path) == len(faults), "a line was never reached"
    if way in (IN_PLACE, TWO_AGENTS):
        assert len(job.output) == 1, "torchrun brings it back, and nobody else"

    if way == ALONE:  # sums over rows are split differently
        assert [row["step"] for row in job.rows()] == [row["step"] for row in undisturbed.job.rows()]
        for (_, ours), (_, theirs) in zip(losses(job.run), losses(undisturbed.job.run), strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5)
        assert job.saved().keys() == undisturbed.job.saved().keys()
    else:
        assert job.rows() == undisturbed.job.rows()
        assert job.saved() == undisturbed.job.saved()
    # A save that was cut short, or damage, leaves the checkpoint before it.
    again = job.steps_done() - STEPS
    assert again <= SAVE_EVERY * (2 * len(faults) + (way == DAMAGED))
    outcomes.append(Outcome(number, way, faults, len(job.output), again))
