"""A command's options are a frozen dataclass, each field one option with its default and meaning. From it come the
parser, `--help` and the typed object; no other file knows argparse.

A field without a default must be given; `bool` is a switch, `list` takes several values, `Literal` names the choices,
and every other type reads the text as pydantic does.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import types
import typing
from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from typing import Any, Literal, NoReturn, TypeVar

from pydantic import Json, TypeAdapter, ValidationError

from dflash_dist.config import KNOBS, Config, load_config

T = TypeVar("T")

JsonObject = Json[dict[str, Any]]


def option(meaning: str, default: Any = MISSING, group: str = "", also: str = "") -> Any:
    """A field that is `--its-name`.

    Args:
        group: the heading in `--help` below which it stands.
        also: another spelling of its flag.
    """
    return _field(default, {"meaning": meaning, "group": group, "also": also})


def argument(meaning: str, default: Any = MISSING, shown: str | None = None) -> Any:
    """A field that is told by its place; `shown` is how `--help` writes it."""
    return _field(default, {"meaning": meaning, "shown": shown, "group": ""})


def _field(default: Any, metadata: dict[str, Any]) -> Any:
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class ConfigOptions:
    """What every command takes that reads the config of a run."""

    config: str = option("YAML file, or the name of a shipped one, such as qwen3-8b")
    overrides: list[str] = argument("knobs set on the command line", [], shown="a.b=c")

    def load(self) -> Config:
        return load_config(self.config, self.overrides)


@dataclass(frozen=True, kw_only=True)
class AnswerOptions:
    """How a target answers, in every command that lets it."""

    max_new_tokens: int = option("longest answer [tokens]", 1024)
    temperature: float = option("0: greedy", 0.0)
    top_p: float = option("nucleus of the sampled distribution", 1.0)
    top_k: int = option("likeliest tokens that are sampled from; 0: all", 0)
    seed: int = option("seed of sampling", 0)


def parse(options: type[T], command: str, about: str | None, argv: Sequence[str], epilog: str = "") -> T:
    """The options that a command line states. Ends the program where it states none of this kind, and for `--help`.

    A ValueError of `__post_init__` is one of the command line too: what several options must fulfil stands there.
    """
    parser = _Parser(
        prog=f"dflash_dist {command}",
        allow_abbrev=False,
        description=about,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    groups: dict[str, Any] = {"": parser}
    hints = typing.get_type_hints(options, include_extras=True)
    fields: Any = dataclasses.fields(options)  # type: ignore[arg-type]
    for field in sorted(fields, key=lambda field: not _is_required(field)):
        group = field.metadata["group"]
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        names, keywords = _described(field, hints[field.name])
        groups[group].add_argument(*names, **keywords)
    parser.argv, parser.takes_knobs = argv, issubclass(options, ConfigOptions)
    found = parser.parse_intermixed_args(argv)
    try:
        return options(**vars(found))
    except ValueError as error:
        parser.error(str(error))


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in a line, with the option that was meant, in place of all that there are."""

    argv: Sequence[str] = ()
    takes_knobs = False

    def error(self, message: str) -> NoReturn:
        known = self._option_string_actions
        for option in (word.partition("=")[0] for word in self.argv if word.startswith("--")):
            if option not in known:
                name = option.strip("-").replace("-", "_")
                knob = [full for full in KNOBS if name in (full, full.rpartition(".")[2])] if self.takes_knobs else []
                meant = difflib.get_close_matches(option, known, n=1)
                hint = (
                    f"; knobs are written {knob[0]}=VALUE" if knob else f"; did you mean {meant[0]}?" if meant else ""
                )
                self.exit(2, f"error: there is no option {option}{hint} ({self.prog} --help lists all)\n")
        self.exit(2, f"error: {message} ({self.prog} --help lists the options)\n")


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def _described(field: dataclasses.Field[Any], hint: Any) -> tuple[list[str], dict[str, Any]]:
    """An option as argparse is told of it."""
    default = field.default if field.default_factory is MISSING else field.default_factory()
    meaning = field.metadata["meaning"]
    if isinstance(default, (int, float, str)) and default is not False and default != "":
        meaning = f"{meaning} (default: {default})".lstrip()
    keywords: dict[str, Any] = {"help": meaning.replace("%", "%%")}
    match typing.get_args(hint):
        case (stated, types.NoneType):
            hint = stated
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is bool:
        keywords["action"] = "store_true"
    elif origin is Literal:
        keywords["choices"] = inner
    else:
        keywords["type"] = _reader(inner[0] if origin is list else hint)
    if "shown" in field.metadata:
        return [field.name], keywords | ({"nargs": "*", "metavar": field.metadata["shown"]} if origin is list else {})
    keywords |= {"required": True} if _is_required(field) else {"default": default}
    names = [f"--{field.name.replace('_', '-')}", field.metadata["also"]]
    return list(filter(None, names)), keywords | ({"nargs": "+"} if origin is list else {})


def _reader(hint: Any) -> Any:
    """A text as the type says, for argparse."""

    def read(text: str) -> Any:
        try:
            return TypeAdapter(hint).validate_python(text)
        except ValidationError as error:
            found, ours = error.errors()[0]["msg"], error.errors()[0]["type"] == "value_error"
            why = found.removeprefix("Value error, ").strip() if ours else f"{found}, found {text!r}"
            raise argparse.ArgumentTypeError(why) from error

    return read
