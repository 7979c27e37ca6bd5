"""Nulls that a file added to make its objects alike, told from nulls that the target wrote itself.

Arrow gives every object of a column the keys of all of them, null where an object has none: in Parquet, and in JSON
written from it. Messages and calls have fields of their own, where null and absent mean the same. What a call's
arguments and a tool's description hold is free JSON, which templates write out with its nulls. There a null is padding
if all objects of its place have the same keys and some have a value under this one. Where the row describes the tool
that is called, this says more: what the tool requires is there, null or not, and what it does not know is padding.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from dflash_dist.data.keys import TOOL_KEYS

FREE_JSON = ("arguments", *TOOL_KEYS)  # under these keys stands whatever the tools ask for
SCHEMA_NULLS = ("default", "const")  # what may be null in a tool's description; nothing else says anything by it
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
        return _Cleaner(self, _tools(row) if self.keys else {}, noted).clean(row, (), False)


@dataclass(frozen=True)
class Tool:
    """What a call of it may have."""

    known: frozenset[str]
    required: frozenset[str]


@dataclass(frozen=True)
class _Cleaner:
    """Leaves the padding out of a row."""

    padding: Padding
    tools: dict[str, Tool]
    noted: Counter[str]

    def clean(self, value: Any, path: Path, free: bool, tool: Tool | None = None) -> Any:
        if isinstance(value, list):
            return [self.clean(item, (*path, ITEM), free) for item in value]
        if not isinstance(value, dict):
            if free and not isinstance(value, str | int | float | None):
                raise ValueError(f"{name(path)} is a {type(value).__name__}, which JSON does not have")
            return value
        if free and self.padding.keys.get(path) is None:
            return value
        called = None if free else self.tools.get(str(value.get("name")))
        made = {}
        for key, item in value.items():
            place = (*path, key)
            if item is not None:
                made[key] = self.clean(item, place, free or key in FREE_JSON, called if key == "arguments" else None)
            elif free and self._is_own(place, tool):
                made[key] = None
        return made

    def _is_own(self, place: Path, tool: Tool | None) -> bool:
        if tool and (place[-1] in tool.required or place[-1] not in tool.known):
            return place[-1] in tool.required
        valued = place in self.padding.valued
        in_schema = "arguments" not in place and place[-1] not in SCHEMA_NULLS
        if not (valued and in_schema):
            because = "left out as padding, since other rows have" if valued else "kept, since no row has"
            self.noted[f"null {because} a value there: {name(place)}"] += 1
        return not valued


def _tools(row: dict[str, Any]) -> dict[str, Tool]:
    """By name, as far as they are described."""
    lists = [_parsed(row.get(key)) for key in TOOL_KEYS]
    found = {}
    for tool in itertools.chain(*(tools for tools in lists if isinstance(tools, list))):
        tool = _object(_parsed(tool))
        function = _object(tool.get("function", tool))
        parameters = _object(function.get("parameters"))
        properties, required = parameters.get("properties"), parameters.get("required")
        if isinstance(properties, dict) and isinstance(function.get("name"), str):
            known = frozenset(key for key, schema in properties.items() if schema is not None)
            names = required if isinstance(required, list) else []
            found[function["name"]] = Tool(known, frozenset(key for key in names if isinstance(key, str)))
    return found


def _parsed(value: Any) -> Any:
    """What text says that is JSON, as some rows have their tools."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            return json.loads(value)
    return value


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


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
