"""What a run shows: TensorBoard, one JSON line a logged step, and how far it is. Rank 0 only."""

from __future__ import annotations

import contextlib
import json
import math
import resource
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter

from dflash_dist.files import whole
from dflash_dist.logs import or_dash, show_status
from dflash_dist.reading import parse

METRICS, BOARD = "metrics.jsonl", "tensorboard"  # in the run folder


class MetricLog:
    """Writes metrics of a run folder from `step` on; what an earlier run wrote beyond it is cut away first.

    While the disk is full, JSON lines wait in memory; TensorBoard goes without.
    """

    def __init__(self, folder: Path, step: int, total_steps: int, config_text: str):
        self.path, self.board_folder = folder / METRICS, folder / BOARD
        if step == 0:  # left by a run that ended before its first checkpoint
            self.path.unlink(missing_ok=True)
            shutil.rmtree(self.board_folder, ignore_errors=True)
        _cut_back(self.path, step)
        self._lines, self._waiting = self.path.open("ab", buffering=0), b""
        self._board: SummaryWriter | None = SummaryWriter(str(self.board_folder), purge_step=step + 1)
        self._board.add_text("config", f"```yaml\n{config_text}\n```", step)
        self.progress = Progress(step, total_steps)

    def write(self, step: int, values: Mapping[str, float | None]) -> None:
        """`values`: TensorBoard tag -> number; None where there was nothing to measure, which leaves it out."""
        values = {tag: value for tag, value in values.items() if value is not None}
        self._waiting += json.dumps({"step": step, **values}).encode() + b"\n"
        with self._a_full_disk_survived(step):
            self._write_lines()
            self._board = self._board or SummaryWriter(str(self.board_folder))
            for tag, value in values.items():
                self._board.add_scalar(tag, value, step)
            self._board.flush()

    def _write_lines(self) -> None:
        while self._waiting:
            self._waiting = self._waiting[self._lines.write(self._waiting) :]

    @contextlib.contextmanager
    def _a_full_disk_survived(self, step: int) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.progress.say(f"STEP {step} NOT YET LOGGED to {self.path.parent}: {error}")
            with contextlib.suppress(OSError):
                if self._board:
                    self._board.close()
            self._board = None  # its thread has ended for good: there will be a new one

    def show_slots(self, step: int, tag: str, what: str, shares: Sequence[float | None]) -> None:
        """A picture of a share by slot, without those that are None; `what` it is a share of."""
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        figure, axes = plt.subplots(figsize=(5, 3))
        axes.bar(range(1, len(shares) + 1), [math.nan if share is None else share for share in shares])
        axes.set(xlabel="slot", ylabel=what, ylim=(0, 1), title=f"{what} by slot, step {step}")
        figure.tight_layout()
        with self._a_full_disk_survived(step):
            if self._board:
                self._board.add_figure(tag, figure, step)
                self._board.flush()

    def close(self) -> None:
        with contextlib.suppress(OSError), self._lines:
            self._write_lines()
        with contextlib.suppress(OSError):
            if self._board:
                self._board.close()


def _cut_back(path: Path, step: int) -> None:
    """Keeps the lines up to `step`; a line that an interruption cut short goes too, or a damaged one with
    what follows it."""
    if path.is_file():
        kept = [line + b"\n" for line, row in _lines(path) if row["step"] <= step]
        with whole(path) as partial:
            partial.write_bytes(b"".join(kept))


def _lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """The lines up to the first damaged one, with what they say."""
    for line in path.read_bytes().splitlines():
        try:
            row = parse(line)
            row["step"] + 0
        except (ValueError, TypeError, LookupError):
            return
        yield line, row


def read_course(folder: Path) -> dict[str, dict[int, float]]:
    """What a run has logged so far: by tag, the number of each step."""
    course = defaultdict[str, dict[int, float]](dict)
    with contextlib.suppress(FileNotFoundError):
        for _, row in _lines(folder / METRICS):
            for tag, value in row.items():
                course[tag][row["step"]] = value
    return course


def seconds_in_steps(course: dict[str, dict[int, float]]) -> float:
    """Time spent in training steps, also those before an interruption."""
    logged = course["perf/step_s"]
    return sum(seconds * (step - before) for (step, seconds), before in zip(logged.items(), [0, *logged]))


class Progress:
    """A line for each logged step; on a terminal, below them, how far the run is now."""

    def __init__(self, step: int, total_steps: int):
        self.first, self.total, self.begun, self.measured = step, total_steps, time.perf_counter(), ""

    def at(self, step: int) -> None:
        """Draws that a step is done, with what was last measured."""
        show_status(self._line(step))

    def show(self, step: int, loss: float, tau: float | None, tokens_per_s: float) -> None:
        self.measured = f"  loss {loss:.3f}  tau {or_dash(tau)}  {tokens_per_s:,.0f} tokens/s"
        self.say(self._line(step))
        self.at(step)

    def _line(self, step: int) -> str:
        seconds = (time.perf_counter() - self.begun) / max(step - self.first, 1)
        left = timedelta(seconds=int(seconds * (self.total - step)))
        return f"step {step}/{self.total}{self.measured}  {left} left"

    def say(self, text: str) -> None:
        """A line of its own."""
        print(text, file=sys.stderr, flush=True)


def peak_memory_mib(device: torch.device) -> float:
    """The most memory in use so far [MiB]: allocated on the GPU, or resident of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
