"""Attention of block slots for training on a GPU: torch's FlexAttention."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from dflash_dist.batch import Batch
from dflash_dist.kernels.mask import FULL, Mask


@functools.cache  # once asked for, on a GPU: it imports the compiler, which takes a second of every start
def _compile(function: Callable) -> Any:
    return torch.compile(function, dynamic=False)


class FlexAttention:
    """One compiled FlexAttention call over context and block, with a sparse block mask."""

    def __init__(self, batch: Batch, mask: Mask = FULL, compiled: bool = True):
        rows, length = batch.document_ids.shape
        size, slots = batch.slots, batch.slot_ids[0].numel()
        anchors, anchor_documents, document_ids = batch.anchors, batch.anchor_documents, batch.document_ids

        def visible(b, h, q, kv):
            block, slot = q // size, q % size
            context, other = torch.clamp(kv, max=length - 1), kv - length
            of_context = anchors[b, block], slot, anchor_documents[b, block], context, document_ids[b, context]
            of_slots = block, slot, other // size, other % size
            return torch.where(kv < length, mask.sees_context(*of_context), mask.sees_slot(*of_slots))

        self.attend = _compile(flex_attention) if compiled else flex_attention
        build = _compile(create_block_mask) if compiled else create_block_mask
        self.mask = build(visible, rows, None, slots, length + slots, device=document_ids.device)

    def __call__(self, query, context_key, context_value, block_key, block_value) -> torch.Tensor:
        key = torch.cat([context_key, block_key], dim=2)
        value = torch.cat([context_value, block_value], dim=2)
        return self.attend(query, key, value, block_mask=self.mask, enable_gqa=True)
