"""Storage of features: what comes back, and what is refused."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dflash_dist.target.features import FeatureFolder, Shard, read_index, refuse_other
from tests.disk import watch_disk

FILLED = {"train": np.array([5, 8, 1, 8, 3]), "held-out": np.array([2])}
WIDTH, SEQ_LEN = 6, 8
INDEX = {"target": "some/model@abc", "rows per shard": 2}


def rows_of(shard: Shard, dtype: torch.dtype) -> dict[int, torch.Tensor]:
    made = {}
    for row in shard.rows:
        generator = torch.Generator().manual_seed(row + 100 * (shard.part == "train"))
        made[row] = torch.randn(int(FILLED[shard.part][row]), WIDTH, generator=generator).to(dtype)
    return made


def make(folder: Path, dtype: torch.dtype = torch.bfloat16) -> FeatureFolder:
    features = FeatureFolder(folder, INDEX, FILLED, WIDTH, dtype)
    features.begin()
    for shard in features.shards:
        features.write(shard, rows_of(shard, dtype))
    return features


def again(folder: Path) -> FeatureFolder:
    """As another process sees it."""
    return FeatureFolder(folder, INDEX, FILLED, WIDTH, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_come_back_bitwise_in_any_order_with_zeros_behind(tmp_path: Path, dtype: torch.dtype) -> None:
    features = make(tmp_path, dtype)
    names = ["train-00000", "train-00001", "train-00002", "held-out-00000"]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["index.json", *(f"{n}.safetensors" for n in names)])
    expected = {(s.part, row): tensor for s in features.shards for row, tensor in rows_of(s, dtype).items()}
    for part, rows in (("train", [4, 0, 3]), ("train", [1, 2]), ("held-out", [0, 1, 7])):
        read = features.read(part, rows, SEQ_LEN)
        assert read.shape == (len(rows), SEQ_LEN, WIDTH) and read.dtype == dtype
        for got, row in zip(read, rows):
            whole = torch.zeros(SEQ_LEN, WIDTH, dtype=dtype)
            if (part, row) in expected:
                whole[: FILLED[part][row]] = expected[part, row]
            assert torch.equal(got, whole)


def test_the_bytes_are_known_before_and_the_files_are_safetensors(tmp_path: Path) -> None:
    features = make(tmp_path)
    written = 0
    for shard in features.shards:
        tensors = load_file(tmp_path / shard.name)
        assert all(torch.equal(tensors[str(row)], t) for row, t in rows_of(shard, torch.bfloat16).items())
        size = sum(tensor.nbytes for tensor in tensors.values())
        assert features.bytes_of([shard]) == size
        written += size
    assert features.bytes_of(features.shards) == written == (5 + 8 + 1 + 8 + 3 + 2) * WIDTH * 2


def test_every_single_damaged_byte_of_the_rows_is_found(tmp_path: Path) -> None:
    features = make(tmp_path)
    path = tmp_path / "train-00001.safetensors"
    whole = path.read_bytes()
    data = len(whole) - features.bytes_of([features.shards[1]])
    split = data + 1 * WIDTH * 2  # row 2 holds one token
    for place in range(data, len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        row, other = (2, 3) if place < split else (3, 2)
        with pytest.raises(ValueError, match=rf"train-00001\.safetensors, row {row}, is damaged: its checksum differs"):
            again(tmp_path).read("train", [row], SEQ_LEN)
        again(tmp_path).read("train", [other, 0, 4], SEQ_LEN)


def test_a_damaged_header_is_never_read_over(tmp_path: Path) -> None:
    features = make(tmp_path)
    path = tmp_path / "train-00001.safetensors"
    whole = path.read_bytes()
    expected = features.read("train", [2, 3], SEQ_LEN)
    refused = 0
    for place in range(len(whole) - features.bytes_of([features.shards[1]])):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            assert torch.equal(again(tmp_path).read("train", [2, 3], SEQ_LEN), expected)
        except ValueError as error:
            assert "train-00001.safetensors, row" in str(error) and "Delete this file and run capture" in str(error)
            refused += 1
    assert refused > 100


@pytest.mark.parametrize("kept", [0, 7, 100, -1], ids=lambda kept: f"cut to {kept}")
def test_a_cut_shard_is_lacking_and_cannot_be_read(tmp_path: Path, kept: int) -> None:
    make(tmp_path)
    path = tmp_path / "train-00000.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    assert [shard.name for shard in again(tmp_path).lacking()] == ["train-00000.safetensors"]
    with pytest.raises(ValueError, match=r"train-00000\.safetensors, row 1, is damaged"):
        again(tmp_path).read("train", [1], SEQ_LEN)


def test_a_shard_cut_after_it_was_opened_cannot_be_read(tmp_path: Path) -> None:
    features = make(tmp_path)
    features.read("train", [0], SEQ_LEN)
    path = tmp_path / "train-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"row 1, is damaged: the file is cut"):
        features.read("train", [1], SEQ_LEN)


def test_a_missing_shard_is_lacking_and_named(tmp_path: Path) -> None:
    make(tmp_path)
    (tmp_path / "held-out-00000.safetensors").unlink()
    assert [shard.name for shard in again(tmp_path).lacking()] == ["held-out-00000.safetensors"]
    with pytest.raises(ValueError, match=r"held-out-00000\.safetensors, row 0, .* No such file"):
        again(tmp_path).read("held-out", [0], SEQ_LEN)


def test_a_shard_of_another_capture_is_lacking(tmp_path: Path) -> None:
    make(tmp_path)
    other = FeatureFolder(tmp_path, {**INDEX, "target": "some/model@def"}, FILLED, WIDTH, torch.bfloat16)
    assert other.lacking() == other.shards
    with pytest.raises(ValueError, match="the file belongs to another capture"):
        other.read("train", [0], SEQ_LEN)


@contextmanager
def small_disk(limit: int) -> Iterator[None]:
    """The operating system refuses larger files."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_fills_up_is_a_clear_error_and_leaves_the_finished_shards(tmp_path: Path) -> None:
    features = make(tmp_path)
    second = features.shards[1]
    (tmp_path / second.name).unlink()
    with small_disk(300), pytest.raises(ValueError, match=r"train-00001.* cannot be written .*make room"):
        features.write(second, rows_of(second, torch.bfloat16))
    assert again(tmp_path).lacking() == [second]
    assert not list(tmp_path.glob("*.partial"))
    features.write(second, rows_of(second, torch.bfloat16))
    assert not again(tmp_path).lacking()


def test_what_a_killed_process_left_half_done_is_taken_away(tmp_path: Path) -> None:
    features = make(tmp_path)
    (tmp_path / "train-00000.safetensors.0123abcd.partial").write_bytes(b"half")
    features.begin()
    assert not list(tmp_path.glob("*.partial")) and not features.lacking()


def test_a_shard_gets_its_name_only_after_it_was_synced(tmp_path: Path, monkeypatch) -> None:
    features = make(tmp_path)
    shard, disk = features.shards[0], watch_disk(monkeypatch)
    features.write(shard, rows_of(shard, torch.bfloat16))
    size, names = (tmp_path / shard.name).stat().st_size, " ".join(sorted(path.name for path in tmp_path.iterdir()))
    partial = f".{shard.name}.partial"
    assert disk == [("sync", partial, str(size)), ("rename", partial, shard.name), ("sync", tmp_path.name, names)]


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"feature folder .*file/features cannot be written "):
        again(tmp_path / "file" / "features").begin()


def test_every_key_that_differs_is_named_with_both_values(tmp_path: Path) -> None:
    make(tmp_path)
    with pytest.raises(ValueError, match=r"Changed: target: 'some/model@abc' -> 'b'; rows per shard: 2 -> 3\. Restore"):
        refuse_other(read_index(tmp_path), {"target": "b", "rows per shard": 3}, tmp_path)
    with pytest.raises(ValueError, match=r"Changed: layers: None -> \[1\]\."):  # of before the key was there
        refuse_other(read_index(tmp_path), {"layers": [1]}, tmp_path)
    with pytest.raises(ValueError, match=r"nowhere holds no features: make them with `python -m dflash_dist capture`"):
        read_index(tmp_path / "nowhere")
