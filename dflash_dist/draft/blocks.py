"""Anchors, labels and weights of the blocks that a micro-batch trains (arXiv 2602.06036, section 4.2).

Built on the host, before any forward: they need only ids and masks, and the step's total weight must be known first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch


@dataclass(frozen=True)
class Blocks:
    """`A` blocks of `K` slots for each of `B` rows.

    Slot 0 holds the anchor's real token and is never a target; slots 1..K-1 hold the mask token, and slot k's label is
    the token at anchor + k. A row with fewer anchors than A is filled up with blocks of zero weight.
    """

    anchors: torch.Tensor  # [B, A] int64: index in the row, ascending, the unused ones (index 0) last
    documents: torch.Tensor  # [B, A] int64: the anchor's document; -1 for unused blocks
    input_ids: torch.Tensor  # [B, A, K] int64
    position_ids: torch.Tensor  # [B, A, K] int64: slot k sits at position(anchor) + k
    labels: torch.Tensor  # [B, A, K-1] int64
    weights: torch.Tensor  # [B, A, K-1] float32

    @property
    def block_size(self) -> int:
        return self.input_ids.shape[-1]

    def to(self, device: torch.device) -> Blocks:
        return Blocks(*(getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)))


def decay_weights(block_size: int, gamma: float) -> torch.Tensor:
    """[K-1] float32: `exp(-(k-1) / gamma)` for k = 1..K-1 (arXiv 2602.06036, eq. 4)."""
    return torch.exp(-torch.arange(block_size - 1, dtype=torch.float32) / gamma)


def build_blocks(
    input_ids: torch.Tensor,
    loss_mask: torch.Tensor,
    document_ids: torch.Tensor,
    position_ids: torch.Tensor,
    *,
    anchors: int,
    block_size: int,
    mask_token_id: int,
    gamma: float,
    generators: Sequence[np.random.Generator],
) -> Blocks:
    """Samples anchors without replacement and lays their blocks out.

    An anchor is a supervised token whose next token, in the same document, is supervised too. A label counts only while
    every label before it in the block counted: up to the document's end, the row's end, or an unsupervised token.

    Args:
        input_ids, loss_mask, document_ids, position_ids: [B, S] on the host.
        anchors: A, blocks a row at most.
        generators: one a row, so that a row's anchors do not depend on the rows beside it.
    """
    rows, length = input_ids.shape
    # supervised_next[b, i]: the token after i exists, belongs to i's document, and is supervised
    supervised_next = torch.zeros_like(loss_mask)
    supervised_next[:, :-1] = loss_mask[:, 1:] & (document_ids[:, 1:] == document_ids[:, :-1])
    eligible = loss_mask & supervised_next

    index = torch.zeros(rows, anchors, dtype=torch.int64)
    used = torch.zeros(rows, anchors, dtype=torch.bool)
    for row, generator in enumerate(generators):
        candidates = eligible[row].nonzero().flatten().numpy()
        count = min(anchors, len(candidates))
        drawn = generator.choice(candidates, size=count, replace=False)
        index[row, :count] = torch.from_numpy(np.sort(drawn))
        used[row, :count] = True

    row_of = torch.arange(rows)[:, None]
    offsets = torch.arange(block_size)
    # A label counts while the chain of supervised successors from the anchor is unbroken.
    before_label = (index[..., None] + offsets[:-1]).clamp(max=length - 1)  # [B, A, K-1]
    counts = supervised_next[row_of[..., None], before_label].cumprod(dim=-1) * used[..., None]
    label_index = (index[..., None] + offsets[1:]).clamp(max=length - 1)

    block_ids = torch.full((rows, anchors, block_size), mask_token_id)
    block_ids[..., 0] = input_ids[row_of, index]
    return Blocks(
        anchors=index,
        documents=torch.where(used, document_ids[row_of, index], -1),
        input_ids=block_ids,
        position_ids=position_ids[row_of, index][..., None] + offsets,
        labels=input_ids[row_of[..., None], label_index],
        weights=counts * decay_weights(block_size, gamma),
    )
