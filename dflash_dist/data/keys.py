"""The keys of a row: which are read, which say nothing of the prompt or its supervision, and which forbid its use.

Whatever is left is named with a count where the data is described, so that nothing gets lost in silence.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

# What engines call the thinking before an answer, and what chat templates read: Qwen3 the first, gpt-oss the last.
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
SYSTEM_KEYS = ("system", "system_prompt", "system_message")  # beside the turns, as exports of ShareGPT keep it
TOOL_KEYS = ("tools", "functions")  # OpenAI's name and its older one
THINKING_SWITCHES = ("enable_thinking", "thinking")  # Qwen3's argument of the chat template and DeepSeek's
# Of an assistant's turn: false or 0 makes it context. OpenAI's name first.
SUPERVISION_KEYS = ("weight", "train", "training", "trainable", "loss", "loss_weight")
BEGUN_KEYS = ("prefix", "partial")  # of an assistant's turn that somebody else began

_OF_ANY_CHAT = {*SYSTEM_KEYS, *TOOL_KEYS, "chat_template_kwargs", "finish_reason"}
ROW_KEYS = {
    "messages": frozenset({"messages", *_OF_ANY_CHAT}),
    "conversations": frozenset({"conversations", *_OF_ANY_CHAT}),
    "text": frozenset({"text", "prompt_length", "finish_reason"}),
    "prompt/response": frozenset({"prompt", "response", *REASONING_KEYS, *_OF_ANY_CHAT}),
}
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


def says_nothing(value: Any) -> bool:
    """Whether a key might as well be missing: null or empty."""
    return value is None or (not value and isinstance(value, str | list | dict))


def refused_keys(values: Mapping[str, Any], refused: Mapping[str, str]) -> list[tuple[str, str]]:
    """The keys with which `values` cannot be used, and why."""
    if refused.keys().isdisjoint(values):
        return []
    return [(key, refused[key]) for key in values if key in refused and not says_nothing(values[key])]


def unread_in_row(row: Mapping[str, Any], shape: str) -> Iterator[str]:
    """The keys of a row beside its turns that nothing reads and that might matter."""
    for key in _others(row, ROW_KEYS[shape]):
        if not (key in THINKING_SWITCHES and isinstance(row[key], bool)):
            yield key


def unread_in_message(message: Mapping[str, Any]) -> Iterator[str]:
    """The same of a message, of its tool calls and of the parts of its content."""
    known = ANSWER_KEYS if message["role"] == "assistant" else MESSAGE_KEYS
    if not message.keys() <= known:
        yield from _others(message, known, "message.")
    for key, known in (("tool_calls", CALL_KEYS), ("content", PART_KEYS)):
        if isinstance(message.get(key), list):
            for part in filter(_is_object, message[key]):
                yield from _others(part, known, f"message.{key}.")
                if _is_object(part.get("function")):
                    yield from _others(part["function"], CALL_KEYS, f"message.{key}.function.")


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _others(values: Mapping[str, Any], known: Collection[str], prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        if key not in known and key not in LABELS and not says_nothing(value):
            yield prefix + key
