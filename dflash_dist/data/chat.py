"""Conversations -> token ids and a loss mask, exactly as the target's own chat template renders them.

Supervised are the tokens that the target itself would have to emit: an assistant's answer up to and including the
token that ends the turn. Headers, user, system and tool text are context only.
"""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

Message = dict[str, Any]
ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True)
class Document:
    """One training document: `input_ids` and, for each token, whether it is supervised."""

    input_ids: list[int]
    loss_mask: list[bool]

    def has_anchor(self) -> bool:
        """Whether two neighbouring tokens are supervised: the least that a block can learn from."""
        return any(here and after for here, after in zip(self.loss_mask, self.loss_mask[1:]))


def read_conversations(
    path: str | Path, max_bad_rows: int = 0, finished_only: bool = False
) -> tuple[list[list[Message]], Counter[str]]:
    """Reads a JSONL file of `{"messages": [{"role": ..., "content": ...}, ...]}`.

    Args:
        max_bad_rows: malformed lines that are skipped before the file is refused.
        finished_only: leave out rows that `regenerate` marked as cut by the length limit: the end that a template would
            give them is not one the target wrote.

    Returns:
        The conversations, and how many lines were skipped, by cause.

    Raises:
        ValueError: the file is missing or empty, or more than `max_bad_rows` lines are malformed; names file and line.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"data file {path} does not exist")
    conversations, skipped, bad = [], Counter[str](), 0
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                messages, finished = _parse(line)
            except ValueError as error:
                skipped[str(error).split(":")[0]] += 1
                bad += 1
                if bad > max_bad_rows:
                    raise ValueError(
                        f"{path}, line {number}: {error}. Mend the line; in training, data.max_bad_rows"
                        f" (now {max_bad_rows}) lets such lines be skipped"
                    ) from error
                continue
            if finished or not finished_only:
                conversations.append(messages)
            else:
                skipped["answer cut by the length limit"] += 1
    if not conversations:
        raise ValueError(f"data file {path} holds no conversation: expected one {{'messages': [...]}} a line")
    return conversations, skipped


def _parse(line: bytes) -> tuple[list[Message], bool]:
    """The messages of a line, and whether the last answer came to its end."""
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: {error}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"malformed JSON: {error}") from error
    messages = row.get("messages") if isinstance(row, dict) else None
    if not isinstance(messages, list) or not messages:
        raise ValueError("no messages: expected an object with a non-empty list under 'messages'")
    for message in messages:
        if not isinstance(message, dict) or "role" not in message:
            raise ValueError("no role: every message needs a 'role' and a 'content'")
        if message["role"] not in ROLES:
            raise ValueError(f"unknown role: {message['role']!r} is not one of {', '.join(ROLES)}")
        if not isinstance(message.get("content"), str):
            raise ValueError(f"no content: the content of a {message['role']} message must be text")
        if any("\ud800" <= character <= "\udfff" for character in message["content"]):
            raise ValueError("broken text: half of a surrogate pair, which no tokenizer accepts")
    return messages, row.get("finish_reason") != "length"


class ChatEncoder:
    """Renders conversations with a tokenizer's chat template and marks the assistant's tokens.

    Args:
        tokenizer: a fast Hugging Face tokenizer with a chat template.
        stop_ids: the tokens that end an assistant's turn.
        template_args: further arguments of the template, such as `enable_thinking`.
    """

    def __init__(self, tokenizer: Any, stop_ids: Sequence[int], template_args: dict[str, Any] | None = None):
        if not tokenizer.chat_template:
            raise ValueError(f"the tokenizer of {tokenizer.name_or_path} has no chat template: add chat_template.jinja")
        self.tokenizer = tokenizer
        self.stop_ids = frozenset(stop_ids)
        self.template_args = template_args or {}
        self.template_marks_answers = bool(re.search(r"{%[-+]?\s*generation\b", tokenizer.get_chat_template()))

    @property
    def pad_id(self) -> int:
        """The token that fills what is left empty; nothing ever looks at it."""
        pad = self.tokenizer.pad_token_id
        return pad if pad is not None else min(self.stop_ids)

    def encode(self, messages: list[Message]) -> list[Document]:
        """One document for the conversation, or one for each assistant turn where the rendering of a turn changes
        once others follow it (Qwen3 strips thinking from the history). Empty without an assistant turn; one that opens
        a conversation answers nothing and is context.

        Raises:
            ValueError: the template refuses the conversation, or cannot tell the assistant's tokens apart.
        """
        turns = [k for k, message in enumerate(messages) if message["role"] == "assistant" and k > 0]
        if not turns:
            return []
        try:
            spans = [self._answer_span(messages, k) for k in turns]
        except _NoPrefixError:
            # Rendering prefixes is exact wherever it works; a template's own marks serve the others.
            if self.template_marks_answers:
                return [self._encode_marked(messages)]
            raise
        whole = self.render(messages)
        if all(whole.startswith(text) for text, _ in spans):
            return [self._tokenise(whole, [(start, len(text)) for text, start in spans])]
        return [self._tokenise(text, [(start, len(text))]) for text, start in spans]

    def render(self, messages: list[Message], add_generation_prompt: bool = False) -> str:
        """The template's text, up to where the assistant would begin to write if `add_generation_prompt`."""
        try:
            return self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt, **self.template_args
            )
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template refuses the conversation: {error}") from error

    def prompt_ids(self, messages: list[Message]) -> list[int]:
        """The tokens a serving engine would prefill before the assistant writes."""
        return self.tokenizer(self.render(messages, add_generation_prompt=True), add_special_tokens=False).input_ids

    def _answer_span(self, messages: list[Message], k: int) -> tuple[str, int]:
        """The rendering up to and including turn `k`, and where in it the answer starts [characters]."""
        prompt = self.render(messages[:k], add_generation_prompt=True)
        text = self.render(messages[: k + 1])
        if not text.startswith(prompt):
            raise _NoPrefixError(
                "the chat template renders an answer without its own generation prompt before it, so the assistant's"
                " tokens cannot be told apart: mark them with {% generation %} in the template"
            )
        return text, len(prompt)

    def _tokenise(self, text: str, spans: list[tuple[int, int]]) -> Document:
        """Tokenises `text` and supervises the character ranges `spans`.

        A serving engine tokenises the prompt on its own. Where the answer's first characters would change the tokens
        of the prompt, the two are tokenised apart.
        """
        ids, offsets = self._ids_and_offsets(text)
        prompts = [self._ids_and_offsets(text[:start])[0] for start, _ in spans]
        if any(ids[: len(prompt)] != prompt for prompt in prompts):
            ids, offsets = [], []
            for left, right in itertools.pairwise([0, *(start for start, _ in spans), len(text)]):
                piece_ids, piece_offsets = self._ids_and_offsets(text[left:right])
                ids += piece_ids
                offsets += [(left + begin, left + end) for begin, end in piece_offsets]
        mask = [False] * len(ids)
        for start, end in spans:
            for i, (left, right) in enumerate(offsets):
                # Tokenizers that trim offsets give a token of spaces an empty range at its end.
                mask[i] |= start <= left and start < right <= end
        return self._end_at_stop(ids, mask)

    def _ids_and_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return list(encoded.input_ids), list(encoded.offset_mapping)

    def _encode_marked(self, messages: list[Message]) -> Document:
        encoded = self.tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, **self.template_args
        )
        mask = [bool(flag) for flag in encoded["assistant_masks"]]
        if not any(mask):
            raise ValueError("the chat template's {% generation %} blocks marked no token of an assistant's turn")
        return self._end_at_stop(list(encoded["input_ids"]), mask)

    def _end_at_stop(self, ids: list[int], mask: list[bool]) -> Document:
        """Leaves out what a template writes after the token that ends a turn, such as ChatML's line break: the model
        never emits it."""
        for start, end in _runs(mask):
            stops = [i for i in range(start, end) if ids[i] in self.stop_ids]
            if stops:
                mask[stops[-1] + 1 : end] = [False] * (end - stops[-1] - 1)
        return Document(ids, mask)


class _NoPrefixError(ValueError):
    """A template's generation prompt is not the beginning of what it renders for an answer."""


def _runs(mask: list[bool]) -> Iterator[tuple[int, int]]:
    """The ranges `[start, end)` in which `mask` holds."""
    start = None
    for i, flag in enumerate([*mask, False]):
        if flag and start is None:
            start = i
        elif not flag and start is not None:
            yield start, i
            start = None


def encode_all(
    encoder: ChatEncoder, conversations: list[list[Message]], seq_len: int
) -> tuple[list[Document], Counter[str]]:
    """Documents of at most `seq_len` tokens, and how many were dropped or cut, by cause.

    Raises:
        ValueError: nothing is left to learn from; says why.
    """
    documents, causes = [], Counter[str]()
    for number, messages in enumerate(conversations, 1):
        try:
            encoded = encoder.encode(messages)
        except ValueError as error:
            raise ValueError(f"conversation {number}: {error}") from error
        if not encoded:
            causes["no assistant turn"] += 1
        for document in encoded:
            if len(document.input_ids) > seq_len:
                causes["cut at seq_len"] += 1
                document = Document(document.input_ids[:seq_len], document.loss_mask[:seq_len])
            if document.has_anchor():
                documents.append(document)
            else:
                causes["too short to learn from"] += 1
    if not documents:
        told = ", ".join(f"{count} with {cause}" for cause, count in causes.items())
        raise ValueError(f"no conversation is left to train on: {told}")
    return documents, causes
