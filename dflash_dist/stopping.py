"""Signals that ask a process to stop."""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

ONE_REQUEST = 3.0  # [s] within which several signals are one request to stop


@contextlib.contextmanager
def asked_to_stop(numbers: tuple[int, ...], stop: Callable[[], None]) -> Iterator[None]:
    """While it lasts, the first of these signals calls `stop`; a second one ends the process at once. Slurm signals
    every process and torchrun passes the same signal on, so what comes at almost the same time is not a second one."""
    asked = math.inf

    def ask(number: int, _frame: object) -> None:
        nonlocal asked
        if time.monotonic() - asked > ONE_REQUEST:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        if asked == math.inf:
            asked = time.monotonic()
            stop()

    before: dict[int, Any] = {number: signal.signal(number, ask) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
