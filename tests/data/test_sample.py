"""A look at data: all of its rows are counted, and those that are looked at are spread over all."""

from __future__ import annotations

from pathlib import Path

import pytest

from dflash_dist.data import sample, sources
from tests.data.files import chats, make_encoder, write_rows


def test_rows_are_counted_and_some_of_them_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "CHUNK_ROWS", 10)
    monkeypatch.setattr(sample, "CHUNKS", 4)
    (tmp_path / "d").mkdir()
    write_rows(tmp_path / "d/a.jsonl", chats(200))
    write_rows(tmp_path / "d/b.jsonl", chats(35))
    found = sample.look_at(str(tmp_path / "d"), make_encoder())
    assert found.rows == 235
    # Two chunks of each file: the first, and the one in its middle.
    assert found.account.rows == len(found.documents) == 40
    lengths = found.documents.length
    assert found.tokens == pytest.approx(float(lengths.mean()) * 235)
    assert found.longest_of(1.0) == lengths.max() and found.longest_of(0.0) == lengths.min()
    assert found.found == {token for i in range(40) for token in found.documents[i].input_ids.tolist()}


def test_a_few_rows_are_all_read(tmp_path: Path) -> None:
    found = sample.look_at(str(write_rows(tmp_path / "a.jsonl", chats(7))), make_encoder())
    assert found.rows == found.account.rows == len(found.documents) == 7
    assert found.tokens == found.documents.length.sum()
