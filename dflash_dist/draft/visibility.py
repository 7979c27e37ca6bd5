"""Who sees whom. The one place that says it; every attention backend derives its mask from two predicates, `sees_*`.

A block sees the context strictly before its anchor, in the anchor's document, and its own slots in both directions.
Their arguments are integer tensors that broadcast against each other.
"""

from __future__ import annotations

import torch


def sees_context(
    anchor: torch.Tensor, anchor_document: torch.Tensor, context: torch.Tensor, context_document: torch.Tensor
) -> torch.Tensor:
    """Whether a block anchored at `anchor` sees the context token at index `context`."""
    return (context < anchor) & (context_document == anchor_document)


def sees_slot(block: torch.Tensor, other_block: torch.Tensor) -> torch.Tensor:
    """Whether the slots of `block` see the slots of `other_block`."""
    return block == other_block


def seen_by_all(visible: torch.Tensor) -> int:
    """How many keys of `visible` [queries, keys], from the first on, every query sees: there is nothing to mask."""
    return int(visible.all(dim=0).cumprod(dim=0).sum())
