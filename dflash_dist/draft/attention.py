"""Attention of block slots over the context and their own block, for training.

Two backends with one interface: an object is built once for a micro-batch and called by every layer with
    query                   [B, heads, A*K, D]
    context_key, _value     [B, kv_heads, S, D]
    block_key, _value       [B, kv_heads, A*K, D]
and returns [B, heads, A*K, D]. Neither ever holds a dense [A*K, S + A*K] mask.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from dflash_dist.draft.blocks import Blocks
from dflash_dist.draft.visibility import sees_context, sees_slot

# A run's context is extended to a multiple of this, masked [tokens]: the kernels of a CPU's bfloat16 products are
# compiled for each size, which takes longer than many such products.
CONTEXT_STEP = 64

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

    FlexAttention has no backward on CPU. Anchors are sorted, so neighbours share nearly all of their context: a run is
    a few large matrix products, and the scores of one key/value head stay in the cache.
    """

    def __init__(self, blocks: Blocks, document_ids: torch.Tensor, anchors_at_once: int = 16):
        self.block_size = blocks.block_size
        self.runs = [
            Run.of(row, slice(start, min(start + anchors_at_once, used)), blocks, document_ids)
            for row, used in enumerate((blocks.documents >= 0).sum(dim=1).tolist())
            for start in range(0, used, anchors_at_once)
        ]

    @torch.compiler.disable  # a compiler would write out every run
    def __call__(self, query, context_key, context_value, block_key, block_value) -> torch.Tensor:
        rows, heads, slots, head_dim = query.shape
        size = self.block_size
        # The queries of a block that share a key come together: [B, kv_heads, A, Q, D] with Q = heads / kv_heads * K.
        split = query.unflatten(1, (block_key.shape[1], -1)).unflatten(3, (-1, size))
        output = _AttendInRuns.apply(
            self.runs,
            split.transpose(2, 3).flatten(3, 4),
            context_key,
            context_value,
            block_key.unflatten(2, (-1, size)),
            block_value.unflatten(2, (-1, size)),
        )
        # Laid out as the output projection reads it: [B, A * K, heads, D].
        output = output.unflatten(3, (-1, size)).permute(0, 2, 4, 1, 3, 5)
        return output.reshape(rows, slots, heads, head_dim).transpose(1, 2)


@dataclass(frozen=True)
class Run:
    """Neighbouring anchors of a row."""

    row: int
    anchors: slice
    context: slice  # what they can reach, and a little more
    bias: torch.Tensor  # [anchors, 1, context] float32: 0 where visible, else -inf

    @staticmethod
    def of(row: int, anchors: slice, blocks: Blocks, document_ids: torch.Tensor) -> Run:
        anchor, document = blocks.anchors[row, anchors, None], blocks.documents[row, anchors, None]
        length = document_ids.shape[1]
        begin, end = int((document_ids[row] == document[0]).int().argmax()), int(anchor.max())
        size = min(math.ceil((end - begin) / CONTEXT_STEP) * CONTEXT_STEP, length)
        begin = min(begin, length - size)
        context = slice(begin, begin + size)
        index = torch.arange(context.start, context.stop)
        visible = sees_context(anchor, document, index, document_ids[row, context])
        return Run(row, anchors, context, torch.where(visible, 0.0, -math.inf)[:, None])

    def heads_of(self, slots: Sequence[torch.Tensor], context: Sequence[torch.Tensor]) -> Iterator[tuple]:
        """For each key/value head the parts [a, Q, ...] of `slots` and [C, D] of `context` that are this run's."""
        yield from zip(
            *(each[self.row, :, self.anchors].unbind() for each in slots),
            *(each[self.row, :, self.context].unbind() for each in context),
        )


class _AttendInRuns(torch.autograd.Function):
    """Products in the dtype of the query, softmax and sums over runs in float32. Backward computes the probabilities
    again: kept, they would take more memory than all other activations together.

    Shapes:
        query, output           [B, kv_heads, A, Q, D]
        context_key, _value     [B, kv_heads, S, D]
        block_key, _value       [B, kv_heads, A, K, D]
    """

    @staticmethod
    def forward(ctx, runs, query, *keys_and_values):
        ctx.save_for_backward(query, *keys_and_values)
        ctx.runs = runs
        with torch.autocast("cpu", enabled=False):
            scaled = (query * query.shape[-1] ** -0.5).contiguous()
            *of_context, block_key, block_value = (each.contiguous() for each in keys_and_values)
            output = torch.zeros_like(scaled)  # unused blocks carry no weight: their output is never looked at
            block_scores = scaled @ block_key.mT
            for run, (scores,) in _with_rooms(runs, block_scores, rooms=1):
                for q, of_block, out, key, value in run.heads_of((scaled, block_scores, output), of_context):
                    scores.fill(q, key, of_block)
                    scores.to_probabilities(run.bias)
                    torch.mm(scores.context, value, out=out.flatten(0, 1))
                    of_block.copy_(scores.block)
            output += block_scores @ block_value
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        query, *keys_and_values = ctx.saved_tensors
        scale = query.shape[-1] ** -0.5
        scaled, gradient = (query * scale).contiguous(), gradient.contiguous()
        *of_context, block_key, block_value = (each.contiguous() for each in keys_and_values)
        d_query = torch.zeros_like(scaled)
        d_of_context = [torch.zeros_like(each, dtype=torch.float32) for each in of_context]
        block_scores, d_block_scores = scaled @ block_key.mT, gradient @ block_value.mT
        of_slots = scaled, gradient, d_query, block_scores, d_block_scores
        for run, (scores, d_scores) in _with_rooms(ctx.runs, block_scores, rooms=2):
            for q, d_out, d_q, of_block, d_of_block, key, value, d_key, d_value in run.heads_of(
                of_slots, [*of_context, *d_of_context]
            ):
                scores.fill(q, key, of_block)
                scores.to_probabilities(run.bias)
                d_scores.fill(d_out, value, d_of_block)
                d_scores.back_through_softmax(scores)
                d_value += scores.context.T @ d_out.flatten(0, 1)
                d_key += d_scores.context.T @ q.flatten(0, 1)
                torch.mm(d_scores.context, key, out=d_q.flatten(0, 1))
                of_block.copy_(scores.block)
                d_of_block.copy_(d_scores.block)
        d_query += d_block_scores @ block_key
        d_block_key, d_block_value = d_block_scores.mT @ scaled, block_scores.mT @ gradient
        gradients = d_query * scale, *d_of_context, d_block_key, d_block_value
        return None, *(each.to(query.dtype) for each in gradients)


def _with_rooms(runs: list[Run], block_scores: torch.Tensor, rooms: int) -> Iterator[tuple[Run, list[_Scores]]]:
    """Each run with as many matrices of scores of a head as `rooms`, whose memory the next ones use again."""
    queries, size = block_scores.shape[3:]
    most = max((len(run.bias) * (run.bias.shape[-1] + size) for run in runs), default=0) * queries
    memory = torch.empty(rooms, most, dtype=block_scores.dtype)
    wide_memory = memory if memory.dtype == torch.float32 else torch.empty_like(memory, dtype=torch.float32)
    for run in runs:
        shape = len(run.bias), queries, run.bias.shape[-1], size
        yield run, [_Scores(*room, *shape) for room in zip(memory, wide_memory)]


class _Scores:
    """Scores of the slots of a run over its context and their own block, side by side, as products take and leave them
    and, for what is between, in float32."""

    def __init__(
        self, room: torch.Tensor, wide_room: torch.Tensor, anchors: int, queries: int, context: int, size: int
    ):
        rows, columns = anchors * queries, context + size
        self.all, self.wide = (each[: rows * columns].view(rows, columns) for each in (room, wide_room))
        self.context = self.all[:, :context]  # [a * Q, C]
        self.block = self.all[:, context:].unflatten(0, (anchors, queries))  # [a, Q, K]
        self.wide_by_anchor = self.wide[:, :context].unflatten(0, (anchors, queries))  # [a, Q, C]

    def fill(self, left: torch.Tensor, context: torch.Tensor, block: torch.Tensor) -> None:
        """With the products of `left` [a, Q, D] and `context` [C, D], and those of the block [a, Q, K]."""
        torch.mm(left.flatten(0, 1), context.T, out=self.context)
        self.block.copy_(block)
        self.wide.copy_(self.all)

    def to_probabilities(self, bias: torch.Tensor) -> None:
        self.wide_by_anchor.add_(bias)
        torch.softmax(self.wide, -1, out=self.wide)
        self.all.copy_(self.wide)

    def back_through_softmax(self, probabilities: _Scores) -> None:
        """From the gradient of the probabilities to that of the scores."""
        d, p = self.wide, probabilities.wide
        torch.ops.aten._softmax_backward_data.out(d, p, -1, d.dtype, grad_input=d)
        self.all.copy_(d)


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
