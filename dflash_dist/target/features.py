"""Features of packed rows on disk: captured once, then read in every epoch instead of running the target.

A folder holds
    index.json                   what the features are of, and rows a shard; written first, so nothing gets mixed in
    train-00000.safetensors ...  consecutive rows, each a tensor [filled, L * H] named by its number
    held-out-00000.safetensors   the same of the held-out rows
A shard is written under another name, synced, then renamed: under its own name it is whole, and with all of them there
the folder is. Padding is not stored, for no token attends to it. Every row has a checksum, verified at every read.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

from dflash_dist.data.template import check_day
from dflash_dist.files import (
    DTYPE_NAMES,
    differences,
    memory_of,
    refuse_changed,
    remove_leftovers,
    whole,
    write_safetensors,
    writing,
)
from dflash_dist.reading import check_fields, in_words, parse, read_object

INDEX = "index.json"
DATE = "data.date"  # its key for the day that the chat template wrote
EACH = "rows per shard"


@dataclass(frozen=True)
class Shard:
    """Consecutive rows of a part that share a file."""

    part: str
    number: int
    rows: range

    @property
    def name(self) -> str:
        return f"{self.part}-{self.number:05d}.safetensors"


class FeatureFolder:
    """The features of one data set in one folder.

    Args:
        index: what they are of, as plain values, and "rows per shard"; every shard carries its digest.
        filled: tokens without padding of each row, by part: "train" and "held-out".
        width: L * H, features a token.
    """

    def __init__(
        self, folder: Path, index: dict[str, Any], filled: dict[str, np.ndarray], width: int, dtype: torch.dtype
    ):
        self.folder, self.index, self.filled, self.width, self.dtype = folder, index, filled, width, dtype
        self.each = index[EACH]
        self.shards = [
            Shard(part, begin // self.each, range(begin, min(begin + self.each, len(lengths))))
            for part, lengths in filled.items()
            for begin in range(0, len(lengths), self.each)
        ]
        self._by_place = {(shard.part, shard.number): shard for shard in self.shards}
        self._digest = _hash(json.dumps(index, sort_keys=True).encode())
        self._header = lru_cache(maxsize=1024)(self._read_header)

    def bytes_of(self, shards: Iterable[Shard]) -> int:
        """Bytes of the features in `shards`, known before they are captured; headers are not counted."""
        tokens = sum(int(self.filled[s.part][s.rows.start : s.rows.stop].sum(dtype=np.int64)) for s in shards)
        return tokens * self.width * self.dtype.itemsize

    def lacking(self) -> list[Shard]:
        """The shards that are not there, or cut. What the bytes of the others say is verified when they are read."""
        return [shard for shard in self.shards if not self._is_whole(shard)]

    def begin(self) -> None:
        """Makes the folder, or goes on in it; takes away what a killed process left half done.

        Raises:
            ValueError: the folder cannot be written to.
        """
        with writing(f"the feature folder {self.folder}"):
            remove_leftovers(self.folder)
            if not (self.folder / INDEX).exists():
                with whole(self.folder / INDEX) as index:
                    index.write_text(json.dumps(self.index, indent=2))

    def write(self, shard: Shard, rows: dict[int, torch.Tensor]) -> None:
        """Writes a shard from its rows [filled, L * H] on the host.

        Raises:
            ValueError: the disk is full or gone.
        """
        assert list(rows) == list(shard.rows)
        assert all(t.shape == (self.filled[shard.part][row], self.width) for row, t in rows.items())
        assert all(tensor.dtype == self.dtype for tensor in rows.values()), "stored as captured"
        metadata = {"index": self._digest} | {str(row): _hash(memory_of(tensor)) for row, tensor in rows.items()}
        path = self.folder / shard.name
        with writing(path, "make room and run the same command again; finished shards stay"), whole(path) as file:
            write_safetensors(file, {str(row): tensor for row, tensor in rows.items()}, metadata)

    def read(self, part: str, rows: Sequence[int], seq_len: int, pin: bool = False) -> torch.Tensor:
        """[len(rows), seq_len, L * H] on the host: features, then zeros; a row past the end is all zeros.

        Read, not memory-mapped: straight into the batch, and a failing disk raises instead of killing the process.

        Raises:
            ValueError: a row is damaged; names it and its shard.
        """
        features = torch.empty(len(rows), seq_len, self.width, dtype=self.dtype, pin_memory=pin)
        for b, row in enumerate(rows):
            filled = int(self.filled[part][row]) if row < len(self.filled[part]) else 0
            features[b, filled:] = 0
            if filled:
                self._read_row(self._by_place[part, row // self.each], row, memory_of(features[b, :filled]))
        return features

    def _read_row(self, shard: Shard, row: int, into: memoryview) -> None:
        try:
            begins, checksums = self._header(shard)
            with (self.folder / shard.name).open("rb") as file:
                file.seek(begins[row])
                count = file.readinto(into)
            if count < len(into) or _hash(into) != checksums.get(str(row)):
                raise ValueError("its checksum differs" if count == len(into) else "the file is cut")
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(
                f"{self.folder / shard.name}, row {row}, is damaged: {error}. Delete this file and run capture again,"
                " which writes it anew"
            ) from error

    def _read_header(self, shard: Shard) -> tuple[dict[int, int], dict[str, str]]:
        """Where each row begins in the file, and the checksums.

        Raises:
            OSError, ValueError: the file is not this shard, whole.
        """
        path = self.folder / shard.name
        size = path.stat().st_size
        with path.open("rb") as file:
            data = 8 + int.from_bytes(file.read(8), "little")
            if size != data + self.bytes_of([shard]):
                raise ValueError(f"the file has {size:,} bytes, which is not what its rows take")
            header = parse(file.read(data - 8))
        try:
            checksums = header.pop("__metadata__")
            begins = {int(row): data + told["data_offsets"][0] for row, told in header.items()}
            shapes = {int(row): (told["dtype"], told["shape"][0]) for row, told in header.items()}
            expected = {row: (DTYPE_NAMES[str(self.dtype)], int(self.filled[shard.part][row])) for row in shard.rows}
            if checksums["index"] != self._digest or shapes != expected:
                raise ValueError("the file belongs to another capture")
        except (LookupError, TypeError, AttributeError) as error:
            raise ValueError(f"its header is damaged: {in_words(error)}") from error
        return begins, checksums

    def _is_whole(self, shard: Shard) -> bool:
        try:
            return bool(self._header(shard))
        except (OSError, ValueError):
            return False


def read_index(folder: Path) -> dict[str, Any]:
    """What the features in `folder` are of.

    Raises:
        ValueError: there are none, or the index is damaged.
    """
    file, advice = folder / INDEX, "capture again, into another folder"
    if not file.is_file():
        raise ValueError(f"{folder} holds no features: make them with `python -m dflash_dist capture`")
    index = read_object(file, advice)
    check_fields(index, {EACH: int}, str(file), advice)
    check_day(index, DATE, str(file), advice)
    if index[EACH] < 1:
        raise ValueError(f"{EACH} in {file} is {index[EACH]}, which is no number of rows: {advice}")
    return index


def refuse_other(stored: dict[str, Any], ours: dict[str, Any], folder: Path) -> None:
    """Refuses features of something else.

    Raises:
        ValueError: naming every key that differs, with both values.
    """
    changed = differences({key: stored.get(key) for key in ours}, ours, undivided=ours)
    refuse_changed(f"{folder} holds features of something else", changed, "capture into another folder")


def _hash(content: bytes | memoryview) -> str:
    return xxhash.xxh3_64_hexdigest(content)
