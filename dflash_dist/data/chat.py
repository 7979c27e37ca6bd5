"""Conversations -> token ids and what of them is supervised, exactly as the target's own chat template renders them.

Supervised are the tokens that the target itself would have to emit: an assistant's answer up to and including the
token that ends the turn. Headers, user, system and tool text are context only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import jinja2
import numpy as np
from transformers.utils.chat_template_utils import render_jinja_template

from dflash_dist.data.files import BadRow
from dflash_dist.data.sources import Conversation, Message, Rendered, digest, is_context, strings
from dflash_dist.data.template import arguments_of, has_clock, on_day, refuse_unknown_args, today

Spans = list[tuple[int, int]]  # ranges [begin, end), ascending


@dataclass(frozen=True)
class Document:
    """One training document: its tokens, and the ranges of them that are supervised."""

    input_ids: np.ndarray  # [N] int32
    supervised: Spans

    @property
    def loss_mask(self) -> np.ndarray:
        """[N] bool: whether each token is supervised."""
        mask = np.zeros(len(self.input_ids), bool)
        for begin, end in self.supervised:
            mask[begin:end] = True
        return mask


@dataclass(frozen=True)
class Text:
    """A rendered conversation, and the ranges of its characters that the assistant wrote."""

    text: str
    answers: Spans


@dataclass
class ChatEncoder:
    """Renders conversations with a tokenizer's chat template and marks the assistant's tokens.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
        stop_ids: the tokens that end an assistant's turn.
        template_args: further arguments of the template, such as `enable_thinking`.
        chat_template: a template in Jinja, instead of the tokenizer's own.
        last_turn_only: supervise only the assistant's last turn; the others are context.
        drop_reasoning: leave out the thinking before an answer, for targets that are served without.
        vocab_size: tokens that the target's embedding has a row for; a tokenizer may know more. None: all.
        date: the day that a template writes (YYYY-MM-DD), if it writes one; by default today.

    Raises:
        ValueError: there is no chat template, it is not valid Jinja, or it does not know one of `template_args`.
    """

    tokenizer: Any
    stop_ids: Sequence[int]
    template_args: dict[str, Any] = field(default_factory=dict)
    chat_template: str | None = None
    last_turn_only: bool = False
    drop_reasoning: bool = False
    vocab_size: int | None = None
    date: str = field(default_factory=today)

    def __post_init__(self) -> None:
        if not (self.chat_template or self.tokenizer.chat_template):
            raise ValueError(
                f"the tokenizer of {self.tokenizer.name_or_path} has no chat template: add chat_template.jinja to it,"
                " or name a file under data.chat_template"
            )
        refuse_unknown_args(self.template_args, self.known_args)
        self._tails: dict[str, list[int]] = {}

    @property
    def pad_id(self) -> int:
        """The token that fills what is left empty; nothing ever looks at it."""
        pad = self.tokenizer.pad_token_id
        return pad if pad is not None and not self._is_unknown(pad) else min(self.stop_ids)

    @cached_property
    def knows_more(self) -> bool:
        """Whether the tokenizer may give a token that the target has no embedding for."""
        return self._is_unknown(max(self.tokenizer.get_vocab().values()))

    def _is_unknown(self, token: int) -> bool:
        return self.vocab_size is not None and token >= self.vocab_size

    def refuse_unknown(self, ids: Sequence[int] | np.ndarray) -> None:
        """Raises a BadRow that names a token among `ids` that the target has no embedding for."""
        if len(ids) and self._is_unknown(largest := int(np.max(ids))):
            raise BadRow(
                f"unknown token: {self.tokenizer.decode([largest])!r} is token {largest} of the tokenizer, but the"
                f" target's embedding has {self.vocab_size} rows"
            )

    @cached_property
    def identity(self) -> str:
        """Changes with anything that could change a token or its supervision."""
        return digest(
            self.tokenizer.backend_tokenizer.to_str(),
            self.tokenizer.special_tokens_map,
            self.chat_template or self.tokenizer.chat_template,
            sorted(self.stop_ids),
            self.template_args,
            self.last_turn_only,
            self.drop_reasoning,
            *([self.vocab_size] if self.knows_more else []),
            *([self.date] if self.writes_date else []),
        )

    @property
    def _templates(self) -> list[str]:
        template = self.chat_template or self.tokenizer.chat_template
        return list(template.values()) if isinstance(template, dict) else [template]

    @cached_property
    def known_args(self) -> frozenset[str]:
        """The arguments that the template takes."""
        return frozenset().union(*map(arguments_of, self._templates))

    @cached_property
    def writes_date(self) -> bool:
        """Whether the template may write the day. Its arguments may say another one, as Llama 3.2's `date_string`."""
        if not any(map(has_clock, self._templates)):
            return False
        return not self.template_args or self._asks_day(self.template_args) or not self._asks_day({})

    def _asks_day(self, template_args: dict[str, Any]) -> bool:
        other = dataclasses.replace(self, template_args=template_args)
        with contextlib.suppress(BadRow), on_day(self._template(None), self.date) as asked:
            other._apply_template([{"role": "user", "content": "Hi"}], None, add_generation_prompt=True)
        return bool(asked)

    def with_args(self, template_args: dict[str, Any]) -> ChatEncoder:
        """The encoder for a row that states arguments of its own, which come before these; what the template does not
        know has no effect."""
        known = {name: value for name, value in template_args.items() if name in self.known_args}
        if known.items() <= self.template_args.items():
            return self
        return dataclasses.replace(self, template_args=self.template_args | known)

    def unread(self, row: Conversation | Rendered) -> list[str]:
        """The keys of a row that might matter and have no effect."""
        args = row.template_args if isinstance(row, Conversation) else {}
        return [*row.unread, *(f"template argument {name}" for name in args if name not in self.known_args)]

    # ------------------------------------------------------------------------------------------------ text

    def render(
        self, messages: list[Message], tools: list[Any] | None = None, add_generation_prompt: bool = False
    ) -> str:
        """The template's text, up to where the assistant would begin to write if `add_generation_prompt`.

        Raises:
            BadRow: the template refuses the conversation.
        """
        with on_day(self._template(tools), self.date):
            return self._apply_template(messages, tools, add_generation_prompt)

    def _apply_template(self, messages: list[Message], tools: list[Any] | None, add_generation_prompt: bool) -> str:
        with _template_errors():
            return self.tokenizer.apply_chat_template(
                messages,
                tools,
                chat_template=self.chat_template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **self.template_args,
            )

    def prompt_ids(self, messages: list[Message], tools: list[Any] | None = None) -> list[int]:
        """The tokens a serving engine would prefill before the assistant writes.

        Raises:
            BadRow: the template refuses the conversation, or `refuse_unknown` one of its tokens.
        """
        text = self.render([self._as_trained(message) for message in messages], tools, add_generation_prompt=True)
        ids = self.tokenizer(text, add_special_tokens=False).input_ids
        self.refuse_unknown(ids)
        return ids

    def prompt_of(self, conversation: Conversation) -> list[int]:
        """The same of a conversation that nobody has answered, with the arguments of its own."""
        return self.with_args(conversation.template_args).prompt_ids(conversation.messages, conversation.tools)

    def texts(self, row: Conversation | Rendered) -> list[Text]:
        """One text for the conversation, or one for each assistant turn where the rendering of a turn changes once
        others follow it (Qwen3 strips thinking from the history). Empty without an assistant turn; one that nobody
        asked for, such as a greeting, answers nothing and is context.

        Raises:
            BadRow: the template refuses the conversation, or cannot tell the assistant's text apart.
        """
        if isinstance(row, Rendered):
            return [Text(row.text, [(row.prompt_length, len(row.text))])]
        return self.with_args(row.template_args)._texts(row)

    def _texts(self, row: Conversation) -> list[Text]:
        messages = [self._as_trained(message) for message in row.messages]
        turns = self._taught(row)
        if not turns:
            return []
        cut = not row.finished and turns[-1] == len(messages) - 1
        if cut:
            messages[-1] = _marked_where_cut(messages[-1])
        try:
            answers = [self._up_to_answer(messages, row.tools, k) for k in turns]
        except _NoPrefix:
            # Rendering prefixes is exact wherever it works; a template's own marks serve the others.
            if not self._marks_answers:
                raise
            answers = [self._marked(messages, row.tools, turns)]
        else:
            last = answers[-1].text
            if all(last.startswith(answer.text) for answer in answers):
                answers = [Text(last, [answer.answers[0] for answer in answers])]
        return [*answers[:-1], _cut(answers[-1])] if cut else answers

    def _taught(self, row: Conversation) -> list[int]:
        """The turns that answer somebody and are supervised."""
        asked = next((k for k, message in enumerate(row.messages) if message["role"] in ("user", "tool")), math.inf)
        turns = [k for k, message in enumerate(row.messages) if message["role"] == "assistant" and k > asked]
        turns = turns[-1:] if self.last_turn_only else turns
        return [k for k in turns if not is_context(row.messages[k])]

    def goes_on(self, row: Conversation | Rendered) -> bool:
        """Whether an answer of the row goes on behind a token that ends a turn, up to which it is supervised."""
        if isinstance(row, Rendered):
            written = [row.text[row.prompt_length :]]
        else:
            messages = [self._as_trained(message) for message in row.messages]
            fields = ("reasoning_content", "content", "tool_calls")
            written = ["".join(strings([messages[k].get(field) for field in fields])) for k in self._taught(row)]
        return any(self._stop_and_more.search(text) for text in written)

    @cached_property
    def _stop_and_more(self) -> re.Pattern[str]:
        tokens = [token.content for k, token in self.tokenizer.added_tokens_decoder.items() if k in self.stop_ids]
        return re.compile(rf"({'|'.join(map(re.escape, tokens)) or '(?!)'})\s*\S")

    def _as_trained(self, message: Message) -> Message:
        if is_context(message):
            message = {key: value for key, value in message.items() if key != "weight"}
        if not self.drop_reasoning or message["role"] != "assistant":
            return message
        kept = {key: value for key, value in message.items() if key not in ("reasoning_content", "thinking")}
        if len(kept) == len(message) and "</think>" not in message["content"]:
            return message
        return kept | {"content": message["content"].split("</think>")[-1].lstrip("\n")}

    def _up_to_answer(self, messages: list[Message], tools: list[Any] | None, k: int) -> Text:
        """The rendering up to and including turn `k`, of which only that turn counts as written."""
        prompt = self.render(messages[:k], tools, add_generation_prompt=True)
        text = self.render(messages[: k + 1], tools)
        if not text.startswith(prompt):
            # A template may render the history differently once the answer is there: gpt-oss drops the thinking before
            # tool calls. What counts is what is rendered behind the last generation prompt.
            opening = prompt.removeprefix(self.render(messages[:k], tools))
            other = self.render([*messages[:k], {"role": "assistant", "content": _CUT}], tools)
            start = text.rfind(opening, 0, _shared_length(text, other))
            if opening and opening != prompt and start >= 0:
                text = prompt + text[start + len(opening) :]
                return Text(text, [(len(prompt), len(text))])
            raise _NoPrefix(
                "no generation prompt: the chat template renders an answer without its own generation prompt before it,"
                " so the assistant's tokens cannot be told apart; mark them with {% generation %} in the template"
            )
        return Text(text, [(len(prompt), len(text))])

    @property
    def _marks_answers(self) -> bool:
        return bool(re.search(r"{%[-+]?\s*generation\b", self._template(None)))

    def _marked(self, messages: list[Message], tools: list[Any] | None, turns: list[int]) -> Text:
        """The marked text; turns that are not among `turns` are context."""
        text, answers = self._with_marks(messages, tools)

        def marks_before(k: int) -> int:
            return len(self._with_marks(messages[:k], tools)[1])

        context = set(range(marks_before(turns[0])))
        for k in range(turns[0], len(messages)):
            if messages[k]["role"] == "assistant" and k not in turns:
                context |= set(range(marks_before(k), marks_before(k + 1)))
        answers = [answer for n, answer in enumerate(answers) if n not in context]
        if not answers:
            raise BadRow("no marks: the chat template's {% generation %} blocks marked no text of an assistant's turn")
        return Text(text, answers)

    def _with_marks(self, messages: list[Message], tools: list[Any] | None) -> tuple[str, Spans]:
        variables = {**self.tokenizer.special_tokens_map, **self.template_args}
        with _template_errors(), on_day(self._template(tools), self.date):
            rendered: Any = render_jinja_template(
                [messages],
                tools,
                chat_template=self._template(tools),
                return_assistant_tokens_mask=True,
                **variables,
            )
        (text,), (answers,) = rendered
        return text, answers

    def _template(self, tools: list[Any] | None) -> str:
        return self.chat_template or self.tokenizer.get_chat_template(tools=tools)

    # ------------------------------------------------------------------------------------------------ tokens

    def encode(self, row: Conversation | Rendered) -> list[Document]:
        """The documents of one row.

        Raises:
            BadRow: as `texts` and `refuse_unknown`.
        """
        documents = self.tokenise(self.texts(row))
        for document in documents:
            self.refuse_unknown(document.input_ids)
        return documents

    def tokenise(self, texts: Sequence[Text]) -> list[Document]:
        """One document a text."""
        if not texts:
            return []
        encodings = self.tokenizer([text.text for text in texts], add_special_tokens=False, verbose=False).encodings
        return [self._document(text, encoding) for text, encoding in zip(texts, encodings)]

    def _document(self, text: Text, encoding: Any) -> Document:
        """Supervises the tokens inside the answers.

        A serving engine tokenises the prompt on its own. Where an answer's first characters would change the tokens of
        the prompt before it, the two are tokenised apart.
        """
        ids, offsets = np.array(encoding.ids, np.int32), np.array(encoding.offsets).reshape(-1, 2)
        spans = [_tokens_inside(offsets, answer) for answer in text.answers]
        starts = [start for start, _ in text.answers]
        if not all(self._prompt_agrees(text.text, start, ids, offsets, span) for start, span in zip(starts, spans)):
            ids, offsets = self._tokenised_apart(text)
            spans = [_tokens_inside(offsets, answer) for answer in text.answers]
        return Document(ids, [self._end_at_stop(ids, span) for span in spans if span[0] < span[1]])

    def _prompt_agrees(
        self, text: str, start: int, ids: np.ndarray, offsets: np.ndarray, span: tuple[int, int]
    ) -> bool:
        """Whether the tokens before an answer are those of the prompt alone.

        Special tokens cut a text before anything else looks at it, so only what follows the last of them can differ.
        """
        before = np.flatnonzero(np.isin(ids[: span[0]], self._special_ids))
        first = int(before[-1]) if len(before) else 0
        tail = text[int(offsets[first, 0]) if len(before) else 0 : start]
        if tail not in self._tails:
            if len(self._tails) > 10_000:
                self._tails.clear()
            self._tails[tail] = self.tokenizer(tail, add_special_tokens=False, verbose=False).input_ids
        return self._tails[tail] == ids[first : span[0]].tolist()

    @cached_property
    def _special_ids(self) -> np.ndarray:
        return np.array(list(self.tokenizer.added_tokens_decoder), np.int32)

    def _tokenised_apart(self, text: Text) -> tuple[np.ndarray, np.ndarray]:
        starts = [0, *(start for start, _ in text.answers), len(text.text)]
        pieces = [text.text[left:right] for left, right in itertools.pairwise(starts)]
        encodings = self.tokenizer(pieces, add_special_tokens=False, verbose=False).encodings
        ids = np.concatenate([np.array(encoding.ids, np.int32) for encoding in encodings])
        offsets = [np.array(e.offsets, int).reshape(-1, 2) + left for e, left in zip(encodings, starts)]
        return ids, np.concatenate(offsets)

    def _end_at_stop(self, ids: np.ndarray, span: tuple[int, int]) -> tuple[int, int]:
        """Leaves out what stands behind the first token that ends a turn: the model stops there, so it emits neither
        what a template writes next, such as ChatML's line break, nor the rest of an answer that goes on."""
        begin, end = span
        stops = np.flatnonzero(np.isin(ids[begin:end], self.stop_ids))
        return (begin, begin + int(stops[0]) + 1) if len(stops) else span


@contextlib.contextmanager
def _template_errors() -> Iterator[None]:
    """A template may refuse a conversation on purpose, or stumble over it: the row is at fault, not the run."""
    try:
        yield
    except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
        raise BadRow(f"refused by the chat template: {error}") from error


class _NoPrefix(BadRow):
    """A template's generation prompt is not the beginning of what it renders for an answer."""


def _shared_length(one: str, other: str) -> int:
    """How many characters two texts begin with in common."""
    return next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))


_CUT = "\ue0ff"  # of the private use area: no template trims it


def _marked_where_cut(message: Message) -> Message:
    content = message["content"]
    if content.lstrip().startswith("<think>") and "</think>" not in content:
        return message  # cut while thinking: a template takes that for an answer without thinking
    if content.strip():
        return message | {"content": content.rstrip() + _CUT}
    return message | {k: message[k].rstrip() + _CUT for k in ("reasoning_content", "thinking") if k in message}


def _cut(text: Text) -> Text:
    """Ends the last answer where the target was stopped: whatever the template writes after it is not the target's.

    Raises:
        BadRow: the rendering does not hold the answer as it stands.
    """
    start, end = text.answers[-1]
    place = text.text.rfind(_CUT, start, end)
    if place < 0:
        raise BadRow("cut answer: it was stopped by the length limit, and the chat template renders it otherwise")
    return Text(text.text[:place], [*text.answers[:-1], (start, place)])


def _tokens_inside(offsets: np.ndarray, characters: tuple[int, int]) -> tuple[int, int]:
    """The range of tokens that lie inside a range of characters. Tokenizers that trim offsets give a token of spaces an
    empty range at its end."""
    start, end = characters
    left, right = offsets[:, 0], offsets[:, 1]
    begin = max(np.searchsorted(left, start, "left"), np.searchsorted(right, start, "right"))
    return int(begin), max(int(begin), int(np.searchsorted(right, end, "right")))
