"""What the loaded target really does, found by trying it: whether documents in one row stay apart.

A list of architectures or of layer kinds cannot say it. Recurrent state, masks that are built without positions, rotary
frequencies that depend on the longest position in the batch: each mixes the documents of a row without a word, and each
shows in the features.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch

from dflash_dist.ranks import World
from dflash_dist.target.capture import HFDFlashTargetModel

SHORT = 12  # tokens of the longer of the two short documents
IN_A_ROW = 3  # two short documents and a long one
WINDOW = 16  # neighbouring tokens whose errors are averaged: one that an expert's router sends elsewhere is no leak

# Errors that are called rounding without asking, and the largest that ever is. Over the families of docs/families.md,
# a document in a row and alone differ by up to 7e-6, in bfloat16 0.06, where rows keep documents apart, and by 0.25 and
# more where one sees another.
SURELY_ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 0.03}
NEVER_ROUNDING = 0.2
# The same document at the same place of a row of the same shape, in other company, goes through the same kernels:
# hardly anything is left to round differently, so that much smaller leaks show.
SAME_SHAPE = 0.25


@dataclass(frozen=True)
class Packing:
    """What became of documents that shared rows, compared with each alone."""

    exact: bool
    error: float  # the largest, relative to the size of the features; infinite where no positions are taken
    rounding: float  # the largest that counts as rounding

    def describe(self, path: str) -> str:
        if self.exact:
            return f"{path} keeps packed documents apart (probed: off by {self.error:.1e}, which is rounding)"
        seen = f"off by {self.error:.2g}, where rounding makes at most {self.rounding:.1g}"
        if self.error == float("inf"):
            seen = "it takes no positions"
        return f"{path} mixes packed documents (probed: {seen}): one document a row, the rest of it is padding"


@torch.no_grad()
def probe_packing(
    target: HFDFlashTargetModel, world: World, tokens: Sequence[int], seq_len: int, rows: int = 1
) -> Packing:
    """Packs documents as training would, and compares each with itself alone and in other company; the same answer on
    all ranks.

    A full row holds two short documents and one that takes what is left: so whatever begins at some length (chunks,
    windows, rotary frequencies beyond the original positions) begins in the probe where it would in training. The other
    company is as many tokens in short documents. What counts as rounding is measured too: how far the features move if
    the embeddings change by their last bit, which says how much this target makes of an error, its routers included.

    Args:
        tokens: ids of ordinary tokens, which the documents are drawn from.
        rows: rows of a micro-batch; two are enough to see them disturb each other.
    """
    if not target.takes_positions():
        return Packing(False, float("inf"), 0.0)
    seq_len = max(seq_len, IN_A_ROW)
    short = min(SHORT, seq_len // 3)
    shorter = max(1, short // 2)
    long = seq_len - short - shorter
    sizes = [short, long, shorter, long, shorter, short][: IN_A_ROW * min(rows, 2)]
    long_ones = {1, 3}
    draw, pool = torch.Generator().manual_seed(0), torch.tensor(tokens)

    def document(length: int) -> torch.Tensor:
        return pool[torch.randint(len(pool), (length,), generator=draw)].to(world.device)

    alone = [document(size) for size in sizes]
    as_drawn = [[ids] for ids in alone]
    other = [list(document(long).split(short)) if k in long_ones else place for k, place in enumerate(as_drawn)]

    def run_alone() -> list[torch.Tensor]:
        return [_features(target, ids[None]) for ids in alone]

    expected = run_alone()
    with _last_bit_changed(target.get_input_embeddings()):
        moved = run_alone()
    packed, in_other_company = _packed_features(target, as_drawn), _packed_features(target, other)
    layers = len(target.target_layer_ids)
    rounding = min(max(_largest_error(moved, expected, layers), SURELY_ROUNDING[expected[0].dtype]), NEVER_ROUNDING)
    short_ones = [k for k in range(len(sizes)) if k not in long_ones]
    in_company = [in_other_company[k] for k in short_ones], [packed[k] for k in short_ones]
    seen = [
        (_largest_error(packed, expected, layers), rounding),
        (_largest_error(*in_company, layers), rounding * SAME_SHAPE),
    ]
    mixing = not all(error <= most for error, most in seen)  # also where one is not a number
    error, most = max(seen, key=lambda pair: pair[0] / pair[1])
    return Packing(world.sum_numbers(mixing)[0] == 0, error, most)


@torch.no_grad()
def refuse_lookahead(target: HFDFlashTargetModel, world: World, tokens: Sequence[int]) -> None:
    """Refuses a target whose features know later tokens, from which a draft would learn what it has to foretell: with a
    ValueError, on all ranks, that says how far other later tokens move the features."""
    draw, half = torch.Generator().manual_seed(1), SHORT
    pool = torch.tensor(tokens)
    same, *others = pool[torch.randint(len(pool), (3, 1, half), generator=draw)].to(world.device)
    before, after = (_features(target, torch.cat([same, other], dim=1))[:, :half] for other in others)
    seen = _error(after, before, len(target.target_layer_ids))
    if world.sum_numbers(not seen <= SURELY_ROUNDING[before.dtype])[0]:
        raise ValueError(
            f"the target's features depend on later tokens (probed: off by {seen:.2g}), which a draft has to foretell:"
            f" {type(target.model).__name__} is no causal decoder as it is called here"
        )


def _features(target: HFDFlashTargetModel, ids: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
    return target.generate_batch(ids, None, None, positions).hidden_states


def _packed_features(target: HFDFlashTargetModel, places: list[list[torch.Tensor]]) -> list[torch.Tensor]:
    """Of each place [1, n, L * H]. A place holds one or several documents, and a row so many places."""
    rows = [places[k : k + IN_A_ROW] for k in range(0, len(places), IN_A_ROW)]
    documents = [list(chain.from_iterable(row)) for row in rows]
    ids = torch.stack([torch.cat(row) for row in documents])
    positions = torch.stack([torch.cat([torch.arange(len(ids)) for ids in row]) for row in documents]).to(ids.device)
    sizes = [[sum(map(len, place)) for place in row] for row in rows]
    features = _features(target, ids, positions).split(1)
    return [part for row, lengths in zip(features, sizes, strict=True) for part in row.split(lengths, dim=1)]


def _largest_error(found: list[torch.Tensor], expected: list[torch.Tensor], layers: int) -> float:
    return max(_error(*pair, layers) for pair in zip(found, expected, strict=True))


def _error(found: torch.Tensor, expected: torch.Tensor, layers: int) -> float:
    """How far two features [1, n, L * H] of a document are apart, relative to their size: the largest mean over a
    window of tokens in a layer."""
    of_layers = (*expected.shape[:-1], layers, -1)
    found, expected = found.double().view(of_layers), expected.double().view(of_layers)
    apart = (found - expected).norm(dim=-1) / expected.norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
    return float(torch.stack([window.mean(dim=1) for window in apart.split(WINDOW, dim=1)]).max())


@contextmanager
def _last_bit_changed(embeddings: torch.nn.Module) -> Iterator[None]:
    def change(_module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        signs = torch.randint(2, output.shape, generator=torch.Generator().manual_seed(0)).to(output) * 2 - 1
        return output * (1 + torch.finfo(output.dtype).eps * signs)

    handle = embeddings.register_forward_hook(change)
    try:
        yield
    finally:
        handle.remove()
