"""A log file for every rank in the run folder; the terminal shows rank 0, and what ends any of them.

Rank 0 prints to both through Python objects, because a pipe in between would no longer be a terminal to progress bars;
what native code prints there reaches the terminal alone. The other ranks' file descriptors lead to their files, native
output included. Nothing here needs torch: what is said while that loads is in the files, too.

On a terminal the last line says what is being done, and is drawn over; what is printed comes above it.
"""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from dflash_dist.files import writing

LOGS = "logs"  # in the run folder
QUIET = 3.0  # [s] for which the last line of a terminal may stand without saying for how long


@contextlib.contextmanager
def keep_logs(folder: Path) -> Iterator[None]:
    """While it lasts, what this process prints goes to `folder`/logs/rank-N.log, appended; from rank 0, or a process
    without torchrun, to the terminal as well. An exception is written there and passed on. `sys.__stderr__` leads to
    the terminal throughout.

    Raises:
        ValueError: the folder cannot be written to.
    """
    rank, path = int(os.environ.get("RANK", 0)), folder / LOGS
    with writing(f"output_dir {folder}"):
        path.mkdir(parents=True, exist_ok=True)
        # Unbuffered: a killed rank has written its lines, and a full disk keeps none back to fail again.
        log = (path / f"rank-{rank}.log").open("ab", buffering=0)
    attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) + 1
    with log, _descriptors_to(log) if rank else contextlib.nullcontext():
        _put(
            log,
            f"==== {time.strftime('%F %T')} rank {rank} of {os.environ.get('WORLD_SIZE', 1)}, attempt {attempt},"
            f" process {os.getpid()} on {platform.node()}: {' '.join(sys.argv)}\n",
        )
        before = sys.stdout, sys.stderr
        status = _Status(sys.stderr) if rank == 0 and sys.stderr.isatty() else None
        sys.stdout, sys.stderr = (_Lines(stream, log, echo=rank == 0, status=status) for stream in before)  # type: ignore[assignment]
        try:
            yield
        except BaseException:
            _put(log, traceback.format_exc())
            raise
        finally:
            sys.stdout, sys.stderr = before
            if status:
                status.close()


def say_phase(text: str) -> None:
    """Says what begins now and may take a while: a line of the log, and what a terminal shows until the next one."""
    if isinstance(sys.stderr, _Lines) and sys.stderr.status:
        _put(sys.stderr.log, f"{text}\n")
        sys.stderr.status.show(text)
    else:
        print(text, file=sys.stderr, flush=True)


def show_status(text: str) -> None:
    """As `say_phase`, for what changes too often to be logged: on a terminal only."""
    if isinstance(sys.stderr, _Lines) and sys.stderr.status:
        sys.stderr.status.show(text)


def say_on_terminal(text: str) -> None:
    """Prints to stderr and, where that goes to a log file, to the terminal as well."""
    if sys.__stderr__ is not None and sys.stderr.fileno() != sys.__stderr__.fileno():
        print(text, file=sys.__stderr__, flush=True)
    print(text, file=sys.stderr, flush=True)


def or_dash(value: float | None, form: str = "{:.2f}") -> str:
    """A number for people; a dash where there was nothing to measure."""
    return "-" if value is None else form.format(value)


def _put(log: BinaryIO, text: str) -> None:
    with _a_full_disk_survived():
        log.write(text.encode(errors="replace"))


@contextlib.contextmanager
def _a_full_disk_survived() -> Iterator[None]:
    """It costs lines, not the run; so does a terminal that nobody reads any more, which may be gone with the very
    Ctrl-C that asked for a checkpoint."""
    with contextlib.suppress(OSError):
        yield


@contextlib.contextmanager
def _descriptors_to(log: BinaryIO) -> Iterator[None]:
    """stdout and stderr of this process lead to the file; `sys.__stderr__` still to the terminal."""
    sys.stdout.flush()
    sys.stderr.flush()
    terminal, stderr = {number: os.dup(number) for number in (1, 2)}, sys.__stderr__
    sys.__stderr__ = os.fdopen(terminal[2], "w", buffering=1, closefd=False)  # type: ignore[misc]
    for number in terminal:
        os.dup2(log.fileno(), number)
    try:
        yield
    finally:
        sys.__stderr__ = stderr  # type: ignore[misc]
        for number, before in terminal.items():
            os.dup2(before, number)
            os.close(before)


class _Status:
    """The last line of a terminal. After a while without news it says for how long it has stood there."""

    def __init__(self, stream: TextIO):
        self.stream, self.text, self.since = stream, "", 0.0
        self.drawn = self.line_begun = False  # by us; by others, such as a progress bar, which then have the line
        self.lock, self.closed = threading.RLock(), threading.Event()
        self.clock: threading.Thread | None = None

    def show(self, text: str) -> None:
        with self.lock:
            self.text, self.since = text, time.monotonic()
            self._draw()
        if self.clock is None:
            self.clock = threading.Thread(target=self._tell_time, daemon=True)
            self.clock.start()

    @contextlib.contextmanager
    def beside(self, text: str) -> Iterator[None]:
        """While others print `text`, the line is gone."""
        with self.lock:
            self._erase()
            yield
            if text:
                self.line_begun = not text.endswith(("\n", "\r"))
            self._draw()

    def close(self) -> None:
        self.closed.set()
        with self.lock:
            self._erase()
            self.text = ""

    def _tell_time(self) -> None:
        while not self.closed.wait(1.0):
            with self.lock:
                if time.monotonic() - self.since >= QUIET:
                    self._draw()

    def _draw(self) -> None:
        if not self.text or self.line_begun:
            return
        seconds = time.monotonic() - self.since
        line = self.text + (f"  ({seconds:.0f} s)" if seconds >= QUIET else "")
        self._write(f"\r{line[: shutil.get_terminal_size().columns - 1]}\033[K")  # a longer one would be two
        self.drawn = True

    def _erase(self) -> None:
        if self.drawn:
            self._write("\r\033[K")
            self.drawn = False

    def _write(self, text: str) -> None:
        with _a_full_disk_survived():
            self.stream.write(text)
            self.stream.flush()


class _Lines:
    """A stream whose whole lines go to a file, without what was drawn over in place; and, to `echo`, everything where
    it went before, above the `status` of a terminal."""

    def __init__(self, stream: TextIO, log: BinaryIO, echo: bool, status: _Status | None):
        self.stream, self.log, self.echo, self.status = stream, log, echo, status
        self.line, self.lock = "", threading.Lock()

    def write(self, text: str) -> int:
        if self.echo:
            with self.status.beside(text) if self.status else contextlib.nullcontext(), _a_full_disk_survived():
                self.stream.write(text)
                if text.endswith("\n"):
                    self.stream.flush()  # both streams may go to one place, which keeps their order then
        with self.lock:
            *whole, self.line = (self.line + text).split("\n")
            self.line = self.line[self.line.rfind("\r") + 1 :]
            for line in whole:
                _put(self.log, line.rstrip("\r").rpartition("\r")[2].replace("\033[K", "") + "\n")
        return len(text)

    def flush(self) -> None:
        with _a_full_disk_survived():
            self.stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)
