from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from dflash_dist.data.chat import ChatEncoder, Document, Message, encode_all, read_conversations
from dflash_dist.target.tiny import CHATML, SPECIAL, tiny_tokenizer

STOP = 2  # <|im_end|> of the tiny tokenizer

# ChatML whose template itself marks the answers. Line breaks are expressions: Jinja drops a break after a block.
MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ message.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# As Qwen3: history loses its thinking; answers to the last question get a think block, an empty one if need be.
# Without thinking, the empty block belongs to the prompt.
THINKING_MARKED = (
    "{% set last = namespace(question=-1) %}"
    "{% for message in messages %}{% if message.role == 'user' %}{% set last.question = loop.index0 %}{% endif %}"
    "{% endfor %}"
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{% if message.role == 'assistant' %}"
    "{% set answer = message.content.split('</think>')[-1].lstrip('\n') %}"
    "{% set thought = '' %}"
    "{% if '</think>' in message.content %}"
    "{% set thought = message.content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% endif %}"
    "{% generation %}"
    "{% if loop.index0 > last.question %}{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}"
    "{{ answer }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ message.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
THINKING = THINKING_MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")


def turns(*contents: str, system: str | None = None) -> list[Message]:
    """A conversation in which user and assistant take turns."""
    head = [{"role": "system", "content": system}] if system is not None else []
    return head + [
        {"role": role, "content": text} for role, text in zip(itertools.cycle(["user", "assistant"]), contents)
    ]


def make_encoder(template: str, **template_args: object) -> ChatEncoder:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return ChatEncoder(tokenizer, [STOP], template_args)


def merging_tokenizer(template: str, *merges: tuple[str, str]) -> PreTrainedTokenizerFast:
    """The tiny tokenizer with BPE merges of its byte tokens, where a line break is written Ċ and a space Ġ."""
    vocabulary = dict(tiny_tokenizer().get_vocab())
    for left, right in merges:
        vocabulary[left + right] = len(vocabulary)
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIAL))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<|im_end|>", chat_template=template
    )


def ids(encoder: ChatEncoder, text: str) -> list[int]:
    return encoder.tokenizer(text, add_special_tokens=False).input_ids


def text_of(encoder: ChatEncoder, tokens: Sequence[int]) -> str:
    return encoder.tokenizer.decode(tokens, skip_special_tokens=False)


def supervised(encoder: ChatEncoder, document: Document) -> list[str]:
    """The text of each unbroken run of supervised tokens."""
    assert len(document.input_ids) == len(document.loss_mask)
    runs = itertools.groupby(zip(document.input_ids, document.loss_mask), key=lambda pair: pair[1])
    return [text_of(encoder, [token for token, _ in run]) for flag, run in runs if flag]


# Reading


def test_conversations_are_read_as_written(write_chats):
    path = write_chats([("user", "hello"), ("assistant", "yes")], [("system", "s"), ("user", "")])
    conversations, skipped = read_conversations(path)
    assert conversations == [
        [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "yes"}],
        [{"role": "system", "content": "s"}, {"role": "user", "content": ""}],
    ]
    assert skipped == Counter()


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"absent\.jsonl does not exist"):
        read_conversations(tmp_path / "absent.jsonl")


@pytest.mark.parametrize("content", ["", "\n  \n"])
def test_an_empty_file_is_named(tmp_path, content):
    path = tmp_path / "empty.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"empty\.jsonl holds no conversation"):
        read_conversations(path)


GOOD = '{"messages": [{"role": "user", "content": "x"}]}'


def write_lines(tmp_path: Path, *lines: str) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_only_a_line_break_ends_a_row(tmp_path):
    """JSON may hold U+2028 and U+0085 as they are, which str.splitlines() takes for line breaks."""
    text = "é\u2028漢\u0085"
    row = json.dumps({"messages": [{"role": "user", "content": text}]}, ensure_ascii=False)
    assert read_conversations(write_lines(tmp_path, row, GOOD))[0] == [
        [{"role": "user", "content": text}],
        [{"role": "user", "content": "x"}],
    ]


@pytest.mark.parametrize(
    ("line", "cause"),
    [
        ('{"messages": [', "malformed JSON"),
        ("[1, 2]", "no messages"),
        ('{"conversations": []}', "no messages"),
        ('{"messages": []}', "no messages"),
        ('{"messages": "hello"}', "no messages"),
        ('{"messages": ["hello"]}', "no role"),
        ('{"messages": [{"content": "x"}]}', "no role"),
        ('{"messages": [{"role": "human", "content": "x"}]}', "unknown role: 'human' is not one of system, developer"),
        ('{"messages": [{"role": "user"}]}', "no content"),
        ('{"messages": [{"role": "assistant", "content": null}]}', "the content of a assistant message must be text"),
        ('{"messages": [{"role": "user", "content": [{"type": "text"}]}]}', "no content"),
    ],
)
def test_a_malformed_line_is_refused_with_file_line_and_cause(tmp_path, line, cause):
    path = write_lines(tmp_path, GOOD, "", line, GOOD)  # blank lines count as lines
    with pytest.raises(ValueError) as refusal:
        read_conversations(path)
    assert str(refusal.value).startswith(f"{path}, line 3: ")
    assert cause in str(refusal.value)


def test_a_line_that_is_not_utf8_is_refused_with_file_and_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD.encode() + b'\n{"messages": [{"role": "user", "content": "\xff"}]}\n')
    with pytest.raises(ValueError) as refusal:
        read_conversations(path)
    assert str(refusal.value).startswith(f"{path}, line 2: ")


def test_half_a_surrogate_pair_is_refused_with_file_and_line(tmp_path):
    """JSON can spell it, no tokenizer can take it; a text cut in the middle of an emoji ends so."""
    path = write_lines(tmp_path, GOOD, '{"messages": [{"role": "user", "content": "\\ud83d"}]}')
    with pytest.raises(ValueError) as refusal:
        read_conversations(path)
    assert str(refusal.value).startswith(f"{path}, line 2: ")


def test_answers_cut_by_the_length_limit_are_left_out_on_request_and_are_no_bad_rows(tmp_path):
    cut = GOOD[:-1] + ', "finish_reason": "length"}'
    path = write_lines(tmp_path, GOOD, cut, GOOD[:-1] + ', "finish_reason": "stop"}')
    conversations, skipped = read_conversations(path, finished_only=True)
    assert len(conversations) == 2 and skipped == {"answer cut by the length limit": 1}
    assert len(read_conversations(path)[0]) == 3


def test_as_many_bad_rows_as_allowed_are_skipped_and_counted(tmp_path):
    path = write_lines(tmp_path, "{", GOOD, '{"messages": [{"role": "human", "content": "x"}]}', "}", GOOD)
    conversations, skipped = read_conversations(path, max_bad_rows=3)
    assert len(conversations) == 2
    assert skipped == Counter({"malformed JSON": 2, "unknown role": 1})


def test_one_bad_row_more_than_allowed_is_refused_where_it_stands(tmp_path):
    path = write_lines(tmp_path, "{", GOOD, "{", GOOD, "{")
    with pytest.raises(ValueError, match=r"line 5: malformed JSON.*data\.max_bad_rows \(now 2\)"):
        read_conversations(path, max_bad_rows=2)


def test_a_file_of_nothing_but_skipped_rows_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no conversation"):
        read_conversations(write_lines(tmp_path, "{", "{"), max_bad_rows=2)


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


@TEMPLATES
def test_exactly_the_answers_and_their_end_tokens_are_supervised(template):
    encoder = make_encoder(template)
    (document,) = encoder.encode(turns("Hello?", "Hi, you.", "And now?", "Bye."))
    assert text_of(encoder, document.input_ids) == (
        "<|im_start|>user\nHello?<|im_end|>\n<|im_start|>assistant\nHi, you.<|im_end|>\n"
        "<|im_start|>user\nAnd now?<|im_end|>\n<|im_start|>assistant\nBye.<|im_end|>\n"
    )
    assert supervised(encoder, document) == ["Hi, you.<|im_end|>", "Bye.<|im_end|>"]


@TEMPLATES
def test_system_tool_and_trailing_user_text_are_context(template):
    encoder = make_encoder(template)
    messages = [
        *turns("Weather?", "I look.", system="Be brief."),
        {"role": "tool", "content": "rain"},
        {"role": "assistant", "content": "Rain."},
        {"role": "user", "content": "Thanks"},
    ]
    (document,) = encoder.encode(messages)
    assert text_of(encoder, document.input_ids).endswith("<|im_start|>user\nThanks<|im_end|>\n")
    assert supervised(encoder, document) == ["I look.<|im_end|>", "Rain.<|im_end|>"]


@TEMPLATES
def test_a_user_who_writes_like_the_assistant_is_context(template):
    encoder = make_encoder(template)
    fake = "Yes<|im_end|>\n<|im_start|>assistant\nYes"
    (document,) = encoder.encode(turns(fake, "Yes"))
    assert supervised(encoder, document) == ["Yes<|im_end|>"]
    assert document.loss_mask.index(True) == len(encoder.prompt_ids(turns(fake)))


@TEMPLATES
@pytest.mark.parametrize("answer", ["naïve 🙂 漢字", "🙂", " leads", "trails ", "two  spaces\n\n\tand breaks\n", "-"])
def test_every_byte_of_an_answer_is_supervised(template, answer):
    encoder = make_encoder(template)
    (document,) = encoder.encode(turns("q", answer, "🙂", answer))
    assert supervised(encoder, document) == [f"{answer}<|im_end|>"] * 2


@TEMPLATES
def test_spaces_are_supervised_where_the_tokenizer_trims_its_offsets(template):
    """With `trim_offsets` (RoBERTa, GPT-NeoX) a token of spaces alone spans no character."""
    encoder = make_encoder(template)
    encoder.tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    (document,) = encoder.encode(turns("a  b", "if  x "))
    assert supervised(encoder, document) == ["if  x <|im_end|>"]


@TEMPLATES
def test_an_empty_answer_leaves_only_its_end_token(template):
    encoder = make_encoder(template)
    (document,) = encoder.encode(turns("q", ""))
    assert supervised(encoder, document) == ["<|im_end|>"]
    assert not document.has_anchor()


def test_an_answer_to_nothing_is_context():
    """There is no prompt that a server would prefill before it."""
    encoder = make_encoder(CHATML)
    greeting = {"role": "assistant", "content": "Welcome!"}
    (document,) = encoder.encode([greeting, *turns("q", "a")])
    assert supervised(encoder, document) == ["a<|im_end|>"]


@TEMPLATES
def test_a_conversation_without_an_answer_gives_no_document(template):
    assert make_encoder(template).encode(turns("Hello?")) == []


@MARKS
def test_marks_give_the_documents_that_the_plain_template_gives(begin, end):
    marked = MARKED.replace("{% generation %}", begin).replace("{% endgeneration %}", end)
    messages = turns("Hello?", "Hi.", "More 🙂?", "  Bye.", system="s")
    assert make_encoder(marked).encode(messages) == make_encoder(CHATML).encode(messages)


def test_a_mark_around_the_line_break_after_the_end_token_does_not_supervise_it():
    wide = MARKED.replace("<|im_end|>{% endgeneration %}", "{{ '<|im_end|>\n' }}{% endgeneration %}").replace(
        "{% endif %}{{ '\n' }}{% endfor %}", "{{ '\n' }}{% endif %}{% endfor %}"
    )
    messages = turns("Hello?", "Hi.", "More?", "Bye.")
    assert make_encoder(wide).encode(messages) == make_encoder(CHATML).encode(messages)


def test_any_of_several_stop_tokens_ends_the_turn():
    pad_ends = CHATML.replace("<|im_end|>", "<pad>")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = pad_ends
    encoder = ChatEncoder(tokenizer, [tokenizer.pad_token_id, STOP])
    (document,) = encoder.encode(turns("q", "one", "r", "two"))
    assert supervised(encoder, document) == ["one<pad>", "two<pad>"]


# Templates that render a turn differently once others follow it


def test_a_template_that_rewrites_history_gives_one_document_an_answer():
    encoder = make_encoder(THINKING)
    messages = turns("one", "<think>\nhm\n</think>\n\nfirst", "two", "second", "three", "third")
    documents = encoder.encode(messages)
    assert [supervised(encoder, document) for document in documents] == [
        ["<think>\nhm\n</think>\n\nfirst<|im_end|>"],
        ["<think>\n\n</think>\n\nsecond<|im_end|>"],
        ["<think>\n\n</think>\n\nthird<|im_end|>"],
    ]
    assert text_of(encoder, documents[2].input_ids) == (
        "<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\nfirst<|im_end|>\n"
        "<|im_start|>user\ntwo<|im_end|>\n<|im_start|>assistant\nsecond<|im_end|>\n"
        "<|im_start|>user\nthree<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\nthird<|im_end|>\n"
    )


@pytest.mark.parametrize("template_args", [{}, {"enable_thinking": False}])
def test_each_document_of_a_rewritten_history_starts_with_the_prompt_of_its_answer(template_args):
    encoder = make_encoder(THINKING, **template_args)
    messages = turns("one", "first", "two", "second")
    documents = encoder.encode(messages)
    assert len(documents) == 2
    for document, k in zip(documents, (1, 3)):
        prompt = encoder.prompt_ids(messages[:k])
        assert document.input_ids[: len(prompt)] == prompt
        assert document.loss_mask.index(True) == len(prompt)


def test_what_the_prompt_already_holds_is_not_supervised():
    """Without thinking, the empty block is part of the generation prompt."""
    encoder = make_encoder(THINKING, enable_thinking=False)
    documents = encoder.encode(turns("one", "first", "two", "second"))
    assert [supervised(encoder, document) for document in documents] == [["first<|im_end|>"], ["second<|im_end|>"]]


def test_a_rewritten_history_gives_one_document_where_nothing_was_rewritten():
    encoder = make_encoder(THINKING)
    (document,) = encoder.encode(turns("one", "first"))
    assert supervised(encoder, document) == ["<think>\n\n</think>\n\nfirst<|im_end|>"]


def test_marks_do_not_hide_that_history_is_rewritten():
    """Trained in one document, the history's answers would follow prompts that no server sends."""
    messages = turns("one", "first", "two", "second")
    assert make_encoder(THINKING_MARKED).encode(messages) == make_encoder(THINKING).encode(messages)


# What cannot be told apart is refused


def test_a_template_whose_answers_lack_its_generation_prompt_is_refused():
    forced = CHATML.replace("<|im_start|>assistant\n", "<|im_start|>assistant\n<think>\n")
    with pytest.raises(ValueError, match="without its own generation prompt"):
        make_encoder(forced).encode(turns("q", "a"))


@MARKS
def test_marks_tell_the_answers_where_the_generation_prompt_cannot(begin, end):
    forced = MARKED.replace("assistant\n' }}{% endif %}", "assistant\n<think>\n' }}{% endif %}")
    encoder = make_encoder(forced.replace("{% generation %}", begin).replace("{% endgeneration %}", end))
    assert text_of(encoder, encoder.prompt_ids(turns("q"))).endswith("assistant\n<think>\n")
    (document,) = encoder.encode(turns("q", "a", "r", "b"))
    assert supervised(encoder, document) == ["a<|im_end|>", "b<|im_end|>"]


def test_marks_that_mark_nothing_are_refused():
    forced = MARKED.replace("assistant\n' }}{% endif %}", "assistant\n<think>\n' }}{% endif %}")
    empty = forced.replace("{{ message.content }}<|im_end|>{% endgeneration %}", "{% endgeneration %}", 1)
    with pytest.raises(ValueError, match="marked no token"):
        make_encoder(empty).encode(turns("q", "a"))


def test_a_tokenizer_without_a_template_is_refused():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r"has no chat template: add chat_template\.jinja"):
        ChatEncoder(tokenizer, [STOP])


def test_what_the_template_itself_refuses_is_told_as_the_users_mistake():
    strict = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHATML
    )
    with pytest.raises(ValueError, match="System role not supported"):
        make_encoder(strict).encode(turns("q", "a", system="s"))


# Tokens at the border between prompt and answer

COLON, COLON_MARKED = (
    template.replace("{{ message.role }}\n", "{{ message.role }}:")
    .replace("message.role + '\n'", "message.role + ':'")
    .replace("assistant\n", "assistant:")
    for template in (CHATML, MARKED)
)


@pytest.mark.parametrize("template", [COLON, COLON_MARKED], ids=["plain", "marked"])
def test_a_merge_across_the_prompts_end_is_split_there(template):
    encoder = ChatEncoder(merging_tokenizer(template, (":", "-")), [STOP])
    assert len(ids(encoder, ":-")) == 1
    assert (
        encoder.render(turns("q", "-a :-")) == "<|im_start|>user:q<|im_end|>\n<|im_start|>assistant:-a :-<|im_end|>\n"
    )
    (document,) = encoder.encode(turns("q", "-a :-"))
    prompt, answer = (
        ids(encoder, "<|im_start|>user:q<|im_end|>\n<|im_start|>assistant:"),
        ids(encoder, "-a :-<|im_end|>"),
    )
    assert document.input_ids == prompt + answer + ids(encoder, "\n")
    assert document.loss_mask == [False] * len(prompt) + [True] * len(answer) + [False]
    assert text_of(encoder, answer) == "-a :-<|im_end|>"
    assert ids(encoder, ":-")[0] in answer  # a merge inside the answer stays


def test_a_merge_across_any_answers_start_is_split_there():
    encoder = ChatEncoder(merging_tokenizer(COLON, (":", "-")), [STOP])
    (document,) = encoder.encode(turns("q", "a", "r", "-b", "s", "-c"))
    assert supervised(encoder, document) == ["a<|im_end|>", "-b<|im_end|>", "-c<|im_end|>"]


def test_line_breaks_at_the_prompts_end_are_tokenised_as_in_the_prompt_alone():
    """GPT-2's pattern takes `\\n\\n` apart before a letter, but leaves it whole at the end of a text, so here a token
    ends where the answer starts and the prompt's tokens differ all the same."""
    breaks = CHATML.replace("{{ message.role }}\n", "{{ message.role + '\n\n' }}").replace(
        "assistant\n", "assistant\n\n"
    )
    encoder = ChatEncoder(merging_tokenizer(breaks, ("Ċ", "Ċ")), [STOP])
    (document,) = encoder.encode(turns("q", "abc"))
    prompt, answer = (
        ids(encoder, "<|im_start|>user\n\nq<|im_end|>\n<|im_start|>assistant\n\n"),
        ids(encoder, "abc<|im_end|>"),
    )
    assert encoder.prompt_ids(turns("q")) == prompt
    assert document.input_ids == prompt + answer + ids(encoder, "\n")
    assert supervised(encoder, document) == ["abc<|im_end|>"]


def test_the_prompt_is_the_rendering_up_to_where_the_assistant_writes():
    encoder = make_encoder(CHATML)
    messages = turns("one", "first", "two", system="s")
    assert text_of(encoder, encoder.prompt_ids(messages)) == (
        "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\nfirst<|im_end|>\n"
        "<|im_start|>user\ntwo<|im_end|>\n<|im_start|>assistant\n"
    )


# Anchors and whole data sets


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        ([], False),
        ([True], False),
        ([False, True, False, True], False),
        ([False, True, True], True),
        ([True, True, False], True),
    ],
)
def test_an_anchor_needs_two_supervised_neighbours(mask, expected):
    assert Document(list(range(len(mask))), mask).has_anchor() is expected


# Tokens of "q" -> "abc" in ChatML. Prompt: start, "user\nq", end, break, start, "assistant\n" = 1 + 6 + 2 + 1 + 10.
# Then "abc", end, break.
PROMPT, WHOLE = 20, 25


def test_a_conversation_of_exactly_seq_len_is_not_cut():
    encoder = make_encoder(CHATML)
    documents, causes = encode_all(encoder, [turns("q", "abc")], seq_len=WHOLE)
    assert (
        text_of(encoder, documents[0].input_ids)
        == "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\nabc<|im_end|>\n"
    )
    assert len(documents[0].input_ids) == WHOLE
    assert causes == Counter()


def test_a_longer_conversation_is_cut_at_its_end():
    encoder = make_encoder(CHATML)
    documents, causes = encode_all(encoder, [turns("q", "abc")], seq_len=PROMPT + 2)
    assert text_of(encoder, documents[0].input_ids) == "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\nab"
    assert documents[0].loss_mask == [False] * PROMPT + [True, True]
    assert causes == Counter({"cut at seq_len": 1})


def test_what_is_dropped_or_cut_is_counted_by_cause():
    encoder = make_encoder(CHATML)
    conversations = [
        turns("no answer"),
        turns("q", "abc"),
        turns("q", ""),  # one supervised token
        turns("q", "abcdefgh"),  # cut, still with an anchor
        turns("a question that leaves no room for its answer", "abc"),  # cut and dropped
        turns("q"),
    ]
    documents, causes = encode_all(encoder, conversations, seq_len=WHOLE)
    assert [supervised(encoder, document) for document in documents] == [["abc<|im_end|>"], ["abcde"]]
    assert causes == Counter({"no assistant turn": 2, "cut at seq_len": 2, "too short to learn from": 2})


def test_every_document_of_a_rewritten_history_counts_by_itself():
    encoder = make_encoder(THINKING)
    documents, causes = encode_all(encoder, [turns("one", "first", "two", "second")], seq_len=48)
    assert [supervised(encoder, document) for document in documents] == [["<think>\n\n</think>\n\nfirst<|im_end|>"]]
    assert causes == Counter({"cut at seq_len": 1, "too short to learn from": 1})


def test_a_data_set_with_nothing_to_learn_from_is_refused_with_the_causes():
    with pytest.raises(ValueError) as refusal:
        encode_all(make_encoder(CHATML), [turns("q"), turns("q", ""), turns("r")], seq_len=99)
    assert "no conversation is left to train on" in str(refusal.value)
    assert "2 with no assistant turn" in str(refusal.value)
    assert "1 with too short to learn from" in str(refusal.value)


def test_reading_and_encoding_fit_together(write_chats):
    path = write_chats([("user", "q"), ("assistant", "abc")], [("user", "r"), ("assistant", "de")])
    encoder = make_encoder(CHATML)
    documents, _ = encode_all(encoder, read_conversations(path)[0], seq_len=99)
    assert [supervised(encoder, document) for document in documents] == [["abc<|im_end|>"], ["de<|im_end|>"]]


def test_extra_keys_of_a_row_do_no_harm(tmp_path):
    row = {"messages": [{"role": "user", "content": "x", "name": "Ada"}], "row": 3, "finish_reason": "stop"}
    conversations, _ = read_conversations(write_lines(tmp_path, json.dumps(row)))
    assert conversations[0][0]["content"] == "x"
