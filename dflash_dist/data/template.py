"""A chat template: what it takes from outside, and messages -> texts with what the assistant wrote of them."""

from __future__ import annotations

import contextlib
import datetime
import difflib
import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import jinja2.meta
import jinja2.nodes
from transformers.utils.chat_template_utils import _compile_jinja_template, render_jinja_template

from dflash_dist.config import is_day
from dflash_dist.data.account import BadRow
from dflash_dist.data.conversations import Message, Spans, Text
from dflash_dist.reading import check_fields

CLOCK = "strftime_now"  # what transformers and engines give templates that write a date
PASSED = {"messages", "tools", "add_generation_prompt"}  # arguments that every rendering passes itself
CUT = "\ue0ff"  # of the private use area: no template trims it


def today() -> str:
    """YYYY-MM-DD, as this machine's clock has it."""
    return datetime.date.today().isoformat()


def settle_day(agree: Callable[[str], str], *known: str | None) -> str:
    """The day of a run: the first one that is known already, otherwise today. The ranks `agree` on it, for midnight may
    lie between them."""
    return agree(next(filter(None, known), None) or today())


def check_day(content: dict[str, Any], key: str, where: str, advice: str) -> None:
    """Refuses a day on record that is none, with a ValueError that names it and `where` it stands."""
    check_fields(content, {key: str | None}, where, advice)
    if (day := content.get(key)) is not None and not is_day(day):
        raise ValueError(f"{key} in {where} is {day!r}, which is no day (YYYY-MM-DD): {advice}")


@dataclass(frozen=True)
class ChatTemplate:
    """A tokenizer's chat template, or one in its place, as a run uses it.

    Args:
        text: a template in Jinja, instead of the tokenizer's own.
        args: arguments beside messages and tools, such as `enable_thinking`.
        date: the day that it writes (YYYY-MM-DD), if it writes one.

    Raises:
        ValueError: there is none, it is not valid Jinja, or it does not know one of `args`.
    """

    tokenizer: Any
    text: str | None
    args: dict[str, Any]
    date: str

    def __post_init__(self) -> None:
        if not self.source:
            raise ValueError(
                f"the tokenizer of {self.tokenizer.name_or_path} has no chat template: add chat_template.jinja to it,"
                " or name a file under data.chat_template"
            )
        known = self.known_args  # not valid Jinja: an error at once
        for name, value in self.args.items():
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
                knows = f"it knows {', '.join(sorted(known))}" if known else "it takes none"
                meant = f"did you mean {close[0]!r}?" if close else knows
                raise ValueError(f"the chat template knows no argument {name!r}: {meant}")
            if value is None:
                raise ValueError(f"the chat template's argument {name!r} has no value: give it one, or leave it out")

    def with_args(self, args: dict[str, Any]) -> ChatTemplate:
        """For a row that states arguments of its own, which come before these; what the template does not know has no
        effect."""
        known = {name: value for name, value in args.items() if name in self.known_args}
        return self if known.items() <= self.args.items() else replace(self, args=self.args | known)

    @property
    def source(self) -> Any:
        """What it is written in: Jinja, or several of these by name."""
        return self.text or self.tokenizer.chat_template

    @property
    def _texts(self) -> list[str]:
        return list(self.source.values()) if isinstance(self.source, dict) else [self.source]

    def _text_for(self, tools: list[Any] | None) -> str:
        return self.text or self.tokenizer.get_chat_template(tools=tools)

    @cached_property
    def known_args(self) -> frozenset[str]:
        """The names that it takes and that only its user can give; a few more, which it also sets itself."""
        return frozenset().union(*(_taken_by(text)[0] for text in self._texts))

    @property
    def choices(self) -> dict[str, list[Any]]:
        """The arguments that it asks about, and the values that it tells apart; none for one that it merely writes."""
        trees = [_compile_jinja_template(text).environment.parse(text) for text in self._texts]
        names = self.known_args.difference(self.tokenizer.special_tokens_map, *map(_set_itself, trees))
        compared = dict.fromkeys(itertools.chain.from_iterable(map(_compared, trees)))
        return {name: [value for of, value in compared if of == name] for name in sorted(names)}

    @cached_property
    def writes_date(self) -> bool:
        """Whether it may write the day. Its arguments may say another one, as Llama 3.2's `date_string`."""
        if not any(_taken_by(text)[1] for text in self._texts):
            return False
        return not self.args or self._asks_day(self.args) or not self._asks_day({})

    def _asks_day(self, args: dict[str, Any]) -> bool:
        with contextlib.suppress(BadRow), _on_day(self._text_for(None), self.date) as asked:
            replace(self, args=args)._render([{"role": "user", "content": "Hi"}], None, add_generation_prompt=True)
        return bool(asked)

    def render(
        self, messages: list[Message], tools: list[Any] | None = None, add_generation_prompt: bool = False
    ) -> str:
        """The text, up to where the assistant would begin to write if `add_generation_prompt`; a BadRow where the
        template refuses the conversation."""
        with _on_day(self._text_for(tools), self.date):
            return self._render(messages, tools, add_generation_prompt)

    def _render(self, messages: list[Message], tools: list[Any] | None, add_generation_prompt: bool) -> str:
        with _refusals():
            return self.tokenizer.apply_chat_template(
                messages,
                tools,
                chat_template=self.text,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **self.args,
            )

    def _render_marked(self, messages: list[Message], tools: list[Any] | None) -> tuple[str, Spans]:
        """The text, and the ranges of its characters that the template marks as the assistant's."""
        text, variables = self._text_for(tools), {**self.tokenizer.special_tokens_map, **self.args}
        with _refusals(), _on_day(text, self.date):
            rendered: Any = render_jinja_template(
                [messages], tools, chat_template=text, return_assistant_tokens_mask=True, **variables
            )
        (made,), (answers,) = rendered
        return made, answers

    # -------------------------------------------------------------------------------------------- what was written

    def texts(
        self, messages: list[Message], tools: list[Any] | None, turns: list[int], finished: bool = True
    ) -> list[Text]:
        """One text for the conversation, or one for each of the assistant's `turns` where the rendering of a turn
        changes once others follow it (Qwen3 strips thinking from the history).

        Args:
            finished: False where the last answer was cut: there its text ends.

        Raises:
            BadRow: the template refuses the conversation, or cannot tell the assistant's text apart.
        """
        if not turns:
            return []
        cut = not finished and turns[-1] == len(messages) - 1
        if cut:
            messages = [*messages[:-1], _marked_where_cut(messages[-1])]
        try:
            answers = [self._up_to_answer(messages, tools, k) for k in turns]
        except _NoPrefix:
            # Rendering prefixes is exact wherever it works; a template's own marks serve the others.
            if not re.search(r"{%[-+]?\s*generation\b", self._text_for(None)):
                raise
            answers = [self._as_marked(messages, tools, turns)]
        else:
            last = answers[-1].text
            if all(last.startswith(answer.text) for answer in answers):
                answers = [Text(last, [answer.answers[0] for answer in answers])]
        return [*answers[:-1], _cut(answers[-1])] if cut else answers

    def _up_to_answer(self, messages: list[Message], tools: list[Any] | None, k: int) -> Text:
        """The rendering up to and including turn `k`, of which only that turn counts as written."""
        prompt = self.render(messages[:k], tools, add_generation_prompt=True)
        text = self.render(messages[: k + 1], tools)
        if not text.startswith(prompt):
            # A template may render the history differently once the answer is there: gpt-oss drops the thinking before
            # tool calls. What counts is what is rendered behind the last generation prompt.
            opening = prompt.removeprefix(self.render(messages[:k], tools))
            other = self.render([*messages[:k], {"role": "assistant", "content": CUT}], tools)
            start = text.rfind(opening, 0, _shared_length(text, other))
            if not opening or opening == prompt or start < 0:
                raise _NoPrefix(
                    "no generation prompt: the chat template renders an answer without its own generation prompt before"
                    " it, so the assistant's tokens cannot be told apart; mark them with {% generation %} in the"
                    " template"
                )
            text = prompt + text[start + len(opening) :]
        return Text(text, [(len(prompt), len(text))])

    def _as_marked(self, messages: list[Message], tools: list[Any] | None, turns: list[int]) -> Text:
        """The marked text; turns that are not among `turns` are context."""
        text, answers = self._render_marked(messages, tools)

        def marks_before(k: int) -> int:
            return len(self._render_marked(messages[:k], tools)[1])

        context = set(range(marks_before(turns[0])))
        for k in range(turns[0], len(messages)):
            if messages[k]["role"] == "assistant" and k not in turns:
                context |= set(range(marks_before(k), marks_before(k + 1)))
        answers = [answer for n, answer in enumerate(answers) if n not in context]
        if not answers:
            raise BadRow("no marks: the chat template's {% generation %} blocks marked no text of an assistant's turn")
        return Text(text, answers)


class _NoPrefix(BadRow):
    """A template's generation prompt is not the beginning of what it renders for an answer."""


def _shared_length(one: str, other: str) -> int:
    """How many characters two texts begin with in common."""
    return next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))


def _marked_where_cut(message: Message) -> Message:
    content = message["content"]
    if content.lstrip().startswith("<think>") and "</think>" not in content:
        return message  # cut while thinking: a template takes that for an answer without thinking
    if content.strip():
        return message | {"content": content.rstrip() + CUT}
    return message | {k: message[k].rstrip() + CUT for k in ("reasoning_content", "thinking") if k in message}


def _cut(text: Text) -> Text:
    """Ends the last answer where the target was stopped: whatever the template writes after it is not the target's. A
    BadRow where the rendering does not hold the answer as it stands."""
    start, end = text.answers[-1]
    place = text.text.rfind(CUT, start, end)
    if place < 0:
        raise BadRow("cut answer: it was stopped by the length limit, and the chat template renders it otherwise")
    return Text(text.text[:place], [*text.answers[:-1], (start, place)])


@lru_cache
def _taken_by(template: str) -> tuple[frozenset[str], bool]:
    """The arguments that it takes from outside, and whether it may ask for the day; a ValueError if it is no Jinja."""
    try:
        tree = _compile_jinja_template(template).environment.parse(template)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"the chat template is not valid Jinja: line {error.lineno}: {error.message}") from error
    outside = frozenset(jinja2.meta.find_undeclared_variables(tree))  # without the globals, such as the clock
    return outside - PASSED, any(name.name == CLOCK for name in tree.find_all(jinja2.nodes.Name))


def _set_itself(tree: jinja2.nodes.Template) -> set[str]:
    """Names that a template sets whatever is given: it never asks whether they are there."""
    nodes = jinja2.nodes
    asking: list[Any] = [test for test in tree.find_all(nodes.Test) if test.name in ("defined", "undefined", "none")]
    asking += [default for default in tree.find_all(nodes.Filter) if default.name in ("default", "d")]
    asked = {asks.node.name for asks in asking if isinstance(asks.node, nodes.Name)}
    return {name.name for name in tree.find_all(nodes.Name) if name.ctx != "load"} - asked


def _compared(tree: jinja2.nodes.Template) -> Iterator[tuple[str, Any]]:
    """Names with the constants that they are compared with; true and false where one decides by itself."""
    nodes = jinja2.nodes
    for node in tree.find_all((nodes.Compare, nodes.Test, nodes.If, nodes.CondExpr, nodes.Not, nodes.And, nodes.Or)):
        match node:
            case nodes.Compare(expr=nodes.Name(name=name), ops=[nodes.Operand(expr=nodes.Const(value=value))]):
                yield name, value
            case nodes.Test(node=nodes.Name(name=name), name="true" | "false"):
                yield from ((name, True), (name, False))
            case (
                nodes.If(test=nodes.Name(name=name))
                | nodes.CondExpr(test=nodes.Name(name=name))
                | nodes.Not(node=nodes.Name(name=name))
                | nodes.And(right=nodes.Name(name=name))
                | nodes.Or(right=nodes.Name(name=name))
            ):
                yield from ((name, True), (name, False))


@contextlib.contextmanager
def _on_day(template: str, date: str) -> Iterator[list[str]]:
    """In here `date` (YYYY-MM-DD) is today to a template that asks. Yields the formats that it asked for so far.

    The library passes on nothing that can be called, so the template's own globals get another clock for a while.
    """
    asked: list[str] = []
    if not _taken_by(template)[1]:
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


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    """A template may refuse a conversation on purpose, or stumble over it: the row is at fault, not the run."""
    try:
        yield
    except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
        raise BadRow(f"refused by the chat template: {error}") from error
