"""Files that this program writes: whole or absent, held by one process at a time, and of one run only."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
import platform
import shutil
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

if TYPE_CHECKING:  # takes seconds, and logs, which need this file, come first
    import torch

PARTIAL = ".partial"  # ends the name of what is not whole yet, or not any more
DTYPE_NAMES = {"torch.float32": "F32", "torch.bfloat16": "BF16", "torch.float16": "F16"}  # as safetensors has them


@contextlib.contextmanager
def writing(what: object, advice: str = "make room, or choose another place") -> Iterator[None]:
    """Names what could not be written: a full disk's own error names no file.

    Raises:
        ValueError: the disk is full or gone, or the place is not ours to write to.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{what} cannot be written ({error}): {advice}") from error


# ------------------------------------------------------------------------------------------------ whole or absent


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Gives a free name beside `path`, for a file, a folder or a link, which gets the name `path` once all of it is on
    the disk. Whoever looks there finds all or what was there before, also after a power failure, and however many
    processes on however many hosts write it at once; in place of an older folder, for a moment, nothing. Who may read
    it, the umask says, also where a library made files of a folder for their owner alone.

    If the writing fails, nothing of it stays; a process that is killed leaves what `remove_leftovers` takes away.

    Raises:
        OSError: the disk is full or gone.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial(path)
    try:
        yield partial
        if not partial.is_symlink():
            for written in (*partial.rglob("*"), partial):
                if partial.is_dir():
                    _open_like(written, partial)
                sync(written)
        if path.is_dir() and not path.is_symlink():
            remove_folder(path)
        partial.rename(path)
    except BaseException:
        _discard(partial)  # a full disk needs the room
        raise
    sync(path.parent)


def remove_folder(path: Path) -> None:
    """Takes the name away first: what has it is whole at every moment."""
    partial = _partial(path)
    path.rename(partial)
    shutil.rmtree(partial)


def remove_leftovers(folder: Path, name: str = "") -> None:
    """Takes away what killed processes left in `folder`, or of what has `name` in its own there. For the one process
    that may write it: others would lose what they are writing."""
    for leftover in folder.glob(f"*{PARTIAL}"):
        if name in leftover.name:
            _discard(leftover)


def sync(path: Path) -> None:
    """Returns once a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_safetensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Writes tensors on the host, contiguous and of `DTYPE_NAMES`, in their order: the same bytes each time, where the
    library writes metadata in random order."""
    ends = itertools.accumulate((tensor.nbytes for tensor in tensors.values()), initial=0)
    header: dict[str, Any] = {"__metadata__": metadata}
    for (name, tensor), span in zip(tensors.items(), itertools.pairwise(ends)):
        header[name] = {"dtype": DTYPE_NAMES[str(tensor.dtype)], "shape": list(tensor.shape), "data_offsets": span}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(memory_of(tensor))


def memory_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the host, to read or to overwrite."""
    import torch

    return tensor.view(torch.uint8).numpy().data.cast("B")


def _open_like(file: Path, folder: Path) -> None:
    """Lets those read a file that only its owner may who may read the folder that we made for it: to ask for the umask
    itself is to set it, for all threads."""
    if file.is_file() and not file.stat().st_mode & 0o077:
        file.chmod(folder.stat().st_mode & 0o666)


def _partial(path: Path) -> Path:
    # Unlike that of any other process, which may be a rank of a killed run that does not know it yet.
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}{PARTIAL}")


def _discard(path: Path) -> None:
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------ one process


@contextlib.contextmanager
def locked(path: Path, taken: Callable[[str], object] = str) -> Iterator[None]:
    """Holds a lock of the operating system, which falls with its holder, however that ends.

    Args:
        path: the lock's file, which names the holder.
        taken: is called with the holder's name where another process has the lock. Unless it raises, that is waited
            for.

    Raises:
        OSError: the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b", buffering=0) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            taken(lock.read().decode().strip() or "another process")
            fcntl.flock(lock, fcntl.LOCK_EX)
        lock.truncate(0)
        with contextlib.suppress(OSError):  # a full disk has no room for a name, and need not be written to
            lock.write(f"process {os.getpid()} on {platform.node()}\n".encode())
        yield


# ------------------------------------------------------------------------------------------------ one run


def differences(before: Any, now: Any, name: str = "", undivided: Collection[str] = ()) -> Iterator[str]:
    """Where two trees of plain values differ, as "a.b: before -> now"; what one of them lacks is None there.

    Args:
        undivided: names of objects that are shown as one value.
    """
    if isinstance(before, dict) and isinstance(now, dict) and name not in undivided:
        for key in before | now:
            yield from differences(before.get(key), now.get(key), f"{name}.{key}" if name else key, undivided)
    elif before != now:
        yield f"{name}: {before!r} -> {now!r}"


def refuse_changed(what: str, changed: Iterable[str], otherwise: str) -> None:
    """Refuses to go on with what was begun as something else.

    Args:
        what: says of what is there that it is of another run.
        changed: the `differences` to that run.
        otherwise: what to do, if not to restore these.

    Raises:
        ValueError: something changed.
    """
    if listed := "; ".join(changed):
        raise ValueError(f"{what}. Changed: {listed}. Restore these, or {otherwise}")
