"""What a chat template takes from outside: its arguments, and the day on which it renders."""

from __future__ import annotations

import contextlib
import datetime
import difflib
from collections.abc import Callable, Collection, Iterator
from functools import lru_cache
from typing import Any

import jinja2.meta
import jinja2.nodes
from transformers.utils.chat_template_utils import _compile_jinja_template

from dflash_dist.config import is_day
from dflash_dist.reading import check_fields

CLOCK = "strftime_now"  # what transformers and engines give templates that write a date
PASSED = {"messages", "tools", "add_generation_prompt"}  # arguments that every rendering passes itself


def today() -> str:
    """YYYY-MM-DD, as this machine's clock has it."""
    return datetime.date.today().isoformat()


def settle_day(agree: Callable[[str], str], *known: str | None) -> str:
    """The day of a run: the first one that is known already, otherwise today. The ranks `agree` on it, for midnight may
    lie between them."""
    return agree(next(filter(None, known), None) or today())


def check_day(content: dict[str, Any], key: str, where: str, advice: str) -> None:
    """Refuses a day on record that is none.

    Raises:
        ValueError: naming it, and `where` it stands.
    """
    check_fields(content, {key: str | None}, where, advice)
    if (day := content.get(key)) is not None and not is_day(day):
        raise ValueError(f"{key} in {where} is {day!r}, which is no day (YYYY-MM-DD): {advice}")


@lru_cache
def _parsed(template: str) -> tuple[frozenset[str], bool]:
    try:
        tree = _compile_jinja_template(template).environment.parse(template)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"the chat template is not valid Jinja: line {error.lineno}: {error.message}") from error
    outside = frozenset(jinja2.meta.find_undeclared_variables(tree))  # without the globals, such as the clock
    return outside - PASSED, any(name.name == CLOCK for name in tree.find_all(jinja2.nodes.Name))


def arguments_of(template: str) -> frozenset[str]:
    """The names that a template takes and that only its user can give; a few more, which it also sets itself.

    Raises:
        ValueError: it is not valid Jinja.
    """
    return _parsed(template)[0]


def has_clock(template: str) -> bool:
    """Whether a template may ask for the day."""
    return _parsed(template)[1]


def refuse_unknown_args(given: dict[str, Any], known: Collection[str]) -> None:
    """Refuses arguments that would vanish.

    Raises:
        ValueError: an argument is none of `known`, or has no value.
    """
    for name, value in given.items():
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            knows = f"it knows {', '.join(sorted(known))}" if known else "it takes none"
            meant = f"did you mean {close[0]!r}?" if close else knows
            raise ValueError(f"the chat template knows no argument {name!r}: {meant}")
        if value is None:
            raise ValueError(f"the chat template's argument {name!r} has no value: give it one, or leave it out")


@contextlib.contextmanager
def on_day(template: str, date: str) -> Iterator[list[str]]:
    """In here `date` (YYYY-MM-DD) is today to a template that asks. Yields the formats that it asked for so far.

    The library passes on nothing that can be called, so the template's own globals get another clock for a while.
    """
    asked: list[str] = []
    if not has_clock(template):
        yield asked
        return
    day = datetime.datetime.fromisoformat(date)

    def tell(form: str) -> str:
        asked.append(form)
        return day.strftime(form)

    names = _compile_jinja_template(template).globals
    before = names[CLOCK]
    names[CLOCK] = tell
    try:
        yield asked
    finally:
        names[CLOCK] = before
