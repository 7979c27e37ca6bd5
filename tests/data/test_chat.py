from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from dflash_dist.data.account import BadRow
from dflash_dist.data.chat import ChatEncoder, Document
from dflash_dist.data.conversations import Conversation, Message, Text
from dflash_dist.target.tiny import CHATML, SPECIAL, tiny_tokenizer

STOP = 2  # <|im_end|> of the tiny tokenizer

# ChatML whose template itself marks the answers. Line breaks are expressions: Jinja drops a break after a block.
MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ message.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Its generation prompt opens a block that no answer is rendered with.
FORCED = CHATML.replace("<|im_start|>assistant\n", "<|im_start|>assistant\n<think>\n")
FORCED_MARKED = MARKED.replace("assistant\n' }}{% endif %}", "assistant\n<think>\n' }}{% endif %}")
# Thinking is dropped from the history.
FORGETFUL, FORGETFUL_MARKED = (
    template.replace("message.content", "(message.content if loop.last else message.content.split('</think>')[-1])")
    for template in (CHATML, MARKED)
)
# The generation prompt ends in text that can grow together with an answer.
COLON, COLON_MARKED = (
    template.replace("{{ message.role }}\n", "{{ message.role }}:")
    .replace("message.role + '\n'", "message.role + ':'")
    .replace("assistant\n", "assistant:")
    for template in (CHATML, MARKED)
)


def turns(*contents: str, system: str | None = None) -> list[Message]:
    """Messages in which user and assistant take turns."""
    head = [{"role": "system", "content": system}] if system is not None else []
    return head + [
        {"role": role, "content": text} for role, text in zip(itertools.cycle(["user", "assistant"]), contents)
    ]


def make_encoder(template: str, **options: object) -> ChatEncoder:
    return ChatEncoder(tiny_tokenizer(), [STOP], chat_template=template, **options)


def byte_tokenizer(
    *merges: tuple[str, str], special: Sequence[str] = SPECIAL, template: str = CHATML
) -> PreTrainedTokenizerFast:
    """The tiny tokenizer with BPE merges of its byte tokens, where a line break is written Ċ and a space Ġ, or with
    other special tokens."""
    tokens = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet()), *(left + right for left, right in merges)]
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(special))
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", chat_template=template)


def ids(encoder: ChatEncoder, text: str) -> list[int]:
    return encoder.tokenizer(text, add_special_tokens=False).input_ids


def text_of(encoder: ChatEncoder, tokens: Sequence[int] | np.ndarray) -> str:
    return encoder.tokenizer.decode(tokens, skip_special_tokens=False)


def supervised(encoder: ChatEncoder, document: Document) -> list[str]:
    """The text of each supervised range."""
    return [text_of(encoder, document.input_ids[begin:end]) for begin, end in document.supervised]


def rendered(text: str, prompt_length: int) -> Text:
    """Of which the target wrote what follows the prompt."""
    return Text(text, [(prompt_length, len(text))])


def encode(encoder: ChatEncoder, messages: list[Message], **more: object) -> list[Document]:
    return encoder.encode(Conversation(messages, **more))


def answers(encoder: ChatEncoder, messages: list[Message], **more: object) -> list[list[str]]:
    """What is supervised in each document."""
    return [supervised(encoder, document) for document in encode(encoder, messages, **more)]


def plain(documents: list[Document]) -> list[tuple[list[int], list[tuple[int, int]]]]:
    """Documents that can be compared."""
    return [(document.input_ids.tolist(), document.supervised) for document in documents]


# Which tokens are supervised

MARKS = pytest.mark.parametrize(
    ("begin", "end"),
    [
        ("{% generation %}", "{% endgeneration %}"),
        ("{%- generation -%}", "{%- endgeneration -%}"),
        ("{%- generation %}", "{%- endgeneration %}"),
        ("{%generation%}", "{%endgeneration%}"),
    ],
)
TEMPLATES = pytest.mark.parametrize("template", [CHATML, MARKED], ids=["plain", "marked"])
# The same, and a template that only its own marks tell apart.
ALL_TEMPLATES = pytest.mark.parametrize(
    "template", [CHATML, MARKED, FORCED_MARKED], ids=["plain", "marked", "only marked"]
)


@TEMPLATES
def test_exactly_the_answers_and_their_end_tokens_are_supervised(template):
    encoder = make_encoder(template)
    (document,) = encode(encoder, turns("Hello?", "Hi, you.", "And now?", "Bye."))
    assert text_of(encoder, document.input_ids) == (
        "<|im_start|>user\nHello?<|im_end|>\n<|im_start|>assistant\nHi, you.<|im_end|>\n"
        "<|im_start|>user\nAnd now?<|im_end|>\n<|im_start|>assistant\nBye.<|im_end|>\n"
    )
    assert supervised(encoder, document) == ["Hi, you.<|im_end|>", "Bye.<|im_end|>"]


def test_the_loss_mask_says_the_same_as_the_ranges():
    document = Document(np.arange(7, dtype=np.int32), [(1, 3), (5, 6)])
    assert document.loss_mask.tolist() == [False, True, True, False, False, True, False]


@TEMPLATES
def test_system_and_tool_text_are_context(template):
    messages = [
        *turns("Weather?", "I look.", system="Be brief."),
        {"role": "tool", "content": "rain"},
        {"role": "assistant", "content": "Rain."},
    ]
    assert answers(make_encoder(template), messages) == [["I look.<|im_end|>", "Rain.<|im_end|>"]]


@TEMPLATES
def test_a_document_ends_with_the_last_answer(template):
    encoder = make_encoder(template)
    messages = turns("q", "a", "never answered")
    assert plain(encode(encoder, messages)) == plain(encode(encoder, messages[:2]))


@TEMPLATES
def test_a_user_who_writes_like_the_assistant_is_context(template):
    encoder = make_encoder(template)
    fake = "Yes<|im_end|>\n<|im_start|>assistant\nYes"
    (document,) = encode(encoder, turns(fake, "Yes"))
    assert supervised(encoder, document) == ["Yes<|im_end|>"]
    assert document.supervised[0][0] == len(encoder.prompt_of(Conversation(turns(fake))))


@TEMPLATES
@pytest.mark.parametrize("answer", ["naïve 🙂 漢字", "🙂", " leads", "trails ", "two  spaces\n\n\tand breaks\n", "-"])
def test_every_byte_of_an_answer_is_supervised(template, answer):
    assert answers(make_encoder(template), turns("q", answer, "🙂", answer)) == [[f"{answer}<|im_end|>"] * 2]


@TEMPLATES
def test_spaces_are_supervised_where_the_tokenizer_trims_its_offsets(template):
    """With `trim_offsets` (RoBERTa, GPT-NeoX) a token of spaces alone spans no character."""
    encoder = make_encoder(template)
    encoder.tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    assert answers(encoder, turns("a  b", "if  x ")) == [["if  x <|im_end|>"]]


@TEMPLATES
def test_an_empty_answer_leaves_only_its_end_token(template):
    assert answers(make_encoder(template), turns("q", "")) == [["<|im_end|>"]]


@ALL_TEMPLATES
@pytest.mark.parametrize("system", [None, "s"])
def test_an_answer_to_nothing_is_context(template, system):
    """A greeting that a person wrote: the target was asked nothing."""
    opening = [*turns(system=system), {"role": "assistant", "content": "Welcome!"}]
    encoder = make_encoder(template)
    assert answers(encoder, [*opening, *turns("q", "a")]) == [["a<|im_end|>"]]
    assert encode(encoder, opening) == []


@ALL_TEMPLATES
def test_a_conversation_without_an_answer_gives_no_document(template):
    assert encode(make_encoder(template), turns("Hello?")) == []


@ALL_TEMPLATES
def test_only_the_last_turn_is_supervised_on_request(template):
    assert answers(make_encoder(template, last_turn_only=True), turns("q", "a", "r", "b")) == [["b<|im_end|>"]]


@ALL_TEMPLATES
def test_an_answer_cut_by_the_length_limit_ends_where_the_target_was_stopped(template):
    encoder = make_encoder(template)
    documents = encode(encoder, turns("q", "a", "r", "b and"), finished=False)
    assert [supervised(encoder, document) for document in documents] == [["a<|im_end|>", "b and"]]
    assert text_of(encoder, documents[0].input_ids).endswith("<|im_start|>assistant\nb and")


@ALL_TEMPLATES
@pytest.mark.parametrize("answer", ["end", "|", "<", "m_e"])
def test_a_cut_answer_that_reads_like_a_piece_of_the_end_token_ends_before_that(template, answer):
    assert answers(make_encoder(template), turns("q", answer), finished=False) == [[answer]]


@TEMPLATES
def test_earlier_answers_of_a_cut_conversation_are_whole(template):
    assert answers(make_encoder(template), turns("q", "a", "r"), finished=False) == [["a<|im_end|>"]]


def test_dropping_the_reasoning_drops_nothing_else():
    encoder = make_encoder(CHATML, drop_reasoning=True)
    messages = turns("q", "<think>\nhm\n</think>\n\nok </think", "r", "\n  verse\n")
    assert answers(encoder, messages) == [["ok </think<|im_end|>", "\n  verse\n<|im_end|>"]]


@MARKS
def test_marks_give_the_documents_that_the_plain_template_gives(begin, end):
    marked = MARKED.replace("{% generation %}", begin).replace("{% endgeneration %}", end)
    messages = turns("Hello?", "Hi.", "More 🙂?", "  Bye.", system="s")
    assert plain(encode(make_encoder(marked), messages)) == plain(encode(make_encoder(CHATML), messages))


def test_a_mark_around_the_line_break_after_the_end_token_does_not_supervise_it():
    wide = FORCED_MARKED.replace("<|im_end|>{% endgeneration %}", "{{ '<|im_end|>\n' }}{% endgeneration %}").replace(
        "{% endif %}{{ '\n' }}{% endfor %}", "{{ '\n' }}{% endif %}{% endfor %}"
    )
    messages = turns("Hello?", "Hi.", "More?", "Bye.")
    assert plain(encode(make_encoder(wide), messages)) == plain(encode(make_encoder(CHATML), messages))


def test_any_of_several_stop_tokens_ends_the_turn():
    encoder = ChatEncoder(tiny_tokenizer(), [0, STOP], chat_template=CHATML.replace("<|im_end|>", "<pad>"))
    assert answers(encoder, turns("q", "one", "r", "two")) == [["one<pad>", "two<pad>"]]


@pytest.mark.parametrize(
    ("written", "expected"), [("a<|im_end|>\n", "a<|im_end|>"), ("a<|im_end|>", "a<|im_end|>"), ("a, cut", "a, cut")]
)
def test_of_a_rendered_text_what_follows_the_prompt_is_supervised_up_to_the_end_of_the_turn(written, expected):
    encoder = make_encoder(CHATML)
    prompt = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    (document,) = encoder.encode(rendered(prompt + written, len(prompt)))
    assert text_of(encoder, document.input_ids) == prompt + written
    assert supervised(encoder, document) == [expected]


@pytest.mark.parametrize("more", ["", " more", "<|im_start|>user\nnext", "<|im_end|>"])
def test_an_answer_is_supervised_up_to_its_first_end_token(more):
    """There the target stops. For later turns the rest is context, as an engine would prefill it."""
    encoder = make_encoder(CHATML)
    (document,) = encode(encoder, turns("q", f"one<|im_end|>{more}", "r", "two"))
    assert supervised(encoder, document) == ["one<|im_end|>", "two<|im_end|>"]
    assert f"one<|im_end|>{more}<|im_end|>\n<|im_start|>user\nr" in text_of(encoder, document.input_ids)
    before = encoder.prompt_of(Conversation(turns("q", f"one<|im_end|>{more}", "r")))
    assert document.input_ids[: document.supervised[1][0]].tolist() == before


@pytest.mark.parametrize("template", [CHATML, MARKED, FORCED_MARKED, FORGETFUL])
def test_an_answer_that_goes_on_behind_its_end_is_cut_there_under_every_template(template):
    messages = turns("q", "one<|im_end|>\nmore", "r", "two<|im_end|>more")
    found = answers(make_encoder(template), messages)
    assert [text for document in found for text in document] == ["one<|im_end|>", "two<|im_end|>"]
    assert answers(make_encoder(template), messages[:2], finished=False) == [["one<|im_end|>"]]


def test_any_token_that_ends_a_turn_ends_an_answer():
    encoder = ChatEncoder(tiny_tokenizer(), [0, STOP], chat_template=CHATML)
    assert answers(encoder, turns("q", "one<pad>two")) == [["one<pad>"]]


def test_of_a_rendered_text_only_the_first_turn_behind_the_prompt_is_supervised():
    """What a user wrote later is not the target's."""
    encoder = make_encoder(CHATML)
    text = encoder.template.render(turns("q", "one", "r", "two"))
    (document,) = encoder.encode(rendered(text, text.index("one")))
    assert supervised(encoder, document) == ["one<|im_end|>"]


@pytest.mark.parametrize(
    ("row", "goes_on"),
    [
        (Conversation(turns("q", "one<|im_end|>two")), True),
        (Conversation(turns("q", "one", "r", "two<|im_end|>\n.")), True),
        (Conversation(turns("q", "one<|im_end|>\n")), False),  # the template's own follows, and nothing is lost
        (Conversation(turns("q<|im_end|>q", "one")), False),
        (Conversation([{"role": "assistant", "content": "Hi<|im_end|>!"}, *turns("q", "one")]), False),
        (Conversation([*turns("q"), {"role": "assistant", "content": "a", "reasoning_content": "<|im_end|>"}]), True),
        (rendered("q:one<|im_end|>two", 2), True),
        (rendered("<|im_end|>q:one<|im_end|>\n", 12), False),
    ],
)
def test_it_is_known_whether_an_answer_goes_on_behind_its_end(row, goes_on):
    assert make_encoder(CHATML).goes_on(row) == goes_on


# Templates that render a turn differently once others follow it

THOUGHTS = turns("one", "<think>hm</think>first", "two", "<think>ah</think>second", "three", "third")


def test_a_template_that_rewrites_history_gives_one_document_an_answer():
    encoder = make_encoder(FORGETFUL)
    documents = encode(encoder, THOUGHTS)
    assert [supervised(encoder, document) for document in documents] == [
        ["<think>hm</think>first<|im_end|>"],
        ["<think>ah</think>second<|im_end|>"],
        ["third<|im_end|>"],
    ]
    assert text_of(encoder, documents[1].input_ids) == (
        "<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\nfirst<|im_end|>\n"
        "<|im_start|>user\ntwo<|im_end|>\n<|im_start|>assistant\n<think>ah</think>second<|im_end|>\n"
    )


def test_a_rewritten_history_gives_one_document_where_nothing_was_rewritten():
    assert answers(make_encoder(FORGETFUL), turns("q", "a", "r", "b")) == [["a<|im_end|>", "b<|im_end|>"]]


def test_of_the_documents_of_a_rewritten_history_only_the_last_is_cut():
    assert answers(make_encoder(FORGETFUL), THOUGHTS, finished=False) == [
        ["<think>hm</think>first<|im_end|>"],
        ["<think>ah</think>second<|im_end|>"],
        ["third"],
    ]


def test_marks_do_not_hide_that_history_is_rewritten():
    """Trained in one document, the history's answers would follow prompts that no server sends."""
    assert plain(encode(make_encoder(FORGETFUL_MARKED), THOUGHTS)) == plain(encode(make_encoder(FORGETFUL), THOUGHTS))


# Answers that are context


@pytest.mark.parametrize(
    "template", [CHATML, MARKED, FORCED_MARKED, FORGETFUL], ids=["", "marked", "only marked", "own"]
)
@pytest.mark.parametrize("context", [{1}, {3}, {5}, {1, 3}, {3, 5}, set()])
def test_an_answer_of_no_weight_is_rendered_and_not_supervised(template, context):
    encoder, messages = make_encoder(template), turns("q", "a", "r", "b", "s", "c")
    marked = [message | ({"weight": 0} if k in context else {}) for k, message in enumerate(messages)]
    [document] = encode(encoder, marked)
    assert supervised(encoder, document) == [
        f"{messages[k]['content']}<|im_end|>" for k in (1, 3, 5) if k not in context
    ]
    whole = ids(encoder, encoder.template.render(messages))
    assert document.input_ids.tolist() == whole[: len(document.input_ids)]
    last = max({1, 3, 5} - context) if template != FORCED_MARKED else 5
    assert text_of(encoder, document.input_ids).rstrip().endswith(f"{messages[last]['content']}<|im_end|>")


def test_of_no_weight_at_all_nothing_is_left():
    messages = [message | {"weight": 0} for message in turns("q", "a")]
    assert encode(make_encoder(CHATML), messages) == []
    last = [*turns("q", "a", "r"), {"role": "assistant", "content": "b", "weight": 0}]
    assert encode(make_encoder(CHATML, last_turn_only=True), last) == []


def test_a_template_never_sees_a_weight():
    encoder = make_encoder("{% for m in messages %}{{ m.weight }}{% endfor %}" + CHATML)
    answer = {"role": "assistant", "content": "a"}
    context, learned = (encoder.prompt_of(Conversation([message])) for message in (answer | {"weight": 0}, answer))
    assert context == learned


# What cannot be told apart is refused


def test_a_template_whose_answers_lack_its_generation_prompt_is_refused():
    with pytest.raises(BadRow, match="without its own generation prompt"):
        encode(make_encoder(FORCED), turns("q", "a"))


@MARKS
def test_marks_tell_the_answers_where_the_generation_prompt_cannot(begin, end):
    encoder = make_encoder(FORCED_MARKED.replace("{% generation %}", begin).replace("{% endgeneration %}", end))
    assert text_of(encoder, encoder.prompt_of(Conversation(turns("q")))).endswith("assistant\n<think>\n")
    assert answers(encoder, turns("q", "a", "r", "b")) == [["a<|im_end|>", "b<|im_end|>"]]


def test_marks_that_mark_nothing_are_refused():
    nowhere = FORCED_MARKED.replace("message.role == 'assistant'", "false")
    with pytest.raises(BadRow, match="marked no text"):
        encode(make_encoder(nowhere), turns("q", "a"))


def test_a_cut_thought_that_the_template_does_not_render_is_refused():
    cut = {"role": "assistant", "content": "", "reasoning_content": "hm"}
    with pytest.raises(BadRow, match="cut answer"):
        encode(make_encoder(CHATML), [*turns("q"), cut], finished=False)


def test_a_tokenizer_without_a_template_is_refused():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r"has no chat template: add chat_template\.jinja"):
        ChatEncoder(tokenizer, [STOP])


@pytest.mark.parametrize(
    ("stumble", "reason"),
    [
        ("{{ raise_exception('System role not supported') }}", "System role not supported"),
        ("{{ 'system: ' + none }}", "can only concatenate str"),
        ("{{ messages.absent.more }}", "absent"),
    ],
)
def test_where_the_template_refuses_or_stumbles_the_row_is_at_fault(stumble, reason):
    template = "{% if messages[0].role == 'system' %}" + stumble + "{% endif %}" + CHATML
    with pytest.raises(BadRow, match=reason) as refusal:
        encode(make_encoder(template), turns("q", "a", system="s"))
    assert refusal.value.cause == "refused by the chat template"


# The encoder's own settings


def test_the_template_that_is_named_takes_the_place_of_the_tokenizers_own():
    encoder = ChatEncoder(tiny_tokenizer(), [STOP], chat_template=COLON)
    assert (
        encoder.template.render(turns("q"), add_generation_prompt=True)
        == "<|im_start|>user:q<|im_end|>\n<|im_start|>assistant:"
    )


def test_template_arguments_reach_the_template():
    encoder = make_encoder("{{ style }}" + CHATML, template_args={"style": "brief"})
    assert encoder.template.render(turns("q")).startswith("brief<|im_start|>")


@pytest.mark.parametrize(
    ("template", "given", "message"),
    [
        ("{{ style }}", {"stile": "brief"}, "knows no argument 'stile': did you mean 'style'?"),
        ("{{ style }}", {"style:brief": None}, "knows no argument 'style:brief': did you mean 'style'?"),
        ("{{ style }}", {"style": None}, "argument 'style' has no value"),
        ("{{ style }}{{ bos_token }}", {"x": 1}, "knows no argument 'x': it knows bos_token, style"),
        ("", {"x": 1}, "knows no argument 'x': it takes none"),
        ("{{ tools }}", {"tools": []}, "knows no argument 'tools': it takes none"),
        ("{% if", {}, "not valid Jinja: line 1: "),
    ],
)
def test_an_argument_that_would_vanish_is_refused(template, given, message):
    with pytest.raises(ValueError, match="the chat template.* " + re.escape(message)):
        make_encoder(template + CHATML, template_args=given)


@pytest.mark.parametrize(
    "template",
    [
        "{% if style is defined %}x{% endif %}",
        "{% if not style is defined %}{% set style = 1 %}{% endif %}{{ style }}",
        "{% macro shout(text) %}{{ style }}{{ text }}{% endmacro %}{{ shout('x') }}",
        "{% set ns = namespace(x=style) %}{{ ns.x }}",
        "{% for m in messages if style %}x{% endfor %}",
        "{% set style = style | default('x') %}{{ style }}",
        "{% generation %}{{ style }}{% endgeneration %}",
    ],
)
def test_an_argument_is_known_wherever_the_template_takes_it(template):
    assert make_encoder(template + CHATML, template_args={"style": "x"}).template.known_args == {"style"}


def test_of_several_templates_each_may_take_an_argument():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = {"default": CHATML, "tool_use": "{{ style }}" + CHATML}
    assert ChatEncoder(tokenizer, [STOP], {"style": "x"}).template.known_args == {"style"}


DATED = "{{ strftime_now('%d.%m.%y %H:%M') }}" + CHATML


def test_a_template_writes_the_day_that_it_is_told():
    encoder = make_encoder(DATED, date="2024-02-29")
    assert encoder.writes_date
    for rendered in (encoder.template.render(turns("q")), encoder.texts(Conversation(turns("q", "a")))[0].text):
        assert rendered.startswith("29.02.24 00:00<|im_start|>")
    marked = make_encoder("{{ strftime_now('%Y') }}" + FORCED_MARKED, date="2024-02-29")
    assert marked.texts(Conversation(turns("q", "a")))[0].text.startswith("2024<|im_start|>")
    now = encoder.tokenizer.apply_chat_template(turns("q"), chat_template=DATED, tokenize=False)
    assert not now.startswith("29.02.24"), "others keep their clock"


def test_the_day_belongs_to_the_identity_only_where_it_is_written():
    days = ("2024-02-29", "2024-03-01")
    assert len({make_encoder(DATED, date=day).identity for day in days}) == 2
    assert len({make_encoder(CHATML, date=day).identity for day in days}) == 1
    # as Llama 3.2 does it
    own = "{% if not date_string is defined %}{% set date_string = strftime_now('%Y') %}{% endif %}{{ date_string }}"
    stated = [make_encoder(own + CHATML, template_args={"date_string": "now"}, date=day) for day in days]
    assert {encoder.writes_date for encoder in stated} == {False}
    assert len({encoder.identity for encoder in stated}) == 1
    assert len({make_encoder(own + CHATML, date=day).identity for day in days}) == 2
    beside = "{% if tools %}{{ strftime_now('%Y') }}{% endif %}{{ style }}" + CHATML
    assert make_encoder(beside, template_args={"style": "x"}).writes_date, "for all that is known"


def test_the_identity_changes_with_everything_that_could_change_a_document():
    encoders = [
        make_encoder(CHATML),
        make_encoder(COLON),
        make_encoder("{{ style }}" + CHATML),
        make_encoder("{{ style }}" + CHATML, template_args={"style": "brief"}),
        make_encoder(CHATML, last_turn_only=True),
        make_encoder(CHATML, drop_reasoning=True),
        ChatEncoder(tiny_tokenizer(), [0, STOP]),
        ChatEncoder(byte_tokenizer(("a", "b")), [STOP]),
    ]
    assert len({encoder.identity for encoder in encoders}) == len(encoders)
    assert make_encoder(CHATML).identity == encoders[0].identity
    assert ChatEncoder(tiny_tokenizer(), (STOP, 0)).identity == encoders[6].identity


def test_a_stop_token_fills_what_is_empty_where_the_tokenizer_has_no_padding():
    tokenizer = tiny_tokenizer()
    assert ChatEncoder(tokenizer, [3, STOP]).pad_id == 0
    tokenizer.pad_token = None
    assert ChatEncoder(tokenizer, [3, STOP]).pad_id == STOP


# Tokens that the target's embedding has no row for


def test_a_token_without_an_embedding_is_a_bad_row():
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<tool>"])  # 260, as a model's embedding of 260 rows has not
    encoder = ChatEncoder(tokenizer, [STOP], vocab_size=260)
    for messages in (turns("q", "a <tool>"), turns("<tool> q", "a")):
        with pytest.raises(
            BadRow, match=r"^unknown token: '<tool>' is token 260 .* the target's embedding has 260 rows$"
        ):
            encode(encoder, messages)
    with pytest.raises(BadRow, match="unknown token"):
        encoder.prompt_of(Conversation(turns("<tool>")))
    assert plain(encode(encoder, turns("q", "a"))) == plain(encode(make_encoder(CHATML), turns("q", "a")))
    for rows in (None, 261):
        assert 260 in ChatEncoder(tokenizer, [STOP], vocab_size=rows).prompt_of(Conversation(turns("<tool>")))


def test_a_padding_token_without_an_embedding_is_nobodys_business():
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<new>"})
    assert ChatEncoder(tokenizer, [3, STOP], vocab_size=260).pad_id == STOP
    assert ChatEncoder(tokenizer, [3, STOP], vocab_size=261).pad_id == 260
    assert ChatEncoder(tokenizer, [3, STOP]).pad_id == 260


def test_the_size_of_the_embedding_is_part_of_the_identity_where_it_can_matter():
    tokenizer = tiny_tokenizer()
    small, same, none = (ChatEncoder(tokenizer, [STOP], vocab_size=rows) for rows in (259, 260, None))
    assert small.identity != same.identity == none.identity


# Tokens at the border between prompt and answer


def test_the_prompt_is_the_rendering_up_to_where_the_assistant_writes():
    encoder = make_encoder(CHATML)
    messages = turns("one", "first", "two", system="s")
    assert text_of(encoder, encoder.prompt_of(Conversation(messages))) == (
        "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\nfirst<|im_end|>\n"
        "<|im_start|>user\ntwo<|im_end|>\n<|im_start|>assistant\n"
    )


def test_the_prompt_leaves_out_the_reasoning_that_training_leaves_out():
    encoder = make_encoder(CHATML, drop_reasoning=True)
    with_reasoning, without = turns("q", "<think>hm</think>a", "r"), turns("q", "a", "r")
    assert encoder.prompt_of(Conversation(with_reasoning)) == encoder.prompt_of(Conversation(without))


@pytest.mark.parametrize("template", [COLON, COLON_MARKED], ids=["plain", "marked"])
def test_a_merge_across_the_prompts_end_is_split_there(template):
    encoder = ChatEncoder(byte_tokenizer((":", "-"), template=template), [STOP])
    assert len(ids(encoder, ":-")) == 1
    (document,) = encode(encoder, turns("q", "-a :-"))
    prompt = ids(encoder, "<|im_start|>user:q<|im_end|>\n<|im_start|>assistant:")
    answer = ids(encoder, "-a :-<|im_end|>")
    assert document.input_ids.dtype == np.int32
    assert document.input_ids.tolist() == prompt + answer + ids(encoder, "\n")
    assert document.supervised == [(len(prompt), len(prompt) + len(answer))]
    assert ids(encoder, ":-")[0] in answer  # a merge inside the answer stays


def test_a_merge_across_any_answers_start_is_split_there():
    encoder = ChatEncoder(byte_tokenizer((":", "-"), template=COLON), [STOP])
    assert answers(encoder, turns("q", "a", "r", "-b", "s", "-c")) == [["a<|im_end|>", "-b<|im_end|>", "-c<|im_end|>"]]


def test_line_breaks_at_the_prompts_end_are_tokenised_as_in_the_prompt_alone():
    """GPT-2's pattern takes `\\n\\n` apart before a letter, but leaves it whole at the end of a text, so here a token
    ends where the answer starts and the prompt's tokens differ all the same."""
    breaks = CHATML.replace("{{ message.role }}\n", "{{ message.role + '\n\n' }}").replace(
        "assistant\n", "assistant\n\n"
    )
    encoder = ChatEncoder(byte_tokenizer(("Ċ", "Ċ"), template=breaks), [STOP])
    (document,) = encode(encoder, turns("q", "abc"))
    prompt = ids(encoder, "<|im_start|>user\n\nq<|im_end|>\n<|im_start|>assistant\n\n")
    assert encoder.prompt_of(Conversation(turns("q"))) == prompt
    assert document.input_ids.tolist() == prompt + ids(encoder, "abc<|im_end|>") + ids(encoder, "\n")
    assert supervised(encoder, document) == ["abc<|im_end|>"]


MERGES = ((":", "-"), ("Ċ", "Ċ"), ("Ġ", "Ġ"), ("Ġ", "a"), ("a", "b"), ("ab", ":"))


def trimming_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer(*MERGES)
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=True)
    return tokenizer


def prefix_space_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer(*MERGES)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return tokenizer


def metaspace_tokenizer(prepend: str) -> PreTrainedTokenizerFast:
    """Spaces are written ▁, and one is put in front: of the beginning only, of what follows a special token too, never,
    or, as Llama 2 has it, by the normaliser."""
    merges = [(left.replace("Ġ", "▁"), right.replace("Ġ", "▁")) for left, right in MERGES if "Ċ" not in left]
    tokens = [*SPECIAL, *"▁:-ab\né", *(left + right for left, right in merges)]
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    if prepend == "by the normaliser":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=prepend)
    backend.add_special_tokens(list(SPECIAL))
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", chat_template=CHATML)


PREPENDING = {
    "prefix space": prefix_space_tokenizer(),
    "first": metaspace_tokenizer("first"),
    "always": metaspace_tokenizer("always"),
    "by the normaliser": metaspace_tokenizer("by the normaliser"),
}
TOKENIZERS = {
    "bytes": tiny_tokenizer(),
    "merges": byte_tokenizer(*MERGES),
    "trimmed offsets": trimming_tokenizer(),
    "never": metaspace_tokenizer("never"),
    **PREPENDING,
}


@cache
def encoder_for(name: str) -> ChatEncoder:
    """One for all examples, since it remembers what it tokenised."""
    return ChatEncoder(TOKENIZERS[name], [0])


PIECES = st.sampled_from([*":-ab\né ", "  ", "\n\n", "<|im_start|>", "<|im_end|>"])
TEXTS = st.lists(PIECES, min_size=1, max_size=8).map("".join)


@pytest.mark.parametrize("name", TOKENIZERS)
@given(prompt=TEXTS, answer=TEXTS)
def test_an_answer_follows_the_very_tokens_of_its_prompt(name, prompt, answer):
    """And is tokenised with it where that changes nothing: the reference tokenises the whole prompt to know."""
    encoder = encoder_for(name)
    before, whole = ids(encoder, prompt), ids(encoder, prompt + answer)
    (document,) = encoder.tokenise([Text(prompt + answer, [(len(prompt), len(prompt + answer))])])
    agrees = whole[: len(before)] == before
    assert document.input_ids.tolist() == (whole if agrees else before + ids(encoder, answer))
    assert document.supervised == [(len(before), len(document.input_ids))]


@pytest.mark.xfail(strict=True, reason="these tokenizers put a space in front of every text they are given")
@pytest.mark.parametrize("name", PREPENDING)
def test_no_space_is_put_in_front_of_an_answer_that_is_tokenised_apart(name):
    encoder = ChatEncoder(PREPENDING[name], [STOP])
    (document,) = encoder.tokenise([Text("<|im_start|>a:-a<|im_end|>", [(14, 26)])])
    assert text_of(encoder, document.input_ids[:-3])[-1] == ":"
    assert encoder.tokenizer.convert_ids_to_tokens(document.input_ids[-3:]) == ["-", "a", "<|im_end|>"]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_many_texts_at_once_give_the_documents_that_they_give_one_by_one(name):
    encoder = ChatEncoder(TOKENIZERS[name], [STOP], chat_template=COLON)
    contents = ["a", "-b", " :-", "é\n\n", "ab" * 50, "-" * 9]
    texts = [
        text
        for first, second in itertools.permutations(contents, 2)
        for text in encoder.texts(Conversation(turns(first, second, second, first)))
    ]
    together = plain(encoder.tokenise(texts))
    assert together == [plain(encoder.tokenise([text]))[0] for text in texts]
    assert all(len(ranges) == 2 for _, ranges in together)
    assert encoder.tokenise([]) == []
