"""Conversations -> token ids and what of them is supervised, exactly as the target's own chat template renders them.

Supervised are the tokens that the target itself would have to emit: an assistant's answer up to and including the
token that ends the turn. Headers, user, system and tool text are context only.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from dflash_dist.data.account import BadRow
from dflash_dist.data.conversations import Conversation, Message, Spans, Text, is_context, strings
from dflash_dist.data.sources import digest
from dflash_dist.data.template import ChatTemplate, today


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
        ValueError: as `ChatTemplate`.
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
        self.template = ChatTemplate(self.tokenizer, self.chat_template, self.template_args, self.date)
        self._tails: dict[str, list[int]] = {}

    @property
    def writes_date(self) -> bool:
        """Whether the template may write the day."""
        return self.template.writes_date

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
            self.template.source,
            sorted(self.stop_ids),
            self.template_args,
            self.last_turn_only,
            self.drop_reasoning,
            *([self.vocab_size] if self.knows_more else []),
            *([self.date] if self.writes_date else []),
        )

    def unread(self, row: Conversation | Text) -> list[str]:
        """The keys of a row that might matter and have no effect."""
        args = row.template_args if isinstance(row, Conversation) else {}
        return [*row.unread, *(f"template argument {name}" for name in args if name not in self.template.known_args)]

    # ------------------------------------------------------------------------------------------------ text

    def prompt_of(self, row: Conversation) -> list[int]:
        """The tokens a serving engine would prefill before the assistant writes; a BadRow if the template refuses the
        conversation, or `refuse_unknown` one of its tokens."""
        messages = [self._as_trained(message) for message in row.messages]
        text = self.template.with_args(row.template_args).render(messages, row.tools, add_generation_prompt=True)
        ids = self.tokenizer(text, add_special_tokens=False).input_ids
        self.refuse_unknown(ids)
        return ids

    def texts(self, row: Conversation | Text) -> list[Text]:
        """As `ChatTemplate.texts`, with the row's own arguments. None without an assistant turn; one that nobody asked
        for, such as a greeting, answers nothing and is context."""
        if isinstance(row, Text):
            return [row]
        turns = self._taught(row)
        messages = [self._as_trained(message) for message in row.messages]
        return self.template.with_args(row.template_args).texts(messages, row.tools, turns, row.finished)

    def _taught(self, row: Conversation) -> list[int]:
        """The turns that answer somebody and are supervised."""
        asked = next((k for k, message in enumerate(row.messages) if message["role"] in ("user", "tool")), math.inf)
        turns = [k for k, message in enumerate(row.messages) if message["role"] == "assistant" and k > asked]
        turns = turns[-1:] if self.last_turn_only else turns
        return [k for k in turns if not is_context(row.messages[k])]

    def goes_on(self, row: Conversation | Text) -> bool:
        """Whether an answer of the row goes on behind a token that ends a turn, up to which it is supervised."""
        if isinstance(row, Text):
            written = [row.text[begin:end] for begin, end in row.answers]
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

    # ------------------------------------------------------------------------------------------------ tokens

    def encode(self, row: Conversation | Text) -> list[Document]:
        """The documents of one row; a BadRow as `texts` and `refuse_unknown`."""
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


def _tokens_inside(offsets: np.ndarray, characters: tuple[int, int]) -> tuple[int, int]:
    """The range of tokens that lie inside a range of characters. Tokenizers that trim offsets give a token of spaces an
    empty range at its end."""
    start, end = characters
    left, right = offsets[:, 0], offsets[:, 1]
    begin = max(np.searchsorted(left, start, "left"), np.searchsorted(right, start, "right"))
    return int(begin), max(int(begin), int(np.searchsorted(right, end, "right")))
