"""The keys of a row: which tell its shape, which are read, which say nothing of the prompt or its supervision, and
which forbid its use.

Whatever is left is named with a count where the data is described, so that nothing gets lost in silence.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from dflash_dist.data.account import BadRow

# shape -> the keys that tell it; where a row has the keys of several, the first counts
SHAPES = {
    "messages": ("messages",),
    "conversations": ("conversations",),
    "text": ("text", "prompt_length"),
    "prompt/response": ("prompt", "response"),
}
# What engines call the thinking before an answer, and what chat templates read: Qwen3 the first, gpt-oss the last.
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
SYSTEM_KEYS = ("system", "system_prompt", "system_message")  # beside the turns, as exports of ShareGPT keep it
TOOL_KEYS = ("tools", "functions")  # OpenAI's name and its older one
THINKING_SWITCHES = ("enable_thinking", "thinking")  # Qwen3's argument of the chat template and DeepSeek's
# Of an assistant's turn: false or 0 makes it context. OpenAI's name first.
SUPERVISION_KEYS = ("weight", "train", "training", "trainable", "loss", "loss_weight")
BEGUN_KEYS = ("prefix", "partial")  # of an assistant's turn that somebody else began

_OF_ANY_CHAT = {*SYSTEM_KEYS, *TOOL_KEYS, "chat_template_kwargs"}
_MORE_KEYS = {  # beside those that tell the shape
    "messages": _OF_ANY_CHAT,
    "conversations": _OF_ANY_CHAT,
    "text": set(),
    "prompt/response": {*REASONING_KEYS, *_OF_ANY_CHAT},
}
ROW_KEYS = {shape: frozenset({*keys, *_MORE_KEYS[shape], "finish_reason"}) for shape, keys in SHAPES.items()}
MESSAGE_KEYS = frozenset({"role", "content", "name", "tool_call_id", *SUPERVISION_KEYS})
ANSWER_KEYS = MESSAGE_KEYS | {*REASONING_KEYS, *BEGUN_KEYS, "tool_calls", "function_call"}
CALL_KEYS = frozenset({"id", "type", "function", "name", "arguments", "index"})
PART_KEYS = frozenset({"type", "text", "cache_control", "annotations"})

# Names, sources, ratings and counts of a row or a message, whatever they say.
_LABELS = """
    id ids uuid idx index row row_id hash message_id conversation_id prompt_id parent_id
    source sources dataset subset split origin url link license version author generator created created_at timestamp
    model model_name object usage logprobs system_fingerprint service_tier
    category categories topic task task_type domain tags language lang title difficulty
    quality score scores rating num_turns num_tokens token_count metadata meta extra extra_info annotations
    toxic redacted openai_moderation detoxify_moderation
"""
LABELS = frozenset(_LABELS.split())

_MEDIA = dict.fromkeys(
    ("image", "images", "audio", "audios", "video", "videos"), "the prompt had more than text, which no draft is given"
)
_RETRIEVED = "it stood in the prompt, and is not rendered"
_MASKS = "it says what is supervised, in a form that is not read: give assistant turns 'weight': 0 or 1"
REFUSED_IN_ROW = _MEDIA | {
    "documents": _RETRIEVED,
    "history": "earlier turns stood in the prompt: give all of them as 'messages'",
}
REFUSED_IN_MESSAGE = _MEDIA | {
    "documents": _RETRIEVED,
    "tools": "tools are read beside the messages only",
    **dict.fromkeys(("mask", "masked", "loss_mask", "loss_scale", "train_detail", "training_detail"), _MASKS),
}
REFUSED_IN_CALL = dict.fromkeys(
    ("parameters", "args", "kwargs", "input"), "the arguments of a call must stand under 'arguments'"
)


def shapes_of(row: Mapping[str, Any]) -> list[str]:
    """The shapes whose keys a row has, the one that counts first."""
    return [shape for shape, keys in SHAPES.items() if all(key in row for key in keys)]


def says_nothing(value: Any) -> bool:
    """Whether a key might as well be missing: null or empty."""
    return value is None or (not value and isinstance(value, str | list | dict))


def refuse_keys(values: Mapping[str, Any], refused: Mapping[str, str]) -> None:
    """Raises a BadRow that names a key with which `values` cannot be used, and why."""
    for key in values:
        if key in refused and not says_nothing(values[key]):
            raise BadRow(f"unusable key '{key}': {refused[key]}")


def unread_in_row(row: Mapping[str, Any], shape: str) -> Iterator[str]:
    """The keys of a row beside its turns that nothing reads and that might matter."""
    for key in _others(row, ROW_KEYS[shape]):
        if not (key in THINKING_SWITCHES and isinstance(row[key], bool)):
            yield key


def unread_in_message(message: Mapping[str, Any]) -> Iterator[str]:
    """The same of a message, of its tool calls and of the parts of its content."""
    yield from _others(message, ANSWER_KEYS if message["role"] == "assistant" else MESSAGE_KEYS, "message.")
    for key, known in (("tool_calls", CALL_KEYS), ("content", PART_KEYS)):
        parts = message.get(key)
        for part in parts if isinstance(parts, list) else ():
            if isinstance(part, dict):
                yield from _others(part, known, f"message.{key}.")
                if isinstance(part.get("function"), dict):
                    yield from _others(part["function"], CALL_KEYS, f"message.{key}.function.")


def _others(values: Mapping[str, Any], known: Collection[str], prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        if key not in known and key not in LABELS and not says_nothing(value):
            yield prefix + key
