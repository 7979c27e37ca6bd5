"""Other processes that work through the chunks of a source."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from typing import TypeVar

from dflash_dist.data.chat import ChatEncoder
from dflash_dist.data.sources import Chunk

T = TypeVar("T")


class Workers:
    """Processes that start once there is enough to do for them.

    Args:
        count: of processes; with 1 there are none beside this one.
        alone: so many chunks are not worth them.
    """

    def __init__(self, encoder: ChatEncoder, count: int, alone: int):
        self.encoder, self.count, self.alone = encoder, count, alone
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool:
            self._pool.shutdown(cancel_futures=True)

    def map(self, function: Callable[[ChatEncoder, Chunk], T], chunks: Iterator[Chunk]) -> Iterator[T]:
        """What the function says of each chunk, in their order."""
        head = list(itertools.islice(chunks, self.alone + 1))
        chunks = itertools.chain(head, chunks)
        if self.count == 1 or (self._pool is None and len(head) <= self.alone):
            yield from (function(self.encoder, chunk) for chunk in chunks)
            return
        if self._pool is None:
            spawn = multiprocessing.get_context("spawn")  # a fork would copy a process full of threads
            self._pool = ProcessPoolExecutor(self.count, spawn, _start_worker, (self.encoder,))
            before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # what starts now never hears of a Ctrl-C
            for _ in range(self.count):
                self._pool.submit(os.getpid)  # starts one
            signal.signal(signal.SIGINT, before)
        waiting: deque[Future[T]] = deque()
        for chunk in chunks:
            waiting.append(self._pool.submit(_in_worker, function, chunk))
            if len(waiting) > 4 * self.count:  # enough to keep all busy, and no more of the file in memory
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


_encoder: ChatEncoder


def _start_worker(encoder: ChatEncoder) -> None:
    global _encoder
    _encoder = encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is a process on every core already
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    # A pool's workers would wait for work forever if their parent was killed.
    threading.Thread(target=end_with_parent, daemon=True).start()


def _in_worker(function: Callable[[ChatEncoder, Chunk], T], chunk: Chunk) -> T:
    return function(_encoder, chunk)
