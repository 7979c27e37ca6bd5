"""Who sees whom in a layer of a draft, and the only place that says it.

Every backend of attention, and decoding, ask the two predicates of `Mask`. Their arguments are integer tensors that
broadcast against each other.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Mask:
    """A slot sees the context strictly before its block's anchor, in the anchor's document, and slots of its own block.

    Slot k of a block anchored at p sits at p + k.
    """

    window: int | None = None  # a slot at q sees the context token at c where q - c < window; None: however far it is
    causal: bool = False  # within a block a slot sees those up to itself; otherwise all

    def sees_context(
        self,
        anchor: torch.Tensor,
        slot: torch.Tensor,
        document: torch.Tensor,
        context: torch.Tensor,
        context_document: torch.Tensor,
    ) -> torch.Tensor:
        """Whether slot `slot` of the block anchored at index `anchor` sees the context token at index `context`."""
        seen = (context < anchor) & (context_document == document)
        return seen if self.window is None else seen & (anchor + slot - context < self.window)

    def sees_slot(
        self, block: torch.Tensor, slot: torch.Tensor, other_block: torch.Tensor, other_slot: torch.Tensor
    ) -> torch.Tensor:
        """Whether slot `slot` of `block` sees slot `other_slot` of `other_block`."""
        seen = block == other_block
        return seen & (other_slot <= slot) if self.causal else seen

    def within_block(self, slots: int) -> torch.Tensor:
        """[K, K]: which slots of its block a slot sees."""
        slot, block = torch.arange(slots), torch.zeros(1, dtype=torch.int64)
        return self.sees_slot(block, slot[:, None], block, slot[None]).expand(slots, slots)

    def after_context(self, length: int, slots: int) -> torch.Tensor:
        """[K, C + K]: what the slots of one block see of its document's `length` tokens before it, and of itself."""
        slot, document = torch.arange(slots)[:, None], torch.zeros(1, dtype=torch.int64)
        anchor, context = torch.tensor(length), torch.arange(length)
        seen = self.sees_context(anchor, slot, document, context, document).expand(slots, length)
        return torch.cat([seen, self.within_block(slots)], dim=1)


FULL = Mask()


def seen_by_all(visible: torch.Tensor) -> int:
    """How many keys of `visible` [queries, keys], from the first on, every query sees: there is nothing to mask."""
    return int(visible.all(dim=0).cumprod(dim=0).sum())
