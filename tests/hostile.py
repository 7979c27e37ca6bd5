"""Files as a bad disk, a broken download or a careless editor leaves them, made by hypothesis; and what may come of
them: a sentence of ours that names the place, or nothing."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from dflash_dist.reading import is_ours

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 12345\n"
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 3),
    st.sampled_from([10**30, -(10**30), 2**31, 0.5, -1.0, 1e300, float("nan"), float("inf")]),
    st.sampled_from(["", "x", "64", "full_attention", "float32", "\ud800"]),
)
ODD = st.one_of(SCALARS, st.lists(SCALARS, max_size=2), st.dictionaries(st.sampled_from("ab"), SCALARS, max_size=2))
GONE = object()
Damage = Callable[[Path], None]


def places(tree: Any) -> Iterator[tuple[Any, ...]]:
    """The path of every value in a JSON tree, its root included; of a list only the first."""
    yield ()
    items = tree.items() if isinstance(tree, dict) else list(enumerate(tree))[:1] if isinstance(tree, list) else ()
    for key, value in items:
        yield from ((key, *rest) for rest in places(value))


def put(tree: Any, place: tuple[Any, ...], value: Any) -> Any:
    """The tree with another value at a place, or without it."""
    if not place:
        return {} if value is GONE else value
    tree = copy.deepcopy(tree)
    inner = tree
    for key in place[:-1]:
        inner = inner[key]
    if value is GONE:
        del inner[place[-1]]
    else:
        inner[place[-1]] = value
    return tree


def changed(tree: Any) -> st.SearchStrategy[Any]:
    """The tree with one value replaced by another kind, or taken out."""
    return st.builds(put, st.just(tree), st.sampled_from(list(places(tree))), st.one_of(st.just(GONE), ODD))


def damaged(content: bytes) -> st.SearchStrategy[bytes | None]:
    """A file's content cut, emptied, flipped or replaced; None where it is gone."""
    size = len(content)
    cut = st.integers(0, max(size - 1, 0)).map(lambda at: content[:at])
    flipped = st.tuples(st.integers(0, max(size - 1, 0)), st.integers(1, 255)).map(
        lambda flip: content[: flip[0]] + bytes([content[flip[0]] ^ flip[1]]) + content[flip[0] + 1 :]
    )
    others = st.sampled_from([None, b"", POINTER, b"[]", b"{}", b"5", b"null", b"\xff\xfe", b"[" * 100_000])
    return st.one_of(cut, flipped, others, st.binary(max_size=20), st.just(content + b"more"))


def write(file: Path, content: bytes | None) -> None:
    if content is None:
        file.unlink()
    else:
        file.unlink(missing_ok=True)  # it may be a link to the whole one
        file.write_bytes(content)


def as_json(tree: Any) -> bytes:
    return json.dumps(tree).encode()


def copied(folder: Path, to: Path) -> Path:
    """The folder again, afresh: its files are links until they are written."""
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(folder, to, copy_function=lambda file, new: Path(new).hardlink_to(file))
    return to


def refused(action: Callable[[], object], names: str | Path) -> bool:
    """Whether the action ends with a sentence of ours that names a place; any other error is a failure."""
    try:
        action()
    except ValueError as error:
        assert is_ours(error), f"not raised by us: {error!r}"
        assert str(names) in str(error) and "\n" not in str(error), error
        return True
    return False
