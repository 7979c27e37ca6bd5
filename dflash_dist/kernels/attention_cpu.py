"""Attention of block slots for training on a CPU, where FlexAttention has no backward."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.autograd.function import once_differentiable

from dflash_dist.batch import Batch
from dflash_dist.kernels.mask import FULL, Mask, seen_by_all

# A run's context is extended to a multiple of this, masked [tokens]. For each shape of a product in bfloat16, oneDNN
# compiles kernels, which takes longer than many such products, and keeps half a MiB.
CONTEXT_STEP = {torch.float32: 16, torch.bfloat16: 128}
# Slots of a run: more make larger products, and let each look at more of what only the last of them sees.
RUN_SLOTS = 128
# Scores at once, of as many key/value heads as that allows: few calls, whose work stays in the cache.
MAX_SCORES = 2**20
LOG2_E = math.log2(math.e)


class ChunkedAttention:
    """Runs of neighbouring anchors at a time, each over the context it can reach and its own slots.

    Anchors are sorted, so neighbours share nearly all of their context: a run is a few large matrix products, and its
    scores stay in the cache.
    """

    def __init__(
        self,
        batch: Batch,
        mask: Mask = FULL,
        anchors_at_once: int | None = None,
        context_step: int = CONTEXT_STEP[torch.float32],
    ):
        self.slots = batch.slots
        anchors_at_once = anchors_at_once or max(RUN_SLOTS // self.slots, 1)
        within_block = _to_bias(mask.within_block(self.slots))
        self.within_block = within_block if within_block.any() else None
        self.runs = [
            Run.of(row, slice(start, min(start + anchors_at_once, used)), batch, mask, context_step)
            for row, used in enumerate((batch.anchor_documents >= 0).sum(dim=1).tolist())
            for start in range(0, used, anchors_at_once)
        ]

    @torch.compiler.disable  # a compiler would write out every run
    def __call__(self, query, context_key, context_value, block_key, block_value) -> torch.Tensor:
        rows, heads, slots, head_dim = query.shape
        size = self.slots
        # The queries of a block that share a key come together: [B, kv_heads, A, Q, D] with Q = heads / kv_heads * K.
        split = query.unflatten(1, (block_key.shape[1], -1)).unflatten(3, (-1, size))
        output = _AttendInRuns.apply(
            self.runs,
            self.within_block,
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
    clear: int  # so many tokens at its beginning all of them see
    bias: torch.Tensor  # [anchors, 1, K, rest of the context] float32, with 1 for K where all slots see the same

    @staticmethod
    def of(row: int, anchors: slice, batch: Batch, mask: Mask, context_step: int) -> Run:
        anchor, document = (each[row, anchors, None, None] for each in (batch.anchors, batch.anchor_documents))
        slot, length = torch.arange(batch.slots)[:, None], batch.document_ids.shape[1]

        def visible(begin: int, end: int) -> torch.Tensor:
            """[anchors, K, context], with 1 for K as above."""
            index = torch.arange(begin, end)
            return mask.sees_context(anchor, slot, document, index, batch.document_ids[row, begin:end])

        reached = visible(0, length).any(dim=1).any(dim=0).nonzero()
        begin, end = (int(reached[0]), int(reached[-1]) + 1) if len(reached) else (0, 0)
        size = min(math.ceil((end - begin) / context_step) * context_step, length)
        begin = min(begin, length - size)
        seen = visible(begin, begin + size)
        clear = seen_by_all(seen.flatten(0, 1))
        return Run(row, anchors, slice(begin, begin + size), clear, _to_bias(seen[..., clear:])[:, None])

    @property
    def shape(self) -> tuple[int, int]:
        """Anchors, tokens of context."""
        return len(self.bias), self.context.stop - self.context.start

    def of_slots(self, tensor: torch.Tensor, heads: slice) -> torch.Tensor:
        """The part [heads, a * Q, ...] of this run of what slots have [B, kv_heads, A, Q, ...]."""
        return tensor[self.row, heads, self.anchors].flatten(1, 2)

    def of_context(self, tensor: torch.Tensor, heads: slice) -> torch.Tensor:
        """The part [heads, C, D] of this run of what the context has [B, kv_heads, S, D]."""
        return tensor[self.row, heads, self.context]


def _to_bias(visible: torch.Tensor) -> torch.Tensor:
    """What is added to scores, in float32: 0 where visible, else -inf."""
    return torch.where(visible, 0.0, -math.inf)


class _AttendInRuns(torch.autograd.Function):
    """Products in the dtype of the query, powers and sums over runs in float32. Backward computes the probabilities
    again: kept, they would take more memory than all other activations together. Scores are those of a softmax to base
    2, whose powers a CPU has in a third of the time.

    Shapes:
        query, output           [B, kv_heads, A, Q, D]
        context_key, _value     [B, kv_heads, S, D]
        block_key, _value       [B, kv_heads, A, K, D]
    """

    @staticmethod
    def forward(ctx, runs, within_block, query, *keys_and_values):
        with torch.autocast("cpu", enabled=False):
            scaled = (query * (LOG2_E * query.shape[-1] ** -0.5)).contiguous()
            *of_context, block_key, block_value = (each.contiguous() for each in keys_and_values)
            output = torch.zeros_like(scaled)  # unused blocks carry no weight: their output is never looked at
            block_scores = scaled @ block_key.mT
            totals, log_totals = torch.ones(2, *scaled.shape[:-1], 1)
            of_slots = scaled, output, block_scores, totals, log_totals
            for run, heads, (scores,) in _with_rooms(runs, block_scores, rooms=1):
                key, value = (run.of_context(each, heads) for each in of_context)
                q, out, of_block, total, log_total = (run.of_slots(each, heads) for each in of_slots)
                scores.fill(q, key, of_block)
                scores.hide(run, within_block)
                peak = scores.wide.amax(-1, keepdim=True)
                scores.to_powers(peak)
                torch.sum(scores.wide, -1, keepdim=True, out=total)
                torch.add(total.log2(), peak, out=log_total)
                torch.bmm(scores.context, value, out=out)
                of_block.copy_(scores.wide_block)
            output += block_scores @ block_value
            output /= totals
        ctx.save_for_backward(log_totals, query, *keys_and_values)
        ctx.runs, ctx.within_block = runs, within_block
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        log_totals, query, *keys_and_values = ctx.saved_tensors
        scale = query.shape[-1] ** -0.5
        scaled, gradient = (query * (LOG2_E * scale)).contiguous(), gradient.contiguous()
        *of_context, block_key, block_value = (each.contiguous() for each in keys_and_values)
        d_query = torch.zeros_like(scaled)
        d_of_context = [torch.zeros_like(each, dtype=torch.float32) for each in of_context]
        block_scores, d_block_scores = scaled @ block_key.mT, gradient @ block_value.mT
        of_slots = scaled, gradient, d_query, block_scores, d_block_scores, log_totals
        for run, heads, (scores, d_scores) in _with_rooms(ctx.runs, block_scores, rooms=2):
            key, value, d_key, d_value = (run.of_context(each, heads) for each in (*of_context, *d_of_context))
            q, d_out, d_q, of_block, d_of_block, log_total = (run.of_slots(each, heads) for each in of_slots)
            scores.fill(q, key, of_block)
            scores.hide(run, ctx.within_block)
            scores.to_powers(log_total)
            d_scores.fill(d_out, value, d_of_block)
            d_scores.back_through_softmax(scores)
            d_value += scores.context.mT @ d_out
            d_key += d_scores.context.mT @ q
            torch.bmm(d_scores.context, key, out=d_q)
            of_block.copy_(scores.wide_block)
            d_of_block.copy_(d_scores.wide_block)
        d_query += d_block_scores @ block_key
        d_block_key, d_block_value = d_block_scores.mT @ scaled, block_scores.mT @ gradient
        d_context_key, d_context_value = d_of_context
        keys = d_context_key / LOG2_E, d_context_value, d_block_key / LOG2_E, d_block_value
        return None, None, *(each.to(query.dtype) for each in (d_query * scale, *keys))


def _with_rooms(runs: list[Run], block_scores: torch.Tensor, rooms: int) -> Iterator[tuple[Run, slice, list[_Scores]]]:
    """Each run, some key/value heads at a time, with as many matrices of scores as `rooms`, whose memory the next ones
    use again."""
    kv_heads, _, queries, size = block_scores.shape[1:]
    most = max((anchors * queries * (context + size) for anchors, context in (run.shape for run in runs)), default=1)
    at_once = min(max(MAX_SCORES // most, 1), kv_heads)
    wide = torch.empty(rooms, at_once * most)
    narrow = wide if block_scores.dtype == torch.float32 else torch.empty_like(wide, dtype=block_scores.dtype)
    for run in runs:
        anchors, context = run.shape
        for start in range(0, kv_heads, at_once):
            heads = slice(start, min(start + at_once, kv_heads))
            shape = heads.stop - start, anchors * queries, context, size
            yield run, heads, [_Scores(*room, *shape) for room in zip(wide, narrow)]


class _Scores:
    """Scores of the slots of a run over its context and, behind it, their own block: in float32, and those of the
    context also as products take and leave them."""

    def __init__(self, wide: torch.Tensor, narrow: torch.Tensor, heads: int, rows: int, context: int, size: int):
        self.wide = wide[: heads * rows * (context + size)].view(heads, rows, context + size)
        self.wide_context, self.wide_block = self.wide.split([context, size], dim=-1)
        self.context = self.wide_context
        if narrow.dtype != wide.dtype:
            self.context = narrow[: heads * rows * context].view(heads, rows, context)

    def fill(self, left: torch.Tensor, context: torch.Tensor, block: torch.Tensor) -> None:
        """With the products of `left` [heads, a * Q, D] and `context` [heads, C, D], and those of the block."""
        torch.bmm(left, context.mT, out=self.context)
        self.wide_context.copy_(self.context)
        self.wide_block.copy_(block)

    def hide(self, run: Run, within_block: torch.Tensor | None) -> None:
        """What the run does not see; of their own blocks nothing, where `within_block` [K, K] is None."""
        anchors, _, slots, _ = run.bias.shape
        self.wide_context[..., run.clear :].unflatten(1, (anchors, -1, slots)).add_(run.bias)
        if within_block is not None:
            self.wide_block.unflatten(1, (-1, len(within_block))).add_(within_block)

    def to_powers(self, less: torch.Tensor) -> None:
        """2 to the scores less [heads, a * Q, 1]: probabilities, if that is the logarithm of their sum."""
        self.wide.sub_(less).exp2_()
        self.context.copy_(self.wide_context)

    def back_through_softmax(self, probabilities: _Scores) -> None:
        """From the gradient of the probabilities to that of the scores."""
        d, p = self.wide, probabilities.wide
        torch.ops.aten._softmax_backward_data.out(d, p, -1, d.dtype, grad_input=d)
        self.context.copy_(self.wide_context)
