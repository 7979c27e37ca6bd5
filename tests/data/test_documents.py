from __future__ import annotations

import importlib.metadata
import json
import multiprocessing
import os
import re
import shutil
import signal
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dflash_dist.config import DataConfig
from dflash_dist.data import documents as module
from dflash_dist.data import sources
from dflash_dist.data.account import Account
from dflash_dist.data.chat import ChatEncoder, Document
from dflash_dist.data.conversations import read_row
from dflash_dist.data.documents import Documents, encode_chunk, open_documents
from dflash_dist.data.rows import load_data
from dflash_dist.data.sources import Chunk, FileSource, Look
from dflash_dist.ranks import World
from dflash_dist.target.tiny import CHATML
from tests.data.files import CHANGING, NO_ANSWER, chat, chats, make_encoder, write_rows
from tests.ranks import run_ranks

# Rows that give one document, several, and none.
ROWS = [
    row for k in range(8) for row in (chat(f"{k}?", f"{k}!"), chat("1", f"one {k}", "2", "two" * k + "."), NO_ANSWER)
]


def opened(path: Path, encoder: ChatEncoder | None = None, max_bad_rows: float = 0) -> tuple[Documents, Account]:
    """Opens in this process, with a cache beside the file."""
    entry = open_documents(FileSource(path), encoder or make_encoder(), path.parent / "cache", max_bad_rows, workers=1)
    return Documents([entry]), entry[1]


def told(documents: Documents) -> list[tuple[int, list[int], Any]]:
    """Row, tokens and supervised ranges of every document."""
    found = [documents[number] for number in range(len(documents))]
    return [(int(row), d.input_ids.tolist(), d.supervised) for row, d in zip(documents.row, found, strict=True)]


def encoded_one_by_one(rows: list[dict[str, Any]], encoder: ChatEncoder) -> list[tuple[int, list[int], Any]]:
    return [
        (number, document.input_ids.tolist(), document.supervised)
        for number, row in enumerate(rows, 1)
        if row["messages"]
        for document in encoder.encode(read_row(row))
    ]


def entries(folder: Path) -> list[Path]:
    return [path for path in (folder / "cache").iterdir() if path.is_dir()]


@pytest.fixture
def short_chunks(monkeypatch) -> None:
    monkeypatch.setattr(sources, "CHUNK_ROWS", 3)
    monkeypatch.setattr(module, "CHUNKS_ALONE", 2)


@pytest.fixture
def no_tokenising(monkeypatch):
    """From its call on, whoever tokenises fails."""

    def tokenise(*_):
        raise AssertionError("tokenised again")

    return lambda: monkeypatch.setattr(ChatEncoder, "tokenise", tokenise)


# ------------------------------------------------------------------------------------------------ what is in an entry


def test_an_entry_holds_the_documents_of_all_rows_in_their_order(tmp_path, short_chunks):
    encoder = make_encoder(chat_template=CHANGING)
    documents, summary = opened(write_rows(tmp_path / "rows.jsonl", ROWS), encoder)
    assert told(documents) == encoded_one_by_one(ROWS, encoder)
    assert len(documents) == 24
    assert documents.length.tolist() == [len(ids) for _, ids, _ in told(documents)]
    assert (summary.rows, summary.shape, summary.dropped) == (24, "messages", Counter({"no assistant turn": 8}))


def calling(**arguments: Any) -> dict[str, Any]:
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}
    return {"messages": [{"role": "user", "content": "q"}, call]}


CALLS = CHATML.replace(
    "{{ message.content }}", "{{ message.tool_calls | tojson if message.tool_calls }}{{ message.content }}"
)


class Interrupted:
    """A source during whose reading the worker processes get a Ctrl-C, as a terminal sends it to all of a command."""

    def __init__(self, path: Path):
        self.file, self.name = FileSource(path), str(path)
        self.others = {child.pid for child in multiprocessing.active_children()}  # such as ranks of other tests

    def identity(self) -> str:
        return self.file.identity()

    def chunks(self, look: Look) -> Iterator[Chunk]:
        for chunk in self.file.chunks(look):
            for pid in {child.pid for child in multiprocessing.active_children()} - self.others:
                os.kill(pid, signal.SIGINT)
            yield chunk


def test_worker_processes_make_the_same_entry(tmp_path, short_chunks):
    """Also of nulls, about which only the last row tells."""
    rows = [calling(x="1", y=None), *ROWS, {"messages": []}, *ROWS]  # more chunks than wait at a time
    rows += [calling(x=None, y=None), calling(x="2", y="3")]
    path, encoder = write_rows(tmp_path / "rows.jsonl", rows), make_encoder(chat_template=CALLS)
    made = [
        open_documents(Interrupted(path), encoder, tmp_path / f"{workers} workers", 0, workers) for workers in (1, 2)
    ]
    (alone, summary), (shared, other_summary) = [(told(Documents([entry])), entry[1]) for entry in made]
    assert shared == alone
    assert other_summary == summary
    rows[0], rows[-2] = calling(x="1"), calling()
    assert alone == encoded_one_by_one(rows, encoder)
    places = {cause.split(".")[-1]: count for cause, count in summary.noted.items()}
    assert places == {"x": 1, "y": 2}


def test_documents_are_found_across_batches_with_and_without_any(tmp_path, short_chunks):
    rows = [*chats(3), *[NO_ANSWER] * 6, *chats(4, "later"), *[NO_ANSWER] * 2]
    documents, _ = opened(write_rows(tmp_path / "rows.jsonl", rows))
    assert told(documents) == encoded_one_by_one(rows, make_encoder())
    assert documents.row.tolist() == [1, 2, 3, 10, 11, 12, 13]
    with pytest.raises(IndexError):
        documents[7]


@pytest.mark.parametrize("rows", [[], [NO_ANSWER]])
def test_a_source_may_have_no_documents(tmp_path, rows):
    documents, summary = opened(write_rows(tmp_path / "rows.jsonl", rows))
    assert (len(documents), summary.rows) == (0, len(rows))
    assert documents.supervised(5).tolist() == documents.anchors(5).tolist() == []
    assert documents.first_anchor() is None


def check_counts(documents: Documents, limit: int) -> None:
    """Against counting token by token."""
    masks = [documents[number].loss_mask[:limit] for number in range(len(documents))]
    assert documents.supervised(limit).tolist() == [int(mask.sum()) for mask in masks]
    assert documents.anchors(limit).tolist() == [int((mask[:-1] & mask[1:]).sum()) for mask in masks]


@pytest.mark.parametrize("limit", [0, 1, 20, 33, 34, 35, 60, 10_000])
def test_supervised_tokens_and_anchors_are_counted_up_to_a_limit(tmp_path, short_chunks, limit):
    check_counts(opened(write_rows(tmp_path / "rows.jsonl", ROWS))[0], limit)


@given(lengths=st.lists(st.lists(st.integers(0, 3), max_size=6), max_size=4), limit=st.integers(0, 15))
def test_ranges_that_touch_count_as_one_and_documents_that_touch_do_not(lengths, limit):
    """Numbers of tokens that are, by turns, context and supervised."""
    documents = []
    for of_one in lengths:
        edges = np.cumsum([0, *of_one]).tolist()
        spans = [(begin, end) for begin, end in zip(edges[1::2], edges[2::2]) if begin < end]
        documents.append(Document(np.zeros(edges[-1], np.int32), spans))
    check_counts(Documents.of(documents), limit)


def test_the_end_of_a_document_does_not_touch_a_range_of_the_next_one_that_begins_at_the_same_place():
    documents = [Document(np.zeros(3, np.int32), [(0, 3)]), Document(np.zeros(6, np.int32), [(3, 6)])]
    assert Documents.of(documents).anchors(100).tolist() == [2, 2]


def test_the_first_anchor_is_the_first_supervised_token_with_a_supervised_successor(tmp_path):
    rows = [{"text": "ab" + "c" * answer, "prompt_length": 2} for answer in (1, 2, 3)]
    documents, _ = opened(write_rows(tmp_path / "rows.jsonl", rows))
    assert documents.anchors(100).tolist() == [0, 1, 2]
    assert documents.first_anchor() == 2


def test_documents_in_memory_read_as_given():
    given = make_encoder(chat_template=CHANGING).encode(read_row(ROWS[1]))
    assert told(Documents.of(given)) == [
        (row, document.input_ids.tolist(), document.supervised) for row, document in enumerate(given, 1)
    ]
    assert len(Documents.of([])) == 0


def test_documents_are_not_read_into_memory_but_mapped(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", chats(3))
    documents, _ = opened(path)
    tokens = [documents[number].input_ids for number in range(3)]
    assert all(ids.any() for ids in tokens)
    [entry] = entries(tmp_path)
    with (entry / "documents.arrow").open("r+b") as file:
        file.write(bytes(os.fstat(file.fileno()).st_size))
    assert not any(ids.any() for ids in tokens)


# ------------------------------------------------------------------------------------------------ when it is made


def test_an_entry_is_made_once_and_opened_without_a_lock(tmp_path, monkeypatch, no_tokenising):
    path = write_rows(tmp_path / "rows.jsonl", ROWS)
    first, summary = opened(path)
    no_tokenising()
    monkeypatch.delattr(module, "locked")
    again, same_summary = opened(path)
    assert told(again) == told(first)
    assert same_summary == summary


def changed_tokenizer() -> ChatEncoder:
    encoder = styled()
    encoder.tokenizer.add_tokens(["hello"])
    return encoder


def lengthen(path: Path) -> None:
    """Adds rows and keeps the file's time."""
    time = path.stat().st_mtime_ns
    write_rows(path, chats(3))
    os.utime(path, ns=(time, time))


def styled(stop_ids: Sequence[int] = (2,), **options: Any) -> ChatEncoder:
    """With a template that takes an argument."""
    return ChatEncoder(make_encoder().tokenizer, stop_ids, chat_template="{{ style }}" + CHATML, **options)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lengthen, id="the file's length"),
        pytest.param(lambda path: os.utime(path, ns=(0, 0)), id="the file's time"),
        pytest.param(lambda path: make_encoder(chat_template=CHATML), id="the template"),
        pytest.param(lambda path: styled(template_args={"style": "brief"}), id="an argument of the template"),
        pytest.param(lambda path: styled(last_turn_only=True), id="last_turn_only"),
        pytest.param(lambda path: styled(drop_reasoning=True), id="drop_reasoning"),
        pytest.param(lambda path: styled(stop_ids=[1, 2]), id="a stop token"),
        pytest.param(lambda path: changed_tokenizer(), id="the tokenizer"),
    ],
)
def test_another_entry_is_made_after_a_change_of(tmp_path, change):
    path = write_rows(tmp_path / "rows.jsonl", chats(2))
    opened(path, styled())
    changed = change(path)
    opened(path, changed if isinstance(changed, ChatEncoder) else styled())
    assert len(entries(tmp_path)) == 2


def imported_by(name: str, folder: Path) -> set[str]:
    """The modules of `folder` that the one called `name` stands on, itself included."""
    found, waiting = set(), [name]
    while waiting:
        found.add(name := waiting.pop())
        source = (folder / f"{name}.py").read_text()
        waiting += set(re.findall(r"^from dflash_dist\.data\.(\w+) import", source, re.MULTILINE)) - found
    return found


def test_another_entry_is_made_after_a_change_of_the_code(tmp_path, monkeypatch):
    path, code = write_rows(tmp_path / "rows.jsonl", chats(2)), tmp_path / "code"
    shutil.copytree(Path(module.__file__).parent, code)
    monkeypatch.setattr(module, "__file__", str(code / "documents.py"))
    monkeypatch.setattr(module, "_code_version", module._code_version.__wrapped__)  # which remembers its answer
    places = {module.entry_folder(tmp_path, FileSource(path), make_encoder())}
    names = imported_by("documents", code)
    assert names >= {"documents", "chat", "sources"}
    for name in names:
        with (code / f"{name}.py").open("a") as file:
            file.write("# changed\n")
        places.add(module.entry_folder(tmp_path, FileSource(path), make_encoder()))
    assert len(places) == 1 + len(names)


def test_another_entry_is_made_after_a_change_of_a_library(tmp_path, monkeypatch):
    path = write_rows(tmp_path / "rows.jsonl", chats(2))
    version, changed = importlib.metadata.version, set()
    monkeypatch.setattr(module, "_code_version", module._code_version.__wrapped__)  # which remembers its answer
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "99" if name in changed else version(name))
    places = [module.entry_folder(tmp_path, FileSource(path), make_encoder())]
    for library in ("transformers", "tokenizers"):
        changed.add(library)
        places.append(module.entry_folder(tmp_path, FileSource(path), make_encoder()))
    assert len(set(places)) == 3


def test_nothing_else_makes_another_entry(tmp_path, monkeypatch, no_tokenising):
    path = write_rows(tmp_path / "rows.jsonl", chats(2))
    opened(path, ChatEncoder(make_encoder().tokenizer, [1, 2]))
    no_tokenising()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link.jsonl").symlink_to(path)
    encoder = ChatEncoder(make_encoder().tokenizer, [2, 1], chat_template=CHATML)
    for other in (Path("rows.jsonl"), Path("link.jsonl")):
        opened(other, encoder, max_bad_rows=7)
    assert len(entries(tmp_path)) == 1


def test_what_a_killed_builder_left_is_not_taken_for_an_entry(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", ROWS)
    opened(path)
    [entry] = entries(tmp_path)
    partial = entry.with_suffix(".partial")
    entry.rename(partial)
    (partial / "documents.arrow").write_bytes(b"half")
    documents, _ = opened(path)
    assert told(documents) == encoded_one_by_one(ROWS, make_encoder())
    assert entries(tmp_path) == [entry]


class Killed(ChatEncoder):
    """Its process dies when the row with this text comes up."""

    at = "15?"

    def tokenise(self, texts):
        if any(self.at in text.text for text in texts):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().tokenise(texts)


def open_until_killed(path: Path) -> None:
    sources.CHUNK_ROWS = 3
    opened(path, Killed(make_encoder().tokenizer, [2]))


def test_after_a_builder_was_killed_the_next_one_makes_the_entry(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", chats(20))
    builder = multiprocessing.get_context("spawn").Process(target=open_until_killed, args=(path,))
    builder.start()
    builder.join()
    assert builder.exitcode == -signal.SIGKILL
    assert [left.suffix for left in entries(tmp_path)] == [".partial"]
    documents, _ = opened(path)
    assert told(documents) == encoded_one_by_one(chats(20), make_encoder())


class Waited(ChatEncoder):
    """Tokenises only after the other rank found the lock taken; notes that it did."""

    def tokenise(self, texts):
        self.world.barrier()  # the other rank may open now
        self.world.barrier()  # it waits
        self.log.append("tokenised")
        return super().tokenise(texts)


def open_together(world: World, path: Path) -> tuple[list[str], list[Any]]:
    encoder = Waited(make_encoder().tokenizer, [2])
    encoder.world, encoder.log = world, []

    def waits(text: str, **_: Any) -> None:
        encoder.log.append(text)
        world.barrier()

    with mock.patch.object(module, "print", waits, create=True):
        if not world.is_main:
            world.barrier()
        documents, _ = opened(path, encoder)
    return encoder.log, told(documents)


def test_of_two_processes_one_makes_the_entry_and_the_other_waits_for_it(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", ROWS)
    (first_log, first), (second_log, second) = run_ranks(open_together, 2, path)
    assert first_log == ["tokenised"]
    assert second_log == ["waiting for another process to tokenise the data"]
    assert first == second == encoded_one_by_one(ROWS, make_encoder())


def test_a_cache_that_cannot_be_written_is_refused(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(ValueError, match=r"cache of tokenised data in .* cannot be written .*or set data\.cache_dir"):
        open_documents(FileSource(path), make_encoder(), path / "below a file", 0)


# ------------------------------------------------------------------------------------------------ bad rows


@pytest.mark.parametrize("rows_before", [1, 7])
def test_rows_of_several_shapes_are_refused(tmp_path, short_chunks, rows_before):
    path = write_rows(tmp_path / "rows.jsonl", [*chats(rows_before), {"prompt": "q", "response": "a"}])
    message = rf"rows\.jsonl, row {rows_before + 1}: it has the shape 'prompt/response', the rows before it 'messages'"
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            opened(path)


def test_the_first_row_with_any_shape_decides(tmp_path, short_chunks):
    rows = ["{", *[{"x": 1}] * 5, {"text": "qa", "prompt_length": 1}]
    documents, summary = opened(write_rows(tmp_path / "rows.jsonl", rows), max_bad_rows=6)
    assert (len(documents), summary.shape, summary.rows) == (1, "text", 7)


def test_bad_rows_are_counted_by_cause_and_the_first_ten_listed(tmp_path, short_chunks, no_tokenising):
    rows = [*chats(2), "{", "", *[{"messages": []}] * 9, *chats(1), "[]", NO_ANSWER]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    _, summary = opened(path, max_bad_rows=11)
    assert summary.bad == {"malformed JSON": 1, "no messages": 9, "no object": 1}
    listed = [line.removeprefix(f"{path}, row ").split(":")[:2] for line in summary.bad_listed]
    assert listed == [["3", " malformed JSON"], *[[str(row), " no messages"] for row in range(5, 14)]]
    assert (summary.rows, summary.dropped) == (16, Counter({"no assistant turn": 1}))
    no_tokenising()
    assert opened(path, max_bad_rows=11)[1] == summary


def test_what_the_template_refuses_is_a_bad_row(tmp_path):
    refusing = "{% if messages[0].content == 'no' %}{{ raise_exception('never no') }}{% endif %}" + CHATML
    path = write_rows(tmp_path / "rows.jsonl", [*chats(1), chat("no", "yes"), *chats(1)])
    documents, summary = opened(path, make_encoder(chat_template=refusing), max_bad_rows=1)
    assert documents.row.tolist() == [1, 3]
    assert summary.bad_listed == [f"{path}, row 2: refused by the chat template: never no"]


def test_rows_with_tokens_that_have_no_embedding_are_bad(tmp_path, short_chunks):
    tokenizer = make_encoder().tokenizer
    tokenizer.add_tokens(["<tool>"])
    encoder = ChatEncoder(tokenizer, [2], chat_template=CHANGING, vocab_size=260)
    good, bad = chat("1", "one", "2", "two"), chat("1", "one", "2", "two <tool>")
    rows = [good, "{", bad, good, bad]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(ValueError, match=r"row 3: unknown token: '<tool>' is token 260"):
        load_data(DataConfig(path=str(path), cache_dir=str(tmp_path / "other")), encoder, 0, pack=True)
    documents, summary = opened(path, encoder, max_bad_rows=3)
    assert documents.row.tolist() == [1, 1, 4, 4]
    assert summary.bad == {"malformed JSON": 1, "unknown token": 2}
    assert [line.removeprefix(f"{path}, row ")[0] for line in summary.bad_listed] == ["2", "3", "5"]
    assert told(documents)[:2] == encoded_one_by_one([good], make_encoder(chat_template=CHANGING))


def test_a_row_nested_too_deeply_to_be_rendered_is_bad():  # defect reported
    arguments = '{"x": ' + "[" * 900 + "]" * 900 + "}"
    call = {"role": "assistant", "tool_calls": [{"name": "f", "arguments": arguments}]}
    lines = [json.dumps({"messages": [{"role": "user", "content": "q"}, call]}).encode()]
    encoder = make_encoder(chat_template=CHATML.replace("{{ message.content }}", "{{ message | tojson }}"))
    _, account = encode_chunk(encoder, Chunk("rows", 1, lines))
    assert account.bad_listed == ["rows, row 1: nested too deeply: no template can render it"]


class Counted:
    """A source that counts the chunks that were asked for."""

    def __init__(self, path: Path):
        self.file, self.name, self.taken = FileSource(path), str(path), 0

    def identity(self) -> str:
        return self.file.identity()

    def chunks(self, look: Look) -> Iterator[Chunk]:
        for chunk in self.file.chunks(look):
            self.taken += 1
            yield chunk


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param([*chats(1), *["{"] * 20, *chats(100)], id="some bad rows"),
        pytest.param([{"question": "q", "answer": "a"}] * 120, id="no row of any shape"),  # defect reported
    ],
)
def test_tokenising_ends_soon_after_ten_bad_rows_if_fewer_are_allowed(tmp_path, short_chunks, rows):
    source = Counted(write_rows(tmp_path / "rows.jsonl", rows))
    with pytest.raises(
        ValueError, match=r"1\d bad rows, where max_bad_rows allows 9:(\n  .*rows\.jsonl, row \d+: .*){10}$"
    ):
        open_documents(source, make_encoder(), tmp_path / "cache", 9, workers=1)
    assert source.taken <= 6
    assert open_documents(source, make_encoder(), tmp_path / "cache", 120, workers=1)[1].rows == len(rows)


@pytest.mark.parametrize("max_bad_rows", [0, 9, 0.5])
def test_up_to_ten_bad_rows_or_a_share_are_left_to_the_judgement_of_all_sources(tmp_path, max_bad_rows):
    count = 9 if max_bad_rows >= 1 or not max_bad_rows else 30
    path = write_rows(tmp_path / "rows.jsonl", [*chats(1), *["{"] * count])
    assert opened(path, max_bad_rows=max_bad_rows)[1].bad == {"malformed JSON": count}
