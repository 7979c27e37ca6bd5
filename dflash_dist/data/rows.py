"""The data of a run: all its sources as packed training rows and held-out rows, with an account of every row read."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from dflash_dist.config import DataConfig
from dflash_dist.data.chat import ChatEncoder, Document
from dflash_dist.data.documents import NO_ANCHOR, Documents, Summary, open_documents
from dflash_dist.data.packing import SOURCE_SHARE, PackedRows, random_stream
from dflash_dist.data.sources import BadRows, describe_noted, describe_unread, find_sources
from dflash_dist.data.template import today

LEAST_SUPERVISED = 0.01


@dataclass(frozen=True)
class Loaded:
    """Everything under one or several paths."""

    documents: Documents
    conversation: np.ndarray  # [documents] the row that each came from, counted over all sources
    weight: np.ndarray  # [documents]
    path: np.ndarray  # [documents] number of the path that each came from
    learnable: np.ndarray  # [documents] whether it holds an anchor
    summaries: list[Summary]
    passed_over: list[Path]  # files that end as data does and are none

    def of_row(self, row: int) -> list[Document]:
        """The documents that came from a row of the data."""
        return [self.documents[int(number)] for number in np.flatnonzero(self.conversation == row)]


@dataclass(frozen=True)
class Part:
    """Training rows or held-out rows."""

    name: str
    rows: PackedRows
    conversations: int
    digests: list[str]  # of the documents it was chosen from

    @property
    def fingerprint(self) -> str:
        """Changes with any token of the rows."""
        return self.rows.fingerprint(*self.digests)

    @cached_property
    def tokens(self) -> int:
        return int(self.rows.lengths.sum(dtype=np.int64))

    @cached_property
    def supervised(self) -> int:
        return self._sum(at_least=1)

    @cached_property
    def anchors(self) -> int:
        """Tokens that could be an anchor."""
        return self._sum(at_least=2)

    def packed(self) -> Part:
        return replace(self, rows=self.rows.packed())

    def _sum(self, at_least: int) -> int:
        counts = self.rows.documents.supervised_tokens(self.rows.seq_len, at_least)
        return int(counts[self.rows.chosen].sum(dtype=np.int64))

    def describe(self) -> str:
        rows = self.rows
        return (
            f"{self.name}: {self.conversations:,} conversations -> {len(rows.chosen):,} documents,"
            f" {self.tokens:,} tokens ({self.supervised / self.tokens:.0%} supervised)"
            f" -> {len(rows):,} rows of {rows.seq_len}, {rows.filled:.1%} filled"
        )


@dataclass(frozen=True)
class Data:
    """What a run learns from."""

    path: str | dict[str, float]  # as the config names it
    train: Part
    held_out: Part | None
    loaded: Loaded  # what `data.path` gives, before anything is held out, repeated or packed
    summaries: list[Summary]
    passed_over: list[Path]  # files that end as data does and are none
    dropped: Counter[str]  # rows and documents that taught nothing, by cause
    cut: int  # documents that were longer than a row
    packs: bool  # several documents a row

    def packed(self) -> Data:
        """The same documents, several a row: where the target keeps them apart."""
        held_out = self.held_out.packed() if self.held_out else None
        return replace(self, train=self.train.packed(), held_out=held_out, packs=True)

    def describe(self) -> Iterator[str]:
        """What became of the data, a line a fact."""
        for summary in self.summaries:
            yield f"{summary.source}: {summary.rows:,} rows, read as '{summary.shape}'"
            for noted in describe_noted(summary.noted):
                yield f"{summary.source}: {noted}"
        if self.passed_over:
            yield "no data, and passed over: " + ", ".join(map(str, self.passed_over))
        if self.cut:
            yield f"cut at the end of a row: {self.cut:,} documents"
        if unread := sum((summary.unread for summary in self.summaries), Counter[str]()):
            yield describe_unread(unread)
        for cause, count in self.dropped.items():
            yield f"left out: {count:,} x {cause}"
        bad = [listed for summary in self.summaries for listed in summary.bad_listed]
        for listed in bad[: BadRows.LISTED]:
            yield f"bad row: {listed}"

    def describe_rows(self) -> Iterator[str]:
        """How the documents lie in rows, a line a part."""
        yield self.train.describe()
        if self.held_out:
            yield self.held_out.describe()

    def refuse_unsupervised(self) -> None:
        """Refuses data that teaches next to nothing; a look at it (preview) tells why.

        Raises:
            ValueError: almost no token is supervised.
        """
        if self.train.supervised < LEAST_SUPERVISED * self.train.tokens:
            raise ValueError(
                f"only {self.train.supervised:,} of the {self.train.tokens:,} tokens of {_named(self.path)} are"
                f" supervised, under {LEAST_SUPERVISED:.0%}: look at a conversation with"
                " `python -m dflash_dist preview`"
            )


def load_data(config: DataConfig, encoder: ChatEncoder, seed: int, pack: bool) -> Data:
    """Reads, tokenises and packs what the config names.

    Args:
        seed: chooses the documents of sources with a broken weight.
        pack: several documents a row.

    Raises:
        ValueError: nothing to read or to learn from, or too many bad rows.
    """
    loaded = _load(config.path if isinstance(config.path, dict) else {config.path: 1.0}, config, encoder)
    chosen = np.flatnonzero(loaded.learnable).astype(np.int32)
    all_loaded, held_out = [loaded], None
    if config.val_path:
        other = _load({config.val_path: 1.0}, config, encoder)
        all_loaded.append(other)
        held_out = _part("held out", other, np.flatnonzero(other.learnable), config.seq_len, encoder.pad_id, pack)
    elif config.val_conversations:
        conversations = np.unique(loaded.conversation[chosen])
        if config.val_conversations >= len(conversations):
            raise ValueError(
                f"data.val_conversations {config.val_conversations} leaves nothing to train on:"
                f" {_named(config.path)} gives {len(conversations)} conversations: hold out fewer, or name others in"
                " data.val_path"
            )
        every = len(conversations) / config.val_conversations
        picked = conversations[(np.arange(config.val_conversations) * every).astype(int)]
        is_held_out = np.isin(loaded.conversation[chosen], picked)
        held_out = _part("held out", loaded, chosen[is_held_out], config.seq_len, encoder.pad_id, pack)
        chosen = chosen[~is_held_out]
    chosen = _weighted(chosen, loaded, seed)
    train = _part("train", loaded, chosen, config.seq_len, encoder.pad_id, pack)
    dropped, cut = Counter[str](), 0
    for part in all_loaded:
        for summary in part.summaries:
            dropped += Counter(summary.bad) + summary.dropped
        dropped["no answer within a row"] += int((~part.learnable).sum())
        cut += int((part.documents.length[part.learnable] > config.seq_len).sum())
    return Data(
        config.path,
        train,
        held_out,
        loaded,
        [summary for part in all_loaded for summary in part.summaries],
        [file for part in all_loaded for file in part.passed_over],
        +dropped,
        cut,
        pack,
    )


def cache_folder(config: DataConfig) -> Path:
    """Where tokenised data lies."""
    if config.cache_dir:
        return Path(config.cache_dir).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dflash_dist"


def make_encoder(config: DataConfig, tokenizer: Any, stop_ids: list[int], vocab_size: int | None = None) -> ChatEncoder:
    """The encoder that the config asks for; `vocab_size` as `ChatEncoder` has it.

    Raises:
        ValueError: there is no chat template, its file cannot be read, or it knows not all of its arguments.
    """
    template = None
    if config.chat_template:
        try:
            template = Path(config.chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"data.chat_template {config.chat_template} cannot be read: {error}") from error
        if not template:
            raise ValueError(f"data.chat_template {config.chat_template} is empty")
    return ChatEncoder(
        *(tokenizer, stop_ids, config.template_args, template, config.last_turn_only, config.drop_reasoning),
        vocab_size=vocab_size,
        date=config.date or today(),
    )


def _load(paths: dict[str, float], config: DataConfig, encoder: ChatEncoder) -> Loaded:
    entries, summaries, bad, rows = [], [], BadRows(), 0
    conversations, weights, numbers_of_paths = [], [], []
    passed_over: list[Path] = []
    for number, (path, weight) in enumerate(paths.items()):
        for source in find_sources(path, passed_over):
            entry, summary = open_documents(source, encoder, cache_folder(config), config.max_bad_rows)
            bad.merge(summary.bad, summary.bad_listed)
            conversations.append(rows + entry.column("row"))
            weights.append(np.full(entry.index.num_rows, weight, np.float32))
            numbers_of_paths.append(np.full(entry.index.num_rows, number, np.int16))
            rows += summary.rows
            entries.append(entry)
            summaries.append(summary)
    bad.refuse_above(config.max_bad_rows, rows)
    documents = Documents(entries)
    learnable = documents.first_anchor <= config.seq_len - 2
    if not learnable.any():
        told = Counter(bad.by_cause) + sum((summary.dropped for summary in summaries), Counter[str]())
        told["no answer within a row"] += len(documents)
        first = documents.first_anchor.min(initial=NO_ANCHOR)
        advice = f"; data.seq_len must be at least {first + 2}" if first != NO_ANCHOR else ""
        raise ValueError(
            f"nothing in {_named(paths)} can be learned from: {rows} rows"
            + "".join(f", {count} x {cause}" for cause, count in (+told).items())
            + advice
        )
    return Loaded(
        documents,
        np.concatenate(conversations),
        np.concatenate(weights),
        np.concatenate(numbers_of_paths),
        learnable,
        summaries,
        passed_over,
    )


def _weighted(chosen: np.ndarray, loaded: Loaded, seed: int) -> np.ndarray:
    """Repeats the documents of sources with a weight above 1; of a broken weight's rest, takes that share of them."""
    weight = loaded.weight[chosen]
    if (weight == 1).all():
        return chosen
    whole = np.floor(weight).astype(np.int32)
    rest = weight - whole
    kept = np.zeros(len(chosen), np.int32)
    path = loaded.path[chosen]
    for number in np.unique(path[rest > 0]).tolist():
        among = np.flatnonzero(path == number)
        share = float(rest[among[0]])
        kept[random_stream(seed, SOURCE_SHARE, number).permutation(among)[: round(share * len(among))]] = 1
    return np.repeat(chosen, whole + kept)


def _part(name: str, loaded: Loaded, chosen: np.ndarray, seq_len: int, pad_id: int, pack: bool) -> Part:
    if not len(chosen):
        raise ValueError(f"{name}: no document is left: raise the weights of data.path")
    conversations = 1 + int(np.count_nonzero(np.diff(loaded.conversation[chosen])))  # they lie together
    rows = PackedRows(loaded.documents, chosen, seq_len, pad_id, pack)
    return Part(name, rows, conversations, [summary.digest for summary in loaded.summaries])


def _named(paths: str | dict[str, float]) -> str:
    return paths if isinstance(paths, str) else ", ".join(paths)
