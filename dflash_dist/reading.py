"""Files that this program did not write, or wrote long ago. What is wrong with one becomes a sentence that names it and
says what to do, whoever finds it: we ourselves, or a library in the middle of reading."""

from __future__ import annotations

import contextlib
import json
import math
import types
import typing
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

POINTER = b"version https://git-lfs"
LONGEST = 300  # characters of what a library says


def is_ours(error: BaseException) -> bool:
    """Whether this package raised the error, for a user to read: the message says what to do, a traceback would bury
    it. What a library raises is a bug, and shown whole."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    return frame is not None and frame.tb_frame.f_globals.get("__name__", "").startswith("dflash_dist.")


def in_words(error: BaseException) -> str:
    """What a library says, in one line."""
    text = " ".join(str(error).split())
    text = text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


@contextlib.contextmanager
def reading(what: str, advice: str, files: Callable[[], Iterable[Path]] = tuple) -> Iterator[None]:
    """Turns what a library raises in here into one sentence. Memory that does not suffice says nothing of a file, and
    passes.

    Args:
        what: is read, by its name.
        advice: what to do if it cannot be read.
        files: those that may be the cause, asked for after an error: the first damaged one is named.

    Raises:
        ValueError: instead of any error of a library.
    """
    try:
        yield
    except Exception as error:
        if _is_out_of_memory(error) or (isinstance(error, ValueError) and is_ours(error)):
            raise
        if isinstance(error, ImportError):
            raise ValueError(f"{what} needs a package that is missing here ({in_words(error)}): install it") from error
        for file in files():
            if fault := damage(file):
                raise ValueError(f"{file} {fault}: {advice}") from error
        raise ValueError(f"{what} cannot be read ({in_words(error)}): {advice}") from error


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"  # torch's: not imported here


def parse(content: bytes | str) -> Any:
    """What JSON says; a ValueError if it is none, or nested too deeply for Python."""
    try:
        return json.loads(content)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def damage(file: Path) -> str | None:
    """What is wrong with a file, told without reading weights; None where nothing is."""
    try:
        with file.open("rb") as content:
            begin = content.read(len(POINTER))
        if not begin:
            return "is empty"
        if begin == POINTER:
            return "is a Git LFS pointer and not the file itself (`git lfs pull` fetches it)"
        if file.suffix == ".json":
            parse(file.read_bytes())
        elif file.suffix == ".safetensors":
            with safe_open(file, "pt"):  # compares its header with its size
                pass
        elif begin.startswith(b"PK") and not zipfile.is_zipfile(file):
            return "is cut: its end is missing"
    except FileNotFoundError:
        return "is not there"
    except OSError as error:
        return f"cannot be read ({error.strerror or in_words(error)})"
    except ValueError as error:
        return f"is not JSON ({in_words(error)})"
    except SafetensorError as error:
        return f"is cut or damaged ({in_words(error)})"
    return None


def read_object(file: Path, advice: str) -> dict[str, Any]:
    """The JSON object that a file holds; a ValueError if it holds none."""
    try:
        content = parse(file.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} {damage(file) or in_words(error)}: {advice}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds no JSON object: {advice}")
    return content


def read_shards(index: Path, advice: str) -> dict[str, str]:
    """Which file holds which tensor, as the index of a sharded checkpoint says; a ValueError if it is none."""
    content = read_object(index, advice)
    check_fields(content, {"weight_map": dict[str, str]}, str(index), advice)
    return content["weight_map"]


def check_fields(content: dict[str, Any], kinds: dict[str, Any], where: str, advice: str) -> None:
    """Refuses an object whose fields are not of their kinds.

    Args:
        content: from JSON.
        kinds: types by key. A key may be missing where its type has None.

    Raises:
        ValueError: naming the key, its value and its kind.
    """
    for key, kind in kinds.items():
        if key not in content and not is_kind(None, kind):
            raise ValueError(f"{where} has no key {key!r}: {advice}")
        if not is_kind(content.get(key), kind):
            name = kind.__name__ if isinstance(kind, type) and not typing.get_args(kind) else kind
            raise ValueError(f"{key} in {where} is {shown(content[key])}, which is no {name}: {advice}")


def shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def is_kind(value: Any, kind: Any) -> bool:
    """Whether a value from JSON is of a type. Numbers must be finite and whole ones fit into 64 bits: Python's JSON
    knows others, which nothing that they are handed to does."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return any(is_kind(value, one) for one in args)
    if origin is list:
        return isinstance(value, list) and all(is_kind(item, args[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(is_kind(item, args[1]) for item in value.values())
    if kind in (None, types.NoneType):
        return value is None
    if kind is float:
        return is_kind(value, int) or (isinstance(value, float) and math.isfinite(value))
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63
    return kind is Any or isinstance(value, kind)
