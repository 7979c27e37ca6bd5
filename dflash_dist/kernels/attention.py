"""Attention of block slots over the context and their own block.

Every backend is made once for a micro-batch, or for a block in decoding, and called by every layer with
    query                   [B, heads, A*K, D]
    context_key, _value     [B, kv_heads, S, D]
    block_key, _value       [B, kv_heads, A*K, D]
and returns [B, heads, A*K, D]. None in training ever holds a dense [A*K, S + A*K] mask.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from dflash_dist.batch import Batch
from dflash_dist.kernels.attention_cpu import CONTEXT_STEP, ChunkedAttention
from dflash_dist.kernels.attention_gpu import FlexAttention
from dflash_dist.kernels.mask import Mask

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def training_attention(batch: Batch, dtype: torch.dtype, mask: Mask) -> Attend:
    """The fastest backend for queries of `dtype` on the device of `batch`."""
    if batch.document_ids.is_cuda:
        return FlexAttention(batch, mask)
    return ChunkedAttention(batch, mask, context_step=CONTEXT_STEP[dtype])


class OneBlockAttention:
    """One block behind `length` tokens of context, as in decoding: A = 1."""

    def __init__(self, length: int, slots: int, mask: Mask, device: torch.device):
        visible = mask.after_context(length, slots)  # on the host, which is not to wait for a GPU
        self.visible = None if visible.all() else visible.to(device)  # without a mask, kernels are faster

    def __call__(self, query, context_key, context_value, block_key, block_value) -> torch.Tensor:
        key = torch.cat([context_key, block_key], dim=2)
        value = torch.cat([context_value, block_value], dim=2)
        return F.scaled_dot_product_attention(query, key, value, self.visible, enable_gqa=True)
