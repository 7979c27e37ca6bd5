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
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pyarrow as pa

from dflash_dist.data.keys import TOOL_KEYS

FREE_JSON = ("arguments", *TOOL_KEYS)  # under these keys stands whatever the tools ask for
SCHEMA_NULLS = ("default", "const")  # what may be null in a tool's description; nothing else says anything by it
ITEM = "[]"  # step from a list to what it holds

Path = tuple[str, ...]  # from a row down to a value


class Tool(NamedTuple):
    """The keys of its calls' arguments."""

    known: set[str]
    required: set[str]


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
        padding.add_row({column.name: _of_type(column.type) for column in schema})
        return padding

    def add_row(self, value: Any, path: Path = (), free: bool = False) -> None:
        """A row as its JSON has it, or a value in it."""
        if free and value is not None:
            self.valued.add(path)
        if isinstance(value, list):
            for item in value:
                self.add_row(item, (*path, ITEM), free)
        elif isinstance(value, dict):
            if free:
                keys = self.keys.setdefault(path, frozenset(value))
                if keys is None or keys != value.keys():
                    self.keys[path] = None  # nothing in here was padded, so nobody asks what lies deeper
                    return
            for key, item in value.items():
                self.add_row(item, (*path, key), free or key in FREE_JSON)

    def add_all(self, others: Iterable[Padding]) -> None:
        """What others say of further rows."""
        for other in others:
            for path, keys in other.keys.items():
                self.keys[path] = keys if self.keys.setdefault(path, keys) == keys else None
            self.valued |= other.valued

    def without(self, row: dict[str, Any], noted: Counter[str]) -> dict[str, Any]:
        """The row without its padding, nor other nulls outside of free JSON, where they say nothing.

        Args:
            noted: counts what nobody can know for sure, by what was assumed.

        Raises:
            ValueError: the free JSON holds something that JSON does not have.
        """
        tools = _tools(row) if self.keys else {}

        def clean(value: Any, path: Path, free: bool, tool: Tool | None = None) -> Any:
            if isinstance(value, list):
                return [clean(item, (*path, ITEM), free) for item in value]
            if not isinstance(value, dict):
                if free and not isinstance(value, str | int | float | None):
                    raise ValueError(f"{_name(path)} is a {type(value).__name__}, which JSON does not have")
                return value
            if free and self.keys.get(path) is None:
                return value
            called = None if free else tools.get(str(value.get("name")))
            made = {}
            for key, item in value.items():
                place = (*path, key)
                if item is not None:
                    made[key] = clean(item, place, free or key in FREE_JSON, called if key == "arguments" else None)
                elif free and self._is_own(place, tool, noted):
                    made[key] = None
            return made

        return clean(row, (), False)

    def _is_own(self, place: Path, tool: Tool | None, noted: Counter[str]) -> bool:
        """Whether the target wrote the null at a place of an object all of whose kind have the same keys."""
        if tool and (place[-1] in tool.required or place[-1] not in tool.known):
            return place[-1] in tool.required
        valued = place in self.valued
        in_schema = "arguments" not in place and place[-1] not in SCHEMA_NULLS
        if not (valued and in_schema):
            because = "left out as padding, since other rows have" if valued else "kept, since no row has"
            noted[f"null {because} a value there: {_name(place)}"] += 1
        return not valued


def _of_type(kind: pa.DataType) -> Any:
    """A value with all that a value of this Arrow type has."""
    if pa.types.is_struct(kind):
        return {child.name: _of_type(child.type) for child in kind}
    if is_list(kind):
        return [_of_type(kind.value_type)]
    return None if pa.types.is_null(kind) else True


def is_list(kind: pa.DataType) -> bool:
    """Whether values of this Arrow type are lists, of whatever layout."""
    return hasattr(kind, "value_field")


def _tools(row: dict[str, Any]) -> dict[str, Tool]:
    """By name, as far as they are described."""
    lists = [tools for key in TOOL_KEYS if isinstance(tools := _parsed(row.get(key)), list)]
    found = {}
    for tool in itertools.chain(*lists):
        tool = _object(_parsed(tool))
        function = _object(tool.get("function", tool))
        parameters = _object(function.get("parameters"))
        properties, required = parameters.get("properties"), parameters.get("required")
        if isinstance(properties, dict) and isinstance(function.get("name"), str):
            known = {key for key, schema in properties.items() if schema is not None}
            names = required if isinstance(required, list) else []
            found[function["name"]] = Tool(known, {key for key in names if isinstance(key, str)})
    return found


def _parsed(value: Any) -> Any:
    """What text says that is JSON, as some rows have their tools."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            return json.loads(value)
    return value


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _name(path: Path) -> str:
    """A path as one writes it."""
    return ".".join(path).replace("." + ITEM, ITEM)
