"""What a run shows: TensorBoard, one JSON line a logged step, and how far it is. Rank 0 only."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import resource
import shutil
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from dflash_dist.config import Config, to_tree, values
from dflash_dist.files import whole
from dflash_dist.logs import or_dash, show_status
from dflash_dist.reading import parse
from dflash_dist.training.curves import METRICS

# How TensorBoard's page of custom scalars is ordered: what it learns, how fast, how.
LAYOUT = {
    "what it learns": {
        "loss": ["Multiline", ["train/loss", "val/loss"]],
        "tau": ["Multiline", ["train/tau", "val/tau", "eval/tau"]],
    },
    "how fast": {
        "share of the peak": ["Multiline", ["perf/mfu"]],
        "tokens/s of a GPU": ["Multiline", ["perf/tokens_per_s_per_gpu"]],
        "share of the time waiting for data": ["Multiline", ["perf/data_wait"]],
    },
    "how": {
        "learning rate": ["Multiline", ["optim/lr"]],
        "gradient norm": ["Multiline", ["optim/grad_norm"]],
        "epoch": ["Multiline", ["progress/epoch"]],
    },
}
OUTCOMES = ("val/loss", "val/tau", "eval/tau", "train/loss", "train/tau")  # by which runs are compared
BOARD = "tensorboard"  # in the run folder


class MetricLog:
    """Writes metrics of a run folder from `step` on; what an earlier run wrote beyond it is cut away first.

    While the disk is full, JSON lines wait in memory; TensorBoard goes without.
    """

    def __init__(self, folder: Path, step: int, total_steps: int, config_text: str, config: Config):
        self.path, boards = folder / METRICS, folder / BOARD
        if step == 0:  # left by a run that ended before its first checkpoint
            self.path.unlink(missing_ok=True)
            shutil.rmtree(boards, ignore_errors=True)
        _cut_back(self.path, step)
        self._lines, self._waiting = self.path.open("ab", buffering=0), b""
        # TensorBoard calls a run as its folder; runs of older versions go on where they are.
        self.board_folder = boards if any(boards.glob("events.*")) else boards / folder.resolve().name
        self._board: SummaryWriter | None = SummaryWriter(str(self.board_folder), purge_step=step + 1)
        self._board.add_text("config", f"```yaml\n{config_text}\n```", step)
        self._board.add_custom_scalars(LAYOUT)
        experiment, session, _ = hparams(_plain(config), dict.fromkeys(OUTCOMES, 0.0))
        for summary in (experiment, session):
            self._board._get_file_writer().add_summary(summary)
        self._wandb = join_wandb(config, folder, step) if config.log.wandb else None
        self.progress = Progress(step, total_steps)

    def write(self, step: int, measured: Mapping[str, float | None]) -> None:
        """`measured`: TensorBoard tag -> number; None where there was nothing to measure, which leaves it out."""
        numbers = {tag: value for tag, value in measured.items() if value is not None}
        self._waiting += json.dumps({"step": step, **numbers}).encode() + b"\n"
        with self._a_full_disk_survived(step):
            self._write_lines()
            self._board = self._board or SummaryWriter(str(self.board_folder))
            for tag, value in numbers.items():
                self._board.add_scalar(tag, value, step)
            self._board.flush()
        if self._wandb:
            self._wandb.log(numbers, step=step)

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
        if self._wandb:
            self._wandb.finish()


def _plain(config: Config) -> dict[str, float | str]:
    """Every knob, for TensorBoard's page of hyperparameters: numbers and truths as they are, others as text."""
    return {
        name: value if isinstance(value, (bool, int, float, str)) else json.dumps(value)
        for name, value in values(config).items()
    }


def check_wandb(project: str | None) -> None:
    """Raises a ValueError where a project is to be shown numbers and the package for it is missing."""
    if project and importlib.util.find_spec("wandb") is None:
        raise ValueError("log.wandb is set but its package is missing: pip install wandb, or leave log.wandb out")


def join_wandb(config: Config, folder: Path, step: int) -> Any:
    """The run on Weights & Biases: a new one where it begins, and the same again where it goes on.

    Raises:
        ValueError: it cannot be reached.
    """
    import wandb  # only who asks for it has it

    mark = folder / "wandb-id"
    if step == 0 or not mark.is_file():
        mark.write_text(uuid.uuid4().hex)
    try:
        return wandb.init(
            project=config.log.wandb,
            name=folder.resolve().name,
            id=mark.read_text(),
            resume="allow",
            dir=str(folder),
            config=to_tree(config),
        )
    except Exception as error:
        raise ValueError(f"log.wandb: {error}; run `wandb login`, or set WANDB_MODE=offline") from error


def _cut_back(path: Path, step: int) -> None:
    """Keeps the lines up to `step`; a line that an interruption cut short goes too, or a damaged one with
    what follows it."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_bytes().splitlines():
        try:
            if parse(line)["step"] <= step:
                kept.append(line + b"\n")
        except (ValueError, TypeError, LookupError):
            break
    with whole(path) as partial:
        partial.write_bytes(b"".join(kept))


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
