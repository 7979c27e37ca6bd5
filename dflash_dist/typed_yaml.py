"""Pydantic dataclasses from a YAML file and `a.b=c` overrides: each value as it was typed, or refused in one sentence.

YAML 1.1 takes 0012345 for 5349 (octal), 1:30 for 90 and `no` for false, whatever was meant, and forgets the first of
two equal keys. So scalars stay text here until the type of their field says what they are.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import re
import typing
from collections.abc import Collection, Mapping, Sequence
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError, ValidationInfo, field_validator
from pydantic.dataclasses import dataclass

T = TypeVar("T")

NOTHING = ("", "~", "null", "Null", "NULL")
TRUTHS = dict.fromkeys(("true", "yes", "on"), True) | dict.fromkeys(("false", "no", "off"), False)
WHOLE, BROKEN = re.compile(r"-?(0|[1-9]\d{0,17})"), re.compile(r"-?(0|[1-9]\d*)\.\d+([eE][+-]?\d+)?")
LARGEST = 2**63 - 1  # an int64's, as which it is used in the end
NOT_FINITE = re.compile(r"[+-]?\.?(inf|nan)", re.IGNORECASE)


@dataclass(config={"extra": "forbid", "allow_inf_nan": False})
class Section:
    """Fields that are read as they were typed. Text with `path` in its metadata may begin with `~`."""

    @field_validator("*", mode="before")
    @classmethod
    def _read(cls, value: Any, info: ValidationInfo) -> Any:
        field = cls.__dataclass_fields__[str(info.field_name)]
        if dataclasses.is_dataclass(field.type):
            return {} if value is None else value
        return _at_home(value) if field.metadata.get("path") else _as_meant(value, _kind(field.type))


def read(
    cls: type[T],
    path: Path,
    overrides: Sequence[str] = (),
    unknown: list[str] | None = None,
    synonyms: Mapping[str, str] | None = None,
) -> T:
    """Reads a dataclass whose sections are dataclasses too.

    Args:
        unknown: takes the names of keys that are no field, which are left out; without it they are refused.
        synonyms: to what others call a field, without its section: its dotted name, or a sentence.

    Raises:
        ValueError: naming file or override and key, and what to write instead.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not valid YAML: it is no text in UTF-8 ({error.reason})") from error
    tree, known = _parse(text, str(path)), knobs(cls)
    if not isinstance(tree, dict | None):
        raise ValueError(f"{path}: expected sections such as 'target:', found {_shown(tree)}")
    for override in overrides:
        tree = _overridden(tree or {}, override, known)
    if unknown is not None:
        tree = _known_part(tree or {}, known, unknown)
    try:
        return TypeAdapter(cls).validate_python(tree or {})
    except ValidationError as error:
        names = {override.partition("=")[0]: override for override in overrides}
        lines = []
        for key, told in _in_words(error, tree, known, synonyms or {}).items():
            by = next((name for name in names if f"{key}.".startswith(f"{name}.") or name.startswith(f"{key}.")), None)
            lines.append(f"{f'override {names[by]!r}' if by else path}: {told}")
        raise ValueError("\n".join(lines)) from error


def knobs(cls: type) -> dict[str, dataclasses.Field[Any]]:
    """All fields by dotted name, those of the sections in place of these."""
    found: dict[str, dataclasses.Field[Any]] = {}
    for top in dataclasses.fields(cls):
        if dataclasses.is_dataclass(top.type):
            found |= {f"{top.name}.{name}": field for name, field in knobs(typing.cast(type, top.type)).items()}
        else:
            found[top.name] = top
    return found


def _known_part(tree: dict[str, Any], known: Collection[str], unknown: list[str], section: str = "") -> dict[str, Any]:
    """The keys that are fields; the names of the others are added to `unknown`."""
    kept = {}
    for key, value in tree.items():
        name = section + key
        is_section = any(one.startswith(f"{name}.") for one in known)
        if not is_section and name not in known:
            unknown.append(name)
        else:
            kept[key] = (
                _known_part(value, known, unknown, f"{name}.") if is_section and isinstance(value, dict) else value
            )
    return kept


# ---------------------------------------------------------------------------------------------------- text -> tree


class Plain(str):
    """A scalar that was not quoted: it may mean a number or a truth."""


class _Loader(yaml.SafeLoader):
    """Scalars are `Plain`, None or, if quoted, text; what a reader might take for something else is an error."""

    def resolve(self, kind: Any, value: Any, implicit: Any) -> str:
        if kind is yaml.ScalarNode and implicit[0]:
            return MERGE if value == "<<" else PLAIN
        return super().resolve(kind, value, (False, True))

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                _refuse("a key is a name, not a list or a mapping", key)
            if key.value in lines and key.tag != MERGE:
                _refuse(f"the key {key.value!r} stands twice, first in line {lines[key.value]}: leave one", key)
            lines[key.value] = key.start_mark.line + 1
        return node

    def mapping(self, node: Any) -> dict[str, Any]:
        self.flatten_mapping(node)  # merges what << names
        return {key.value: self.construct_object(value, deep=True) for key, value in node.value}

    def unknown(self, node: Any) -> Any:
        _refuse(f"tags such as {node.tag} are not read: write the value alone", node)


PLAIN, MERGE = "plain", "tag:yaml.org,2002:merge"
_Loader.yaml_constructors = {
    PLAIN: lambda loader, node: _as_typed(node.value),
    MERGE: lambda loader, node: Plain(node.value),  # where it is a value
    "tag:yaml.org,2002:str": _Loader.construct_scalar,
    "tag:yaml.org,2002:seq": lambda loader, node: loader.construct_sequence(node, deep=True),
    "tag:yaml.org,2002:map": _Loader.mapping,
    None: _Loader.unknown,
}


def _refuse(problem: str, node: yaml.Node) -> typing.NoReturn:
    raise yaml.constructor.ConstructorError(problem=problem, problem_mark=node.start_mark)


def _as_typed(text: str) -> Plain | None:
    return None if text in NOTHING else Plain(text)


def _parse(text: str, where: str) -> Any:
    """Dicts, lists and scalars; None for a text without content."""
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        line = f" in line {mark.line + 1}" if mark else ""
        raise ValueError(f"{where} is not valid YAML{line}: {problem}") from error


def _overridden(tree: dict[str, Any], override: str, known: dict[str, dataclasses.Field[Any]]) -> dict[str, Any]:
    """The tree with what `a.b=c` says."""
    dotted, equals, text = override.partition("=")
    if not equals:
        raise ValueError(f"override {override!r} is not of the form section.name=value")
    if one := next((name for name in known if name.startswith(f"{dotted}.")), None):
        raise ValueError(f"override {override!r}: {dotted} is a section: set its keys, such as {one}=...")
    hint = known[dotted].type if dotted in known else Any
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    is_text, may_be_dict = _kind(hint) is str, any(typing.get_origin(kind) is dict for kind in typing.get_args(hint))
    brackets = "[{" if not is_text else "{" if may_be_dict else ""
    # What is neither quoted nor in brackets needs no quotes, whatever is in it.
    value = _parse(text, f"override {override!r}") if quoted or (text and text[0] in brackets) else _as_typed(text)

    def put(tree: Any, names: list[str]) -> dict[str, Any]:
        if not isinstance(tree, dict | None):
            above = dotted.removesuffix("." + ".".join(names)).rpartition(".")[2]
            raise ValueError(f"override {dotted!r}: {above!r} is a value, not a section")
        tree, (name, *inner) = tree or {}, names
        return tree | {name: put(tree.get(name), inner) if inner else value}

    return put(tree, dotted.split("."))


# ---------------------------------------------------------------------------------------------------- text -> value


def _kind(hint: Any) -> Any:
    """The type of the single values that a type holds: the first of a union, the one inside of a list or mapping."""
    inner = typing.get_args(hint)
    if not inner:
        return hint
    return str if typing.get_origin(hint) is Literal else _kind(inner[typing.get_origin(hint) is dict])


def _as_meant(value: Any, kind: Any, where: str = "") -> Any:
    """A value with all text in it of which pydantic would make something else than this kind.

    Raises:
        ValueError: it may mean two things.
    """
    if isinstance(value, list):
        return [_as_meant(item, kind, where) for item in value]
    if isinstance(value, dict):
        return {key: _as_meant(item, kind, f"{where}.{key}") for key, item in value.items()}
    if kind is int and isinstance(value, str):
        return _whole(value, where)
    if kind is bool and isinstance(value, str):
        if not isinstance(value, Plain) or value.lower() not in TRUTHS:
            raise ValueError(f"{where} must be true or false, found {str(value)!r}")
        return TRUTHS[value.lower()]
    return _free(value, where) if kind is Any and isinstance(value, Plain) else value


def _whole(text: str, where: str) -> Any:
    """Exactly, where a float would round; 1e3 is whole too."""
    try:
        number = Decimal(text)
    except InvalidOperation:
        return text
    if not number.is_finite():
        return float(number)
    if not -LARGEST <= number <= LARGEST:
        raise ValueError(f"{where} must be at most {LARGEST}, found {text!r}")
    return int(number) if number == int(number) else float(number)


def _free(text: str, where: str) -> Any:
    """A value whose type nobody states: JSON's types where it is written as JSON would, text otherwise."""
    if text.lower() in ("true", "false"):
        return TRUTHS[text.lower()]
    if text.lower() in TRUTHS:
        raise ValueError(f"{where}: {text} may be a word or a truth: write true or false, or '{text}'")
    if NOT_FINITE.fullmatch(text) or (BROKEN.fullmatch(text) and math.isinf(float(text))):
        raise ValueError(f"{where} must be a finite number, found {str(text)!r}: quote it if it is a word")
    return int(text) if WHOLE.fullmatch(text) else float(text) if BROKEN.fullmatch(text) else str(text)


def _at_home(value: Any) -> Any:
    """A path, or the keys of a mapping, with `~` expanded."""
    if isinstance(value, dict):
        return {_at_home(path): item for path, item in value.items()}
    if not isinstance(value, str) or not value.startswith("~"):
        return value
    if (expanded := os.path.expanduser(value)).startswith("~"):
        raise ValueError(f": {value!r} names no user's home; a folder of that name is ./{value}")
    return expanded


# ---------------------------------------------------------------------------------------------------- refusals


def _in_words(error: ValidationError, tree: Any, known: Collection[str], synonyms: Mapping[str, str]) -> dict[str, str]:
    """The keys that pydantic found fault with, and why in one sentence each, with the value as it was typed."""
    # Of a union every type says what it found: the one that got deepest was meant.
    by_field: dict[str, Any] = {}
    for found in sorted(error.errors(include_url=False), key=lambda one: len(one["loc"])):
        dotted, value = _place(found["loc"], tree)
        field = next((name for name in known if f"{dotted}.".startswith(f"{name}.")), dotted)
        by_field[field] = dotted, value, found
    return {dotted: _sentence(dotted, value, found, known, synonyms) for dotted, value, found in by_field.values()}


def _place(location: Sequence[str | int], tree: Any) -> tuple[str, Any]:
    """The dotted name and the value of what pydantic calls so."""
    keys: list[str] = []
    for part in location:
        if isinstance(tree, list) or (isinstance(tree, dict) and part in tree):
            tree = tree[part]  # type: ignore[index]
            keys += [part] if isinstance(part, str) else []
    return ".".join(keys), tree


def _sentence(dotted: str, value: Any, found: Any, known: Collection[str], synonyms: Mapping[str, str]) -> str:
    message = found["msg"]
    if found["type"] == "unexpected_keyword_argument":
        return _unknown(dotted, value, known, synonyms)
    if found["type"] == "value_error":  # of our own
        return dotted + message.removeprefix("Value error, ")
    for pydantics, ours in WORDS.items():
        message = re.sub(pydantics, ours, message)
    return dotted + message + ("" if ", not " in message else f", found {_shown(value)}")


WORDS = {
    ".* instance of .*": " is a section",
    ".*? should ": " must ",
    "greater than or equal to": "at least",
    "less than or equal to": "at most",
    "dictionary": "mapping",
    " after validation|, (unable|got) .*": "",
}


def _unknown(dotted: str, value: Any, known: Collection[str], synonyms: Mapping[str, str]) -> str:
    """Refuses a key, with what may be meant by it: written as it would have to be."""
    section, _, leaf = dotted.rpartition(".")
    if dotted in known:
        return f"unknown key {dotted!r}: in a file, {leaf!r} stands below {section + ':'!r}"
    meant = _nearest(dotted, known, synonyms, is_section=isinstance(value, dict))
    while not meant and isinstance(value, dict) and value:  # somebody else's section: what is meant by the first in it?
        name, value = next(iter(value.items()))
        dotted = f"{dotted}.{name}"
        meant = _nearest(dotted, known, synonyms, is_section=isinstance(value, dict))
    if meant and " " in meant[0]:  # a sentence
        return f"unknown key {dotted!r}: {meant[0]}"
    if meant:
        return f"unknown key {dotted!r}; did you mean {' or '.join(map(repr, meant))}?"
    if below := [name.rpartition(".")[2] for name in known if section and name.startswith(f"{section}.")]:
        return f"unknown key {dotted!r}; {section} has {', '.join(below)}"
    return f"unknown key {dotted!r}; sections are {', '.join(sorted({name.split('.')[0] for name in known}))}"


def _nearest(name: str, known: Collection[str], synonyms: Mapping[str, str], is_section: bool) -> list[str]:
    """What may be meant by an unknown name: names that exist, or a sentence."""
    section, _, key = name.lower().rpartition(".")
    if key in synonyms:
        return [synonyms[key]]
    leaves = {name: name.rpartition(".")[2] for name in known}
    sections = {name: name for name in (name.split(".")[0] for name in known)}
    below = {name: leaf for name, leaf in leaves.items() if section and name.startswith(f"{section}.")}
    same = {name: leaf for name, leaf in leaves.items() if leaf == key}
    for among in [{} if section else sections] if is_section else [same, below or sections, leaves]:
        close = difflib.get_close_matches(key, among.values(), n=1)
        if meant := [name for name, leaf in among.items() if leaf in close]:
            return meant
    return []


def _shown(value: Any) -> str:
    if value is None:
        return "nothing"
    return "a mapping" if isinstance(value, dict) else "a list" if isinstance(value, list) else repr(str(value))
