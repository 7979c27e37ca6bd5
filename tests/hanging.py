"""One rank of tests/test_watchdog.py: `python -m tests.hanging FOLDER stuck|waiting`. A module of its own, because what
the tests import takes longer than they do."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from typing import Any

from dflash_dist.logs import LOGS, keep_logs
from dflash_dist.ranks import join_world


class Stuck:
    def __len__(self) -> Any:
        threading.Event().wait()


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    with keep_logs(folder), join_world(3.0, folder / LOGS) as world, world.expects_progress():
        print("ready", flush=True)
        while True:
            world.sum_numbers(1, 2)
            if sys.argv[2] == "stuck" and world.rank == 1:
                world.share(Stuck())  # type: ignore[arg-type]
