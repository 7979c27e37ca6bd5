"""Files that this program writes: what survives a power failure, and what a disk refuses."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError


def sync(path: Path) -> None:
    """Returns once a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Names what could not be written: a full disk's own error names no file.

    Raises:
        ValueError: the disk is full or gone, or the place is not ours to write to.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be written ({error}): make room, or choose another place") from error
