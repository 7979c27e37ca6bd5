from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dflash_dist.config import Config, DataConfig
from dflash_dist.data.chat import ChatEncoder
from dflash_dist.data.packing import PackedRows
from dflash_dist.data.rows import Data, cache_folder, load_data, make_encoder
from dflash_dist.ranks import World
from dflash_dist.target.tiny import CHATML, tiny_tokenizer
from dflash_dist.training.setup import read_data
from tests.data import files
from tests.data.files import CHANGING, NO_ANSWER, chat, chats, write_rows
from tests.ranks import run_ranks


def load(
    *paths: Path, encoder: ChatEncoder | None = None, seed: int = 0, weights: list[float] | None = None, **config: Any
) -> Data:
    path = dict(zip(map(str, paths), weights)) if weights else str(paths[0])
    return load_data(DataConfig(path=path, **config), encoder or files.make_encoder(), seed, pack=True)


def laid_out(rows: PackedRows | None) -> list[str]:
    """The texts of the documents in rows, sorted, each as often as it is laid out."""
    assert rows is not None
    held = [document for index in range(len(rows)) for document in rows.row(index)]
    return sorted(tiny_tokenizer().decode(document.input_ids) for document in held)


def questions(rows: PackedRows | None) -> Counter[str]:
    """How often each conversation of `chats` is laid out, by its question."""
    return Counter(text.split("user\n")[1].split("?")[0] for text in laid_out(rows))


# ------------------------------------------------------------------------------------------------ sources and weights


def test_a_path_gives_all_its_files(tmp_path):
    (tmp_path / "data").mkdir()
    write_rows(tmp_path / "data/a.jsonl", chats(3, "a"))
    write_rows(tmp_path / "data/b.jsonl", [{"prompt": "b0?", "response": "b0!"}])
    data = load(tmp_path / "data")
    assert questions(data.train) == Counter(["a0", "a1", "a2", "b0"])
    assert data.held_out is None
    assert [(account.rows, account.shape) for account in data.accounts] == [(3, "messages"), (1, "prompt/response")]


@pytest.mark.parametrize("seed", range(4))
def test_sources_count_by_their_weights(tmp_path, seed):
    names = {"one": 1, "twice": 2, "half": 0.5, "more": 1.5}
    paths = [write_rows(tmp_path / f"{name}.jsonl", chats(8, name)) for name in names]
    counts = questions(load(*paths, weights=list(names.values()), seed=seed).train)
    by_source = {name: [counts[f"{name}{k}"] for k in range(8)] for name in names}
    assert by_source["one"] == [1] * 8
    assert by_source["twice"] == [2] * 8
    # Also where several sources have the same broken part. # defect reported
    assert sorted(by_source["half"]) == [0] * 4 + [1] * 4
    assert sorted(by_source["more"]) == [1] * 4 + [2] * 4


def test_the_seed_chooses_the_documents_of_a_broken_weight(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", chats(12))
    chosen = [tuple(laid_out(load(path, weights=[0.5], seed=seed).train)) for seed in (0, 1, 2, 0)]
    assert chosen[0] == chosen[3]
    assert len(set(chosen)) == 3


def test_weights_that_leave_nothing_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"train: no document is left: raise the weights of data\.path"):
        load(write_rows(tmp_path / "rows.jsonl", chats(2)), weights=[0.1])


# ------------------------------------------------------------------------------------------------ held-out rows


def test_held_out_conversations_are_spread_over_all_sources(tmp_path):
    paths = [write_rows(tmp_path / f"{name}.jsonl", chats(10, name)) for name in "ab"]
    data = load(*paths, weights=[1, 2], val_conversations=4)
    assert questions(data.held_out) == Counter(["a0", "a5", "b0", "b5"])
    everything = Counter({f"a{k}": 1 for k in range(10)}) + Counter({f"b{k}": 2 for k in range(10)})
    assert questions(data.train) == Counter({q: n for q, n in everything.items() if q not in questions(data.held_out)})
    assert (data.train.conversations, data.held_out.conversations) == (16, 4)


def test_a_conversation_is_held_out_with_all_its_documents(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [chat(f"{k}?", "one", "and?", "two", "so?", "three") for k in range(9)])
    data = load(path, encoder=files.make_encoder(chat_template=CHANGING), val_conversations=4)
    assert questions(data.held_out) == Counter({"0": 3, "2": 3, "4": 3, "6": 3})
    assert questions(data.train) == Counter({"1": 3, "3": 3, "5": 3, "7": 3, "8": 3})


def test_what_cannot_be_learned_from_is_never_held_out(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [NO_ANSWER, *chats(3), NO_ANSWER])
    assert questions(load(path, val_conversations=1).held_out) == Counter(["0"])
    assert sum(questions(load(path, val_conversations=2).train).values()) == 1


@pytest.mark.parametrize("count", [3, 4])
def test_holding_out_every_conversation_is_refused(tmp_path, count):
    path = write_rows(tmp_path / "rows.jsonl", [*chats(3), NO_ANSWER])
    with pytest.raises(ValueError, match=rf"data.val_conversations {count} leaves nothing .*gives 3 conversations"):
        load(path, val_conversations=count)


def test_a_path_of_its_own_is_held_out_whole(tmp_path):
    path, other = (write_rows(tmp_path / f"{name}.jsonl", chats(3, name)) for name in "ab")
    data = load(path, weights=[2], val_path=str(other), val_conversations=1)
    assert questions(data.train) == Counter({"a0": 2, "a1": 2, "a2": 2})
    assert questions(data.held_out) == Counter(["b0", "b1", "b2"])
    assert len(data.accounts) == 2


# ------------------------------------------------------------------------------------------------ bad rows


@pytest.fixture
def two_sources(tmp_path) -> list[Path]:
    """Ten rows, two of them bad."""
    return [
        write_rows(tmp_path / "a.jsonl", [*chats(3, "a"), "{", *chats(1, "aa")]),
        write_rows(tmp_path / "b.jsonl", [{"messages": []}, *chats(4, "b")]),
    ]


@pytest.mark.parametrize("limit", [2, 5, 0.2, 0.5])
def test_bad_rows_within_the_limit_are_left_out(two_sources, limit):
    data = load(*two_sources, weights=[1, 1], max_bad_rows=limit)
    assert sum(questions(data.train).values()) == 8
    assert data.dropped == Counter({"malformed JSON": 1, "no messages": 1})


@pytest.mark.parametrize("limit", [0, 1, 0.1, 0.19])
def test_more_bad_rows_over_all_sources_are_refused(two_sources, limit):
    with pytest.raises(ValueError, match=rf"^2 bad rows of 10, where max_bad_rows allows {limit}:") as refused:
        load(*two_sources, weights=[1, 1], max_bad_rows=limit)
    listed = str(refused.value).split("\n  ")[1:]
    expected = [f"{two_sources[0]}, row 4: malformed JSON: ", f"{two_sources[1]}, row 1: no messages: "]
    assert [line[: len(begin)] for line, begin in zip(listed, expected, strict=True)] == expected


def test_the_first_ten_bad_rows_of_all_sources_are_listed(tmp_path):
    paths = [write_rows(tmp_path / f"{name}.jsonl", [*chats(1), *["{"] * 7]) for name in "ab"]
    with pytest.raises(ValueError, match=r"14 bad rows of 16, where max_bad_rows allows 0\.5") as refused:
        load(*paths, weights=[1, 1], max_bad_rows=0.5)
    rows = [line.split(": malformed")[0].strip() for line in str(refused.value).splitlines()[1:]]
    assert rows == [f"{paths[0]}, row {k}" for k in range(2, 9)] + [f"{paths[1]}, row {k}" for k in range(2, 5)]


def test_a_higher_limit_does_not_tokenise_again(two_sources, monkeypatch):
    with pytest.raises(ValueError, match="2 bad rows"):
        load(*two_sources, weights=[1, 1])
    monkeypatch.delattr(ChatEncoder, "tokenise")
    assert len(load(*two_sources, weights=[1, 1], max_bad_rows=2).train.chosen) == 8


# ------------------------------------------------------------------------------------------------ the account


def rendered(prompt: int, answer: int) -> dict[str, Any]:
    """A row of text with so many tokens."""
    return {"text": "p" * prompt + "a" * answer, "prompt_length": prompt}


def test_every_row_is_accounted_for(tmp_path):
    rows = [
        rendered(5, 5),
        rendered(8, 2),
        rendered(9, 2),  # its answer begins at the end of a row
        rendered(30, 9),
        rendered(3, 1),  # an answer of one token has no anchor
        rendered(7, 4),  # cut by one token
        rendered(0, 20),
        {"text": "x", "prompt_length": 1},
        "{",
    ]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    other = write_rows(tmp_path / "other.jsonl", [*chats(2), NO_ANSWER, chat("q?", "a" * 80)])
    data = load(path, seq_len=10, max_bad_rows=2)
    assert data.dropped == Counter({"no answer within a row": 3, "wrong prompt_length": 1, "malformed JSON": 1})
    assert data.cut == 2
    assert (data.train.conversations, data.train.tokens, data.train.supervised, data.train.anchors.sum()) == (
        4,
        40,
        20,
        16,
    )
    data = load(other, weights=[2], val_path=str(path), seq_len=60, max_bad_rows=2)
    assert list(data.describe()) == [
        f"{other}: 4 rows, read as 'messages'",
        f"{path}: 9 rows, read as 'text'",
        "cut at the end of a row: 1 documents",
        "left out: 1 x no assistant turn",
        "left out: 1 x wrong prompt_length",
        "left out: 1 x malformed JSON",
        "left out: 1 x no answer within a row",
        f"bad row: {path}, row 8: wrong prompt_length: it counts the characters before the answer, below 1, found 1",
        f"bad row: {path}, row 9: malformed JSON: Expecting property name enclosed in double quotes:"
        " line 2 column 1 (char 2)",
    ]
    assert list(data.describe_rows()) == [
        "train: 3 conversations -> 6 documents, 220 tokens (41% supervised) -> 4 rows of 60, 91.7% filled",
        "held out: 6 conversations -> 6 documents, 101 tokens (42% supervised) -> 2 rows of 60, 84.2% filled",
    ]


def test_what_was_read_otherwise_than_it_stands_there_is_said(tmp_path):
    """The most frequent notes of a source, and what was passed over."""
    calls = [
        {"function": {"name": "f", "arguments": {f"k{n:02}": n if n >= row else None for n in range(15)}}}
        for row in range(15)
    ]
    rows = [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": [call]}]} for call in calls
    ]
    path = write_rows(tmp_path / "rows.jsonl", [*rows, chat("q", "one<|im_end|>two", "r", "three")])
    (tmp_path / "dataset_info.json").write_text("{}")
    told = list(load(tmp_path).describe())
    place = "messages[].tool_calls[].function.arguments"
    counts = [
        (14 - n, f"null left out as padding, since other rows have a value there: {place}.k{n:02}") for n in range(10)
    ]
    assert told[:13] == [
        f"{path}: 16 rows, read as 'messages'",
        *(f"{path}: {count} x {note}" for count, note in counts),
        f"{path}: and 5 further notes like these",
        f"no data, and passed over: {tmp_path}/dataset_info.json",
    ]


def test_of_many_bad_rows_the_first_ten_are_named(tmp_path):
    paths = [write_rows(tmp_path / f"{name}.jsonl", [*chats(3), *["{"] * 7]) for name in "ab"]
    told = [line for line in load(*paths, weights=[1, 1], max_bad_rows=14).describe() if line.startswith("bad row")]
    rows = [line.removeprefix("bad row: ").split(": malformed")[0] for line in told]
    assert rows == [f"{paths[0]}, row {k}" for k in range(4, 11)] + [f"{paths[1]}, row {k}" for k in range(4, 7)]


@pytest.mark.parametrize(
    ("rows", "account"),
    [
        ([], "0 rows"),
        ([NO_ANSWER, NO_ANSWER], "2 rows, 2 x no assistant turn"),
        (chats(3), "3 rows, 3 x no answer within a row; data.seq_len must be at least 23"),
        (
            [NO_ANSWER, *chats(1), "{"],
            "3 rows, 1 x malformed JSON, 1 x no assistant turn, 1 x no answer within a row;"
            " data.seq_len must be at least 23",
        ),
    ],
)
def test_data_with_nothing_to_learn_from_is_refused(tmp_path, rows, account):
    path = write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(ValueError, match=rf"^nothing in {path} can be learned from: {account}$"):
        load(path, seq_len=10, max_bad_rows=1)
    if "at least 23" in account:  # as advised, and no token less
        train = load(path, seq_len=23, max_bad_rows=1).train
        assert train.anchors.sum() == len(train.chosen), "one a document"
        with pytest.raises(ValueError, match="nothing in"):
            load(path, seq_len=22, max_bad_rows=1)


def test_data_that_is_supervised_below_one_percent_is_refused(tmp_path):
    enough, too_little = (write_rows(tmp_path / f"{n}.jsonl", [rendered(n, 9)]) for n in (891, 892))
    load(enough).refuse_unsupervised()
    with pytest.raises(ValueError, match=rf"only 9 of the 901 tokens of {too_little} are supervised, under 1%"):
        load(too_little).refuse_unsupervised()


@pytest.mark.parametrize(
    ("rows", "config"),
    [
        pytest.param([chat("0?", "0!"), chat("1?", "1?")], {}, id="a token"),
        pytest.param([chat("1?", "1!"), chat("0?", "0!")], {}, id="the order"),
        pytest.param(chats(3), {}, id="a conversation more"),
        pytest.param(chats(2), {"seq_len": 100}, id="the length of rows"),
        pytest.param(chats(2), {"val_conversations": 1}, id="what is held out"),
        pytest.param(chats(2), {"weights": [2]}, id="a weight"),
    ],
)
def test_the_fingerprint_changes_with(tmp_path, rows, config):
    before = load(write_rows(tmp_path / "rows.jsonl", chats(2))).train.fingerprint
    assert load(write_rows(tmp_path / "same.jsonl", chats(2)), seed=1).train.fingerprint == before
    assert load(write_rows(tmp_path / "changed.jsonl", rows), **config).train.fingerprint != before


def test_the_fingerprint_changes_with_what_is_supervised(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [chat("0?", "0!", "1?", "1!")])
    whole, last = load(path), load(path, encoder=make_encoder(DataConfig(last_turn_only=True), tiny_tokenizer(), [2]))
    assert laid_out(whole.train) == laid_out(last.train) and whole.train.supervised > last.train.supervised
    assert whole.train.fingerprint != last.train.fingerprint


# ------------------------------------------------------------------------------------------------ what the config names


def test_the_cache_is_where_the_config_or_the_system_says(monkeypatch):
    assert cache_folder(DataConfig(cache_dir="/shared/x")) == Path("/shared/x")
    monkeypatch.setenv("HOME", "/home/me")
    assert cache_folder(DataConfig(cache_dir="~/x")) == Path("/home/me/x")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert cache_folder(DataConfig()) == Path("/cache/dflash_dist")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder(DataConfig()) == Path("/home/me/.cache/dflash_dist")


def test_the_encoder_is_as_configured(tmp_path):
    (tmp_path / "chat.jinja").write_text(CHATML + "é{{ x }}", encoding="utf-8")
    config = DataConfig(
        chat_template=str(tmp_path / "chat.jinja"),
        template_args={"x": 1},
        last_turn_only=True,
        drop_reasoning=True,
    )
    expected = files.make_encoder(
        chat_template=CHATML + "é{{ x }}", template_args={"x": 1}, last_turn_only=True, drop_reasoning=True
    )
    assert make_encoder(config, tiny_tokenizer(), [2]).identity == expected.identity
    assert make_encoder(DataConfig(), tiny_tokenizer(), [2]).identity == files.make_encoder().identity


@pytest.mark.parametrize("content", [None, b"\xff", b""])  # defect reported: the empty one
def test_a_template_that_cannot_be_read_is_named(tmp_path, content):
    if content is not None:
        (tmp_path / "chat.jinja").write_bytes(content)
    with pytest.raises(ValueError, match=r"data\.chat_template .*chat\.jinja (cannot be read: |is empty)"):
        make_encoder(DataConfig(chat_template=str(tmp_path / "chat.jinja")), tiny_tokenizer(), [2])


# ------------------------------------------------------------------------------------------------ over ranks


def data_of(world: World, paths: list[Path]) -> str:
    """Reads the data of this rank's path; returns its fingerprint, or the error."""
    target = SimpleNamespace(
        path="target", tokenizer=tiny_tokenizer(), stop_ids=[2], text=SimpleNamespace(vocab_size=260)
    )
    try:
        return read_data(Config(data=DataConfig(path=str(paths[world.rank]))), target, world).train.fingerprint
    except ValueError as error:
        return str(error)


def test_ranks_that_read_different_data_all_refuse_it(tmp_path):
    same, copy = (write_rows(tmp_path / f"{name}.jsonl", chats(3)) for name in "ab")
    other = write_rows(tmp_path / "c.jsonl", [*chats(2), chat("2?", "2.")])
    one_a_row = load_data(DataConfig(path=str(same)), files.make_encoder(), 0, pack=False).train.fingerprint
    assert run_ranks(data_of, 2, [same, copy]) == [one_a_row] * 2
    refusal = "the ranks read different data: every node must see the same files under data.path"
    assert run_ranks(data_of, 2, [same, other]) == [refusal] * 2
