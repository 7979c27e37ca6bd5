"""Dataclasses from a YAML file and `a.b=c` overrides: each value as it was typed, or refused in one sentence.

YAML 1.1 takes 0012345 for 5349 (octal), 1:30 for 90 and `no` for false, whatever was meant, and forgets the first of
two equal keys. So scalars stay text here until the type of their field says what they are.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import re
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

T = TypeVar("T")

NOTHING = ("", "~", "null", "Null", "NULL")
TRUTHS = dict.fromkeys(("true", "yes", "on"), True) | dict.fromkeys(("false", "no", "off"), False)
WHOLE, BROKEN = re.compile(r"-?(0|[1-9]\d{0,17})"), re.compile(r"-?(0|[1-9]\d*)\.\d+([eE][+-]?\d+)?")
NOT_FINITE = re.compile(r"[+-]?\.?(inf|nan)", re.IGNORECASE)
LARGEST = 2**63 - 1  # an int64's, as which it is used in the end
RESOLVER = yaml.resolver.Resolver()  # knows which tag YAML gives to a value that states none


@dataclass(frozen=True)
class Scalar:
    """A single value as typed."""

    text: str
    plain: bool  # not quoted, so that null may mean none and 3 a number

    @property
    def is_nothing(self) -> bool:
        return self.plain and self.text in NOTHING

    def __str__(self) -> str:
        return "nothing" if self.is_nothing else repr(self.text)


def read_dataclass(cls: type[T], path: Path, overrides: Sequence[str] = ()) -> T:
    """Reads the fields of `cls`, whose sections are dataclasses themselves.

    Text fields with `path` in their metadata may begin with `~`.

    Raises:
        ValueError: naming file and key, and what to write instead.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not valid YAML: it is no text in UTF-8 ({error.reason})") from error
    tree = _read(text, f"{path} is not valid YAML", str(path))
    if tree is None or (isinstance(tree, Scalar) and tree.is_nothing):
        tree = {}
    if not isinstance(tree, dict):
        raise ValueError(f"{path}: expected sections such as 'target:', found {_shown(tree)}")
    for override in overrides:
        _put(cls, tree, override)
    return _build(cls, cls, tree, str(path))


def knobs(cls: type) -> dict[str, dataclasses.Field[Any]]:
    """All fields by dotted name, those of the sections in place of these."""
    hints = typing.get_type_hints(cls)
    found: dict[str, dataclasses.Field[Any]] = {}
    for top in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[top.name]):
            section = typing.cast(type, hints[top.name])
            found |= {f"{top.name}.{name}": field for name, field in knobs(section).items()}
        else:
            found[top.name] = top
    return found


# ---------------------------------------------------------------------------------------------------- text -> tree


def _read(text: str, what: str, where: str) -> Any:
    """Dicts, lists and scalars; None for a text without content.

    Args:
        what: what is wrong where the text is no YAML.
        where: names the place where it is YAML, but not to be used.
    """
    try:
        node = yaml.compose(text, yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise ValueError(f"{what}: {error.problem}" + (f", in line {mark.line + 1}" if mark else "")) from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{what}: {' '.join(str(error).split())}") from error
    return None if node is None else _plain(node, where)


def _plain(node: yaml.Node, where: str, above: tuple[yaml.Node, ...] = ()) -> Any:
    line = node.start_mark.line + 1
    if any(node is other for other in above):
        raise ValueError(f"{where}, line {line}: an alias stands inside of what it names")
    plain = isinstance(node, yaml.ScalarNode) and node.style is None
    implied = RESOLVER.resolve(type(node), node.value, (plain, True))
    if node.tag not in (implied, "tag:yaml.org,2002:str"):
        raise ValueError(f"{where}, line {line}: tags such as {node.tag} are not read: write the value alone")
    if isinstance(node, yaml.ScalarNode):
        return Scalar(node.value, plain and node.tag == implied)
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item, where, (*above, node)) for item in node.value]
    found: dict[str, Any] = {}
    lines: dict[str, int] = {}
    merged: dict[str, Any] = {}
    for key, value in node.value:
        at = key.start_mark.line + 1
        content = _plain(value, where, (*above, node))
        if key.tag == "tag:yaml.org,2002:merge":
            for other in content if isinstance(content, list) else [content]:
                if not isinstance(other, dict):
                    raise ValueError(f"{where}, line {at}: << takes a mapping, found {_shown(other)}")
                merged = other | merged
            continue
        if not isinstance(key, yaml.ScalarNode):
            raise ValueError(f"{where}, line {at}: a key is a name, not a list or a mapping")
        if key.value in found:
            raise ValueError(
                f"{where}: the key {key.value!r} stands twice, in lines {lines[key.value]} and {at}: leave one"
            )
        found[key.value], lines[key.value] = content, at
    return merged | found


def _put(cls: type, tree: dict[str, Any], override: str) -> None:
    """Sets what `a.b=c` says."""
    dotted, equals, text = override.partition("=")
    if not equals:
        raise ValueError(f"override {override!r} is not of the form section.name=value")
    *sections, name = dotted.split(".")
    for section in sections:
        below = tree.get(section)
        if below is None or (isinstance(below, Scalar) and below.is_nothing):
            below = tree[section] = {}
        if not isinstance(below, dict):
            raise ValueError(f"override {dotted!r}: {section!r} is a value, not a section")
        tree = below
    hint = typing.get_type_hints(cls).get(dotted)
    if dataclasses.is_dataclass(hint):
        one = dataclasses.fields(hint)[0].name
        raise ValueError(f"override {override!r}: {dotted} is a section: set its keys, such as {dotted}.{one}=...")
    tree[name] = _read_override(override, text, _hint_of(cls, dotted.split(".")))


def _hint_of(cls: type, names: list[str]) -> Any:
    """The type of a field by its dotted name; Any where there is none."""
    hint = typing.get_type_hints(cls).get(names[0], Any)
    return _hint_of(typing.cast(type, hint), names[1:]) if names[1:] and dataclasses.is_dataclass(hint) else hint


def _read_override(override: str, text: str, hint: Any) -> Any:
    """The value of an override. Where text is meant, it needs no quotes, whatever is in it."""
    kinds = _kinds(hint)
    may_be_mapping = any(typing.get_origin(kind) is dict for kind in kinds)
    if kinds[0] is str or typing.get_origin(kinds[0]) is Literal:
        quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
        if not quoted and not (may_be_mapping and text.startswith("{")):
            return Scalar(text, plain=True)
    found = _read(text, f"override {override!r}: the value is not valid YAML", f"override {override!r}")
    if found is None or isinstance(found, Scalar):
        # YAML takes what follows ` #` for a comment.
        return found if found and not (found.plain and "#" in text) else Scalar(text.strip(), plain=True)
    return found


# ---------------------------------------------------------------------------------------------------- tree -> fields


def _build(cls: type[T], root: type, tree: dict[str, Any], where: str, section: str = "") -> T:
    hints = typing.get_type_hints(cls)
    values = {}
    for key, value in tree.items():
        dotted = f"{section}.{key}" if section else key
        if key not in hints:
            raise ValueError(f"{where}: unknown key {dotted!r}{_nearest(root, section, key)}")
        hint = hints[key]
        if not dataclasses.is_dataclass(hint):
            metadata = cls.__dataclass_fields__[key].metadata  # type: ignore[attr-defined]
            typed = _typed(hint, value, f"{where}: {dotted}")
            values[key] = _at_home(typed, f"{where}: {dotted}") if metadata.get("path") else typed
            continue
        if isinstance(value, Scalar) and value.is_nothing:
            value = {}
        if not isinstance(value, dict):
            raise ValueError(f"{where}: {dotted} is a section, found {_shown(value)}")
        values[key] = _build(typing.cast(type, hint), root, value, where, dotted)
    return cls(**values)


def _nearest(root: type, section: str, key: str) -> str:
    """What may be meant by an unknown key: a name that exists, written as it would have to be."""
    known = list(knobs(root))
    inner, dot, leaf = key.rpartition(".")
    if dot and key in known:
        return f": in a file, {leaf!r} stands below {inner + ':'!r}"
    section, key = section or inner, leaf
    sections = {name: name for name in (name.split(".")[0] for name in known)}
    leaves = {name: name.rpartition(".")[2] for name in known}
    below = {name: leaf for name, leaf in leaves.items() if name.rpartition(".")[0] == section}
    if not section:
        below = {}
    here = below or sections

    def close(among: dict[str, str]) -> list[str]:
        found = difflib.get_close_matches(key.lower(), list(among.values()), n=1, cutoff=0.6)
        return [name for name, leaf in among.items() if leaf in found]

    same = [name for name, leaf in leaves.items() if leaf == key.lower()]
    if meant := same or close(here) or close(leaves):
        return f"; did you mean {' or '.join(map(repr, meant))}?"
    return f"; {section} has {', '.join(below.values())}" if below else f"; sections are {', '.join(sorted(sections))}"


def _kinds(hint: Any) -> list[Any]:
    """The types that a union names, without None."""
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return [kind for kind in typing.get_args(hint) if kind is not type(None)] if is_union else [hint]


def _typed(hint: Any, value: Any, where: str) -> Any:
    """A value of the tree as the type says."""
    if type(None) in typing.get_args(hint) and isinstance(value, Scalar) and value.is_nothing:
        return None
    kinds = _kinds(hint)
    hint = next((kind for kind in kinds if typing.get_origin(kind) is type(value)), kinds[0])
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return _free(value, where)
    if origin is list:
        if not isinstance(value, list):
            raise ValueError(f"{where} must be a list, such as [1, 2], found {_shown(value)}")
        return [_typed(args[0], item, where) for item in value]
    if origin is dict:
        if not isinstance(value, dict):
            raise ValueError(f"{where} must be a mapping, such as {{name: value}}, found {_shown(value)}")
        return {key: _typed(args[1], item, f"{where}.{key}") for key, item in value.items()}
    if origin is Literal:
        if not isinstance(value, Scalar) or value.text not in args:
            raise ValueError(f"{where} must be one of {', '.join(map(repr, args))}, found {_shown(value)}")
        return value.text
    if isinstance(value, Scalar) and not value.is_nothing:
        if hint is str:
            return value.text
        if hint is bool and value.plain and value.text.lower() in TRUTHS:
            return TRUTHS[value.text.lower()]
        if hint in (int, float) and (number := _number(value.text)) is not None:
            if not number.is_finite() or math.isinf(float(number)):
                raise ValueError(f"{where} must be finite, found {value}")
            if hint is float:
                return float(number)
            if number == number.to_integral_value():
                if abs(number) > LARGEST:
                    raise ValueError(f"{where} must be at most {LARGEST}, found {value}")
                return int(number)
    raise ValueError(f"{where} must be of type {hint.__name__}, found {_shown(value)}")


def _number(text: str) -> Decimal | None:
    """Exactly, where a float would round."""
    try:
        return Decimal(re.sub(r"^([+-]?)\.(?=[in])", r"\1", text, flags=re.IGNORECASE))  # .inf and .nan are YAML's
    except InvalidOperation:
        return None


def _free(value: Any, where: str) -> Any:
    """A value whose type nobody states: JSON's types where it is written as JSON would, text otherwise.

    Raises:
        ValueError: YAML has meant two things by it.
    """
    if isinstance(value, list):
        return [_free(item, where) for item in value]
    if isinstance(value, dict):
        return {key: _free(item, f"{where}.{key}") for key, item in value.items()}
    if not value.plain:
        return value.text
    if value.is_nothing:
        return None
    if value.text.lower() in TRUTHS:
        if value.text.lower() not in ("true", "false"):
            raise ValueError(f"{where}: {value.text} may be a word or a truth: write true or false, or '{value.text}'")
        return TRUTHS[value.text.lower()]
    if WHOLE.fullmatch(value.text):
        return int(value.text)
    if NOT_FINITE.fullmatch(value.text) or (BROKEN.fullmatch(value.text) and math.isinf(float(value.text))):
        raise ValueError(f"{where} must be finite, found {value}: quote it if it is a word")
    return float(value.text) if BROKEN.fullmatch(value.text) else value.text


def _at_home(value: Any, where: str) -> Any:
    """A path, or the keys of a mapping, with `~` expanded."""
    if isinstance(value, dict):
        return {_at_home(path, where): item for path, item in value.items()}
    if isinstance(value, str) and value.startswith("~"):
        expanded = os.path.expanduser(value)
        if expanded.startswith("~"):
            raise ValueError(f"{where}: {value!r} names no user's home; a folder of that name is ./{value}")
        return expanded
    return value


def _shown(value: Any) -> str:
    return "a mapping" if isinstance(value, dict) else "a list" if isinstance(value, list) else str(value)
