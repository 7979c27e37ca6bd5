"""Attention of block slots over the context and their own block, for training.

Two backends with one interface: an object is built once for a micro-batch and called by every layer with
    query                   [B, heads, A*K, D]
    context_key, _value     [B, kv_heads, S, D]
    block_key, _value       [B, kv_heads, A*K, D]
and returns [B, heads, A*K, D]. Neither ever holds a dense [A*K, S + A*K] mask.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from dflash_dist.draft.blocks import Blocks
from dflash_dist.draft.visibility import sees_context, sees_slot

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def training_attention(blocks: Blocks, document_ids: torch.Tensor) -> Attend:
    """The fastest backend for the device on which `blocks` lie. `document_ids` [B, S] lie there too."""
    return FlexAttention(blocks, document_ids) if document_ids.is_cuda else ChunkedAttention(blocks, document_ids)


def full_attention(query, context_key, context_value, block_key, block_value) -> torch.Tensor:
    """Every slot sees all of the context and its block: one block at a time, as in decoding."""
    key = torch.cat([context_key, block_key], dim=2)
    value = torch.cat([context_value, block_value], dim=2)
    return F.scaled_dot_product_attention(query, key, value, enable_gqa=True)


class ChunkedAttention:
    """Runs of neighbouring anchors at a time, each over the context it can reach and its own slots.

    FlexAttention has no backward on CPU. Anchors are sorted, so neighbours share nearly all of their context.
    """

    def __init__(self, blocks: Blocks, document_ids: torch.Tensor, anchors_at_once: int = 16):
        self.block_size = blocks.block_size
        # (row, slots of the run, context range that it reaches, mask [slots, context + slots])
        self.runs: list[tuple[int, slice, slice, torch.Tensor]] = []
        for row in range(len(blocks.anchors)):
            used = int((blocks.documents[row] >= 0).sum())
            # A row without anchors still runs one block: DDP needs a gradient, if zero, from every parameter.
            used = max(used, 1)
            for start in range(0, used, anchors_at_once):
                self.runs.append(self._run(row, start, min(start + anchors_at_once, used), blocks, document_ids))

    def _run(self, row: int, start: int, end: int, blocks: Blocks, document_ids: torch.Tensor):
        anchor, document = blocks.anchors[row, start:end], blocks.documents[row, start:end]
        begin = int((document_ids[row] == document[0]).int().argmax())
        context = slice(begin, max(int(anchor.max()), begin + 1))  # never empty, for the same reason
        index = torch.arange(context.start, context.stop, device=anchor.device)
        block = torch.arange(end - start, device=anchor.device)
        seen_context = sees_context(anchor[:, None], document[:, None], index, document_ids[row, context])
        seen_slots = sees_slot(block[:, None], block.repeat_interleave(self.block_size))
        mask = torch.cat([seen_context, seen_slots], dim=1).repeat_interleave(self.block_size, dim=0)
        return row, slice(start * self.block_size, end * self.block_size), context, mask

    def __call__(self, query, context_key, context_value, block_key, block_value) -> torch.Tensor:
        pieces: list[list[torch.Tensor]] = [[] for _ in query]
        for row, slots, context, mask in self.runs:
            key = torch.cat([context_key[row, :, context], block_key[row, :, slots]], dim=1)
            value = torch.cat([context_value[row, :, context], block_value[row, :, slots]], dim=1)
            piece = F.scaled_dot_product_attention(
                query[row, None, :, slots], key[None], value[None], attn_mask=mask, enable_gqa=True
            )
            pieces[row].append(piece[0])
        # Unused blocks carry no weight: whatever they attend to is never looked at.
        groups = query.shape[1] // block_value.shape[1]
        outputs = []
        for row, done in enumerate(pieces):
            rest = block_value[row, :, sum(piece.shape[1] for piece in done) :].repeat_interleave(groups, dim=0)
            outputs.append(torch.cat([*done, rest], dim=1))
        return torch.stack(outputs)


class FlexAttention:
    """One compiled FlexAttention call over context and block, with a sparse block mask."""

    _attend = staticmethod(torch.compile(flex_attention, dynamic=False))
    _block_mask = staticmethod(torch.compile(create_block_mask, dynamic=False))

    def __init__(self, blocks: Blocks, document_ids: torch.Tensor, compiled: bool = True):
        rows, length = document_ids.shape
        slots = blocks.anchors.shape[1] * blocks.block_size
        anchors, documents, size = blocks.anchors, blocks.documents, blocks.block_size

        def visible(b, h, q, kv):
            block = q // size
            context = torch.clamp(kv, max=length - 1)
            seen = sees_context(anchors[b, block], documents[b, block], context, document_ids[b, context])
            return torch.where(kv < length, seen, sees_slot(block, (kv - length) // size))

        self.attend = self._attend if compiled else flex_attention
        build = self._block_mask if compiled else create_block_mask
        self.mask = build(visible, rows, None, slots, length + slots, device=document_ids.device)

    def __call__(self, query, context_key, context_value, block_key, block_value) -> torch.Tensor:
        key = torch.cat([context_key, block_key], dim=2)
        value = torch.cat([context_value, block_value], dim=2)
        return self.attend(query, key, value, block_mask=self.mask, enable_gqa=True)
