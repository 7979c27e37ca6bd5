"""Nulls that a file added to make its objects alike, told from nulls that the target wrote itself.

Arrow gives every object of a column the keys of all of them, null where an object has none: in Parquet, and in JSON
written from it. Messages and calls have fields of their own, where null and absent mean the same. What a call's
arguments and a tool's description hold is free JSON, which templates write out with its nulls. There a null is padding
if all objects of its place have the same keys and some have a value under this one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

FREE_JSON = ("arguments", "tools", "functions")  # under these keys stands whatever the tools ask for
ITEM = "[]"  # step from a list to what it holds

Path = tuple[str, ...]  # from a row down to a value


@dataclass
class Padding:
    """What all rows of a source tell of the objects in their free JSON, by place. What was added in whatever order and
    parts, it says the same."""

    keys: dict[Path, frozenset[str] | None] = field(default_factory=dict)  # of every object; None: they differ
    valued: set[Path] = field(default_factory=set)  # places where some object has a value

    @staticmethod
    def of_schema(schema: pa.Schema) -> Padding:
        """Structs are padded by nature; what never had a value has a type of its own."""
        padding = Padding()
        for column in schema:
            padding._add_type((column.name,), column.type, column.name in FREE_JSON)
        return padding

    def _add_type(self, path: Path, kind: pa.DataType, free: bool) -> None:
        if free and not pa.types.is_null(kind):
            self.valued.add(path)
        if pa.types.is_struct(kind):
            if free:
                self.keys[path] = frozenset(child.name for child in kind)
            for child in kind:
                self._add_type((*path, child.name), child.type, free or child.name in FREE_JSON)
        elif is_list(kind):
            self._add_type((*path, ITEM), kind.value_type, free)

    def add_row(self, row: Any) -> None:
        """A row as its JSON has it."""
        for path, value in _free_json(row, ()):
            self._add(path, value)

    def _add(self, path: Path, value: Any) -> None:
        if value is None:
            return
        self.valued.add(path)
        if isinstance(value, list):
            for item in value:
                self._add((*path, ITEM), item)
        elif isinstance(value, dict):
            keys = self.keys.setdefault(path, frozenset(value))
            if keys is None or keys != value.keys():
                self.keys[path] = None  # nothing in here was padded, so nobody asks what lies deeper
                return
            for key, item in value.items():
                self._add((*path, key), item)

    def add_all(self, others: Iterable[Padding]) -> Padding:
        """This, with what others say of further rows."""
        for other in others:
            for path, keys in other.keys.items():
                self.keys[path] = keys if self.keys.setdefault(path, keys) == keys else None
            self.valued |= other.valued
        return self

    def without(self, row: dict[str, Any], noted: Counter[str]) -> dict[str, Any]:
        """The row without its padding, nor other nulls outside of free JSON, where they say nothing.

        Args:
            noted: counts what nobody can know for sure, by what was assumed.

        Raises:
            ValueError: the free JSON holds something that JSON does not have.
        """
        return self._without(row, (), False, noted)

    def _without(self, value: Any, path: Path, free: bool, noted: Counter[str]) -> Any:
        if isinstance(value, list):
            return [self._without(item, (*path, ITEM), free, noted) for item in value]
        if not isinstance(value, dict):
            if free and not isinstance(value, str | int | float | None):
                raise ValueError(f"{name(path)} is a {type(value).__name__}, which JSON does not have")
            return value
        if free and self.keys.get(path) is None:
            return value
        made = {}
        for key, item in value.items():
            place = (*path, key)
            if item is not None:
                made[key] = self._without(item, place, free or key in FREE_JSON, noted)
            elif free and place in self.valued:
                noted[f"null left out as padding, since other rows have a value there: {name(place)}"] += 1
            elif free:
                noted[f"null kept, since no row has a value there: {name(place)}"] += 1
                made[key] = None
        return made


def name(path: Path) -> str:
    """A path as one writes it."""
    return ".".join(path).replace("." + ITEM, ITEM)


def is_list(kind: pa.DataType) -> bool:
    """Whether values of this Arrow type are lists."""
    types = pa.types
    return (
        types.is_list(kind)
        or types.is_large_list(kind)
        or types.is_fixed_size_list(kind)
        or types.is_list_view(kind)
        or types.is_large_list_view(kind)
    )


def _free_json(value: Any, path: Path) -> Iterator[tuple[Path, Any]]:
    if isinstance(value, list):
        for item in value:
            yield from _free_json(item, (*path, ITEM))
    elif isinstance(value, dict):
        for key, item in value.items():
            if key in FREE_JSON:
                yield (*path, key), item
            else:
                yield from _free_json(item, (*path, key))
