"""The data of a run: all its sources as packed training rows and held-out rows, with an account of every row read."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dflash_dist.config import DataConfig
from dflash_dist.data.account import Account
from dflash_dist.data.chat import ChatEncoder
from dflash_dist.data.documents import Documents, open_documents
from dflash_dist.data.packing import SOURCE_SHARE, PackedRows, random_stream
from dflash_dist.data.sources import find_sources
from dflash_dist.data.template import today

LEAST_SUPERVISED = 0.01


@dataclass(frozen=True)
class Data:
    """What a run learns from."""

    path: str | dict[str, float]  # as the config names it
    train: PackedRows
    held_out: PackedRows | None
    accounts: list[Account]  # of all sources
    passed_over: list[Path]  # files that end as data does and are none
    dropped: Counter[str]  # rows and documents that taught nothing, by cause
    cut: int  # documents that were longer than a row

    @property
    def packs(self) -> bool:
        """Several documents a row."""
        return self.train.packs

    def packed(self) -> Data:
        """The same documents, several a row: where the target keeps them apart."""
        return replace(self, train=self.train.packed(), held_out=self.held_out and self.held_out.packed())

    def parts(self) -> dict[str, PackedRows]:
        """What there is of training rows and held-out rows, by name."""
        return {"train": self.train} | ({"held out": self.held_out} if self.held_out else {})

    def describe(self) -> Iterator[str]:
        """What became of the data, a line a fact."""
        for account in self.accounts:
            yield f"{account.source}: {account.rows:,} rows, read as '{account.shape}'"
            for noted in account.describe_noted():
                yield f"{account.source}: {noted}"
        total = Account.total(self.accounts)
        if self.passed_over:
            yield "no data, and passed over: " + ", ".join(map(str, self.passed_over))
        if self.cut:
            yield f"cut at the end of a row: {self.cut:,} documents"
        yield from total.describe_unread()
        for cause, count in self.dropped.items():
            yield f"left out: {count:,} x {cause}"
        for listed in total.bad_listed:
            yield f"bad row: {listed}"

    def describe_rows(self) -> Iterator[str]:
        """How the documents lie in rows, a line a part."""
        for name, rows in self.parts().items():
            yield f"{name}: {rows.describe()}"

    def refuse_unsupervised(self) -> None:
        """Raises a ValueError where almost no token is supervised; a look at the data (preview) tells why."""
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
    paths = config.path if isinstance(config.path, dict) else {config.path: 1.0}
    passed_over: list[Path] = []
    for named in (*paths, config.val_path):
        if named:
            find_sources(named)  # refuses what is not there before the first is tokenised
    documents, path, learnable = _load(list(paths), config, encoder, passed_over)
    read = [(documents, learnable)]

    def rows(name: str, documents: Documents, chosen: np.ndarray) -> PackedRows:
        if not len(chosen):
            raise ValueError(f"{name}: no document is left: raise the weights of data.path")
        return PackedRows(documents, chosen, config.seq_len, encoder.pad_id, pack)

    chosen, held_out = np.flatnonzero(learnable).astype(np.int32), None
    if config.val_path:
        others, _, usable = _load([config.val_path], config, encoder, passed_over)
        read.append((others, usable))
        held_out = rows("held out", others, np.flatnonzero(usable))
    elif config.val_conversations:
        is_held_out = np.isin(documents.row[chosen], _spread(documents.row[chosen], config))
        held_out = rows("held out", documents, chosen[is_held_out])
        chosen = chosen[~is_held_out]
    train = rows("train", documents, _weighted(chosen, path[chosen], list(paths.values()), seed))

    dropped, cut = Counter[str](), 0
    for some, usable in read:
        for account in some.accounts:
            dropped += account.bad + account.dropped
        dropped["no answer within a row"] += int((~usable).sum())
        cut += int((some.length[usable] > config.seq_len).sum())
    accounts = [account for some, _ in read for account in some.accounts]
    return Data(config.path, train, held_out, accounts, passed_over, +dropped, cut)


def _load(
    paths: list[str], config: DataConfig, encoder: ChatEncoder, passed_over: list[Path]
) -> tuple[Documents, np.ndarray, np.ndarray]:
    """The documents under all paths; of each the number of its path, and whether it holds an anchor."""
    entries, numbers = [], []
    for number, path in enumerate(paths):
        for source in find_sources(path, passed_over):
            entries.append(open_documents(source, encoder, cache_folder(config), config.max_bad_rows))
            numbers.append(number)
    documents, total = Documents(entries), Account.total(account for _, account in entries)
    total.refuse_above(config.max_bad_rows, total.rows)
    learnable = documents.anchors(config.seq_len) > 0
    if not learnable.any():
        dropped = total.bad + total.dropped + Counter({"no answer within a row": len(documents)})
        causes = "".join(f", {count} x {cause}" for cause, count in dropped.items())
        first = documents.first_anchor()
        advice = f"; data.seq_len must be at least {first + 2}" if first is not None else ""
        raise ValueError(f"nothing in {', '.join(paths)} can be learned from: {total.rows} rows{causes}{advice}")
    return documents, np.repeat(numbers, [len(table) for table, _ in entries]), learnable


def _spread(rows: np.ndarray, config: DataConfig) -> np.ndarray:
    """As many of the conversations as are to be held out, evenly over all of them."""
    conversations = np.unique(rows)
    if config.val_conversations >= len(conversations):
        raise ValueError(
            f"data.val_conversations {config.val_conversations} leaves nothing to train on: {_named(config.path)} gives"
            f" {len(conversations)} conversations: hold out fewer, or name others in data.val_path"
        )
    every = len(conversations) / config.val_conversations
    return conversations[(np.arange(config.val_conversations) * every).astype(int)]


def _weighted(chosen: np.ndarray, path: np.ndarray, weights: list[float], seed: int) -> np.ndarray:
    """Repeats the documents of paths with a weight above 1; of a broken weight's rest, takes that share of them."""
    whole, rest = np.divmod(np.array(weights, np.float32), 1)
    times = whole.astype(np.int32)[path]
    for number in np.flatnonzero(rest).tolist():
        among = np.flatnonzero(path == number)
        share = round(float(rest[number]) * len(among))
        times[random_stream(seed, SOURCE_SHARE, number).permutation(among)[:share]] += 1
    return np.repeat(chosen, times)


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


def _named(paths: str | dict[str, float]) -> str:
    return paths if isinstance(paths, str) else ", ".join(paths)
