"""A micro-batch: packed rows of tokens, and the blocks that are trained in them (arXiv 2602.06036, section 4.2).

Built on the host, before any forward: blocks need only ids and masks, and the step's total weight must be known first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

# The slots that enter the head come in multiples of this: matrix products like it, and a device sees few shapes.
PADDING = 64


class Place(NamedTuple):
    """Where the rows of a micro-batch come from."""

    part: str
    rows: list[int]


@dataclass(frozen=True)
class Batch:
    """`B` rows of `S` tokens, and in each of them `A` blocks of `K` slots.

    Positions restart with each document. Padding at a row's end is a document of its own without supervision.

    Slot 0 of a block holds the anchor's real token and is never a target; slots 1..K-1 hold the mask token, and slot
    k's label is the token at anchor + k. A row with fewer anchors than A is filled up with blocks of zero weight.
    """

    input_ids: torch.Tensor  # [B, S] int64
    loss_mask: torch.Tensor  # [B, S] bool, True where supervised
    position_ids: torch.Tensor  # [B, S] int64
    document_ids: torch.Tensor  # [B, S] int64, counted within the row

    anchors: torch.Tensor  # [B, A] int64: index in the row, ascending, the unused ones (index 0) last
    anchor_documents: torch.Tensor  # [B, A] int64: the anchor's document; -1 for unused blocks
    slot_ids: torch.Tensor  # [B, A, K] int64
    slot_positions: torch.Tensor  # [B, A, K] int64: slot k sits at position(anchor) + k
    labels: torch.Tensor  # [B, A, K-1] int64
    weights: torch.Tensor  # [B, A, K-1] float32, 0 where no label counts

    weighted: torch.Tensor  # [N] int64: the slots with weight, in flattened [B, A, K-1], then 0 up to a full PADDING
    count: int  # how many of them are not padding
    place: Place
    filled: list[int]  # tokens of each row before its padding

    @staticmethod
    def of_rows(
        input_ids: torch.Tensor,
        loss_mask: torch.Tensor,
        document_ids: torch.Tensor,
        position_ids: torch.Tensor,
        place: Place | None = None,
        filled: list[int] | None = None,
    ) -> Batch:
        """Rows [B, S] without blocks so far; `filled` with tokens to their ends where nothing else is said."""
        rows, length = input_ids.shape
        none = input_ids.new_zeros(rows, 0)
        weights = torch.zeros(rows, 0, 0)
        return Batch(
            *(input_ids, loss_mask, position_ids, document_ids),
            *(none, none, none[..., None], none[..., None], weights.long(), weights),
            weighted=torch.zeros(0, dtype=torch.int64),
            count=0,
            place=place or Place("", list(range(rows))),
            filled=[length] * rows if filled is None else filled,
        )

    @property
    def slots(self) -> int:
        """K, of a block."""
        return self.slot_ids.shape[-1]

    @property
    def weight(self) -> float:
        return self.weights.sum(dtype=torch.float64).item()

    @property
    def previous(self) -> torch.Tensor:
        """[B, A, K-1]: the token before each label, the anchor's or the label before."""
        return torch.cat([self.slot_ids[..., :1], self.labels[..., :-1]], dim=-1)

    def to(self, device: torch.device) -> Batch:
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        moved: Any = {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}
        return dataclasses.replace(self, **moved)


def may_be_anchor(loss_mask: torch.Tensor, document_ids: torch.Tensor) -> torch.Tensor:
    """[B, S] bool: a supervised token whose next token, in the same document, is supervised too."""
    eligible = torch.zeros_like(loss_mask)
    eligible[:, :-1] = loss_mask[:, :-1] & loss_mask[:, 1:] & (document_ids[:, 1:] == document_ids[:, :-1])
    return eligible


def sample_blocks(
    batch: Batch,
    *,
    anchors: int,
    slot_weights: torch.Tensor,
    mask_token_id: int,
    generators: Sequence[np.random.Generator],
) -> Batch:
    """The rows of `batch` with blocks, whose anchors are sampled without replacement.

    A label counts only while every label before it in the block counted: up to the document's end, the row's end, or an
    unsupervised token.

    Args:
        batch: on the host.
        anchors: A, blocks a row at most.
        slot_weights: [K-1] of the labels that count.
        generators: one a row, so that a row's anchors do not depend on the rows beside it.
    """
    rows, length = batch.input_ids.shape
    eligible = may_be_anchor(batch.loss_mask, batch.document_ids)

    index = torch.zeros(rows, anchors, dtype=torch.int64)
    used = torch.zeros(rows, anchors, dtype=torch.bool)
    for row, generator in enumerate(generators):
        candidates = eligible[row].nonzero().flatten().numpy()
        count = min(anchors, len(candidates))
        drawn = generator.choice(candidates, size=count, replace=False)
        index[row, :count] = torch.from_numpy(np.sort(drawn))
        used[row, :count] = True

    row_of = torch.arange(rows)[:, None]
    offsets = torch.arange(len(slot_weights) + 1)
    # A label counts while all tokens from the anchor up to the one before it could be anchors themselves.
    before_label = (index[..., None] + offsets[:-1]).clamp(max=length - 1)  # [B, A, K-1]
    counts = eligible[row_of[..., None], before_label].cumprod(dim=-1) * used[..., None]
    label_index = (index[..., None] + offsets[1:]).clamp(max=length - 1)

    slot_ids = torch.full((rows, anchors, len(offsets)), mask_token_id)
    slot_ids[..., 0] = batch.input_ids[row_of, index]
    weights = counts * slot_weights
    weighted, count = weighted_slots(weights)
    return dataclasses.replace(
        batch,
        anchors=index,
        anchor_documents=torch.where(used, batch.document_ids[row_of, index], -1),
        slot_ids=slot_ids,
        slot_positions=batch.position_ids[row_of, index][..., None] + offsets,
        labels=batch.input_ids[row_of[..., None], label_index],
        weights=weights,
        weighted=weighted,
        count=count,
    )


def weighted_slots(weights: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The slots that enter the head, found on the host: `Batch.weighted` and its count."""
    index = weights.flatten().nonzero().flatten()
    padding = -len(index) % PADDING
    return torch.cat([index, index.new_zeros(padding)]), len(index)
