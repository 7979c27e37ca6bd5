"""The data of a config as training will see it: `python -m dflash_dist preview --config C.yaml [--row N] [a.b=c ...]`.

Says what became of every row, how long documents are, how much of them is supervised and how well they pack, and prints
one row token by token with its mask.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dflash_dist.config import Config
from dflash_dist.data.chat import Document
from dflash_dist.data.rows import Data
from dflash_dist.options import ConfigOptions, option, parse
from dflash_dist.ranks import World
from dflash_dist.target.features import read_index
from dflash_dist.target.load import TargetInfo, expects_packing
from dflash_dist.training import setup
from dflash_dist.training.context import stored_layout

GREEN, PLAIN = "\033[32m", "\033[0m"


@dataclass(frozen=True, kw_only=True)
class PreviewOptions(ConfigOptions):
    row: int | None = option("row of the data to print, from 1 over all sources; the first by default", None)


def main(argv: list[str]) -> None:
    options = parse(PreviewOptions, "preview", __doc__, argv)
    world = World(0, 1, torch.device("cpu"))
    config = setup.make_builtins(options.load(), world)
    config, info = setup.check_target(config, world)
    config = setup.fix_date(config, info, world)
    data = setup.read_data(config, info, world)  # says itself what became of the rows
    data = setup.lay_out(data, *expected_layout(config, info), world)
    for line in describe(config, data):
        print(line)
    row = options.row if options.row is not None else int(data.train.documents.row[0])
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    for line in show_row(data, row, info.tokenizer, colour):
        print(line)
    data.refuse_unsupervised()  # as training would, but after the look that tells why


def expected_layout(config: Config, info: TargetInfo) -> tuple[bool, str]:
    """Whether rows will hold several documents, and how that is said."""
    if config.target.features:
        folder = Path(config.target.features)
        return stored_layout(read_index(folder), folder, info)
    packs = expects_packing(info.text)
    return packs, f"{'several documents' if packs else 'one document'} a row, to go by the config: the run probes it"


def describe(config: Config, data: Data) -> Iterator[str]:
    """Lengths, anchors and steps, a line a fact."""
    for name, rows in data.parts().items():
        lengths = rows.documents.length[rows.chosen]
        shares = "  ".join(f"{int(np.percentile(lengths, share))} ({share} %)" for share in (10, 50, 90, 99))
        yield f"{name}: document lengths {shares}  {lengths.max()} (longest) tokens"
        sampled = np.minimum(rows.anchors, config.loss.anchors).sum()
        yield (
            f"{name}: {rows.anchors.sum():,} tokens can be an anchor; {sampled / len(rows):.0f} of loss.anchors"
            f" {config.loss.anchors} are used in a row, on average"
        )
    steps = setup.planned_steps(config, len(data.train))
    batch = config.train.global_batch_size
    yield (
        f"steps: {steps:,} of {batch} rows, {steps * batch / len(data.train):.1f} passes over the data,"
        f" about {steps * batch * data.train.tokens / len(data.train):.3g} tokens"
    )


def show_row(data: Data, row: int, tokenizer: Any, colour: bool) -> Iterator[str]:
    """Every document of a row of the data, a line a token: its place, a + where supervised, its id and text.

    Raises:
        ValueError: the row gave no document.
    """
    documents = data.train.documents.of_row(row)
    if not documents:
        last = sum(account.rows for account in data.train.documents.accounts)
        raise ValueError(
            f"row {row} gives no document: rows count from 1 to {last}, and bad or empty ones are left out"
        )
    for number, document in enumerate(documents, 1):
        supervised = int(document.loss_mask.sum())
        yield (
            f"\nrow {row}, document {number} of {len(documents)}: {len(document.input_ids)} tokens,"
            f" {supervised} supervised (+)"
        )
        yield from _token_lines(document, tokenizer, colour)


def _token_lines(document: Document, tokenizer: Any, colour: bool) -> Iterator[str]:
    for place, (token, supervised) in enumerate(zip(document.input_ids.tolist(), document.loss_mask)):
        text = f"{place:>7} {'+' if supervised else ' '} {token:>7}  {tokenizer.decode([token])!r}"
        yield f"{GREEN}{text}{PLAIN}" if colour and supervised else text
