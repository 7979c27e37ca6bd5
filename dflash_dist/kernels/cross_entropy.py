"""Cross-entropy through a frozen LM head, fused and in chunks.

Full logits [N, V] never exist. For each chunk of slots the probabilities, the loss and the gradient with respect to the
slots' hidden states are computed at once, in one scratch buffer, so backward only scales what forward kept.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from dflash_dist.batch import PADDING

# Slots whose logits exist at once: enough to keep a GPU busy; on a CPU products are at full speed with fewer, and their
# limit is so many bytes of float32.
GPU_CHUNK, CPU_CHUNK, CPU_CHUNK_BYTES = 2048, 256, 64 * 2**20
# A CPU multiplies with so many rows of the head at once, for with all of them it waits for memory; and its passes over
# the logits go by as many of these as stay in the cache [elements].
CPU_WORDS, CPU_TILE = 1024, 2**19
# A CPU finds a maximum at once among so many neighbours, but its index one by one.
GROUP = 256


def suitable_chunk(vocab: int, on_gpu: bool) -> int:
    """Slots whose logits exist at once."""
    if on_gpu:
        return GPU_CHUNK
    return max(min(CPU_CHUNK, CPU_CHUNK_BYTES // (4 * vocab)) // PADDING, 1) * PADDING


def suitable_tile(size: int, vocab: int, on_gpu: bool) -> int:
    """Slots of a chunk of `size` whose logits are gone through at once."""
    return size if on_gpu else min(max(CPU_TILE // vocab, 1), size)


def even_chunk(count: int, chunk: int) -> int:
    """Slots of each chunk where `count` of them come in as few chunks of at most `chunk` as can be, all of one size."""
    return math.ceil(count / max(math.ceil(count / chunk), 1))


class ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, head, labels, chunk, candidates=0):
        """For hidden [N, H]:

        Returns:
            nll [N] float32; correct [N] float32; ids [N, candidates + 1] of the likeliest tokens, and behind them the
            label; their logits in float32, with gradient.
        """
        count, vocab = len(hidden), len(head)
        nll, correct = (torch.empty(count, device=hidden.device) for _ in range(2))
        ids = torch.cat([labels.new_empty(count, candidates), labels[:, None]], dim=1)
        chosen = nll.new_empty(ids.shape)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        size = even_chunk(count, chunk)
        tile, width = suitable_tile(size, vocab, head.is_cuda), vocab if head.is_cuda else CPU_WORDS
        with torch.autocast(hidden.device.type, enabled=False):
            rows = hidden.to(head.dtype)
            logits = head.new_empty(size, vocab)
            wide = None if head.dtype == torch.float32 else head.new_empty(tile, vocab, dtype=torch.float32)
            for part in (slice(start, min(start + size, count)) for start in range(0, count, max(size, 1))):
                some = logits[: part.stop - part.start]
                for columns, words in zip(some.split(width, dim=1), head.split(width)):
                    torch.mm(rows[part], words.T, out=columns)
                parts = (of[part].split(tile) for of in (labels[:, None], nll, correct, ids, chosen))
                for few, label, *filled in zip(some.split(tile), *parts):
                    _to_gradient(few, label, *filled, wide)  # type: ignore[call-arg]
                if gradient is not None:
                    gradient[part] = some @ head
        ctx.save_for_backward(gradient, ids, head)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(correct, ids)
        return nll, correct, ids, chosen

    @staticmethod
    def backward(ctx, d_nll, _correct, _ids, d_chosen):
        gradient, ids, head = ctx.saved_tensors
        result = gradient * d_nll[:, None].to(gradient.dtype)
        if d_chosen is not None:
            of_chosen = F.embedding_bag(ids, head, per_sample_weights=d_chosen.to(head.dtype), mode="sum")
            result += of_chosen.to(result.dtype)
        return result, None, None, None, None


def _to_gradient(
    logits: torch.Tensor,
    label: torch.Tensor,
    nll: torch.Tensor,
    correct: torch.Tensor,
    ids: torch.Tensor,
    chosen: torch.Tensor,
    wide: torch.Tensor | None,
) -> None:
    """Turns logits [N, V] into their gradient, softmax - one-hot, in place; fills in nll and correct [N], ids and their
    logits [N, candidates + 1].

    In float32: `wide` is room for that where the logits are not. The difference too, since a bfloat16 knows nothing
    between 0.996 and 1, where the probability of a label that has been learned lies.
    """
    exact = logits if wide is None else wide[: len(logits)].copy_(logits)
    peak, best = _first_max(exact)
    label_logit = exact.gather(1, label)
    if candidates := ids.shape[1] - 1:
        chosen[:, :-1], ids[:, :-1] = _largest(exact, candidates)
    chosen[:, -1:] = label_logit
    torch.softmax(exact, -1, out=exact)
    # The most likely token's probability is 1 / Σ exp(logit - peak): exact, where the label's own may be 0.
    torch.sub(peak - label_logit, exact.gather(1, best).log(), out=nll[:, None])
    correct[:] = (best == label)[:, 0]
    exact.scatter_add_(1, label, torch.full_like(peak, -1))
    if wide is not None:
        logits.copy_(exact)


def _largest(logits: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest along the last dimension, and where they are, both [N, count], in descending order."""
    if logits.is_cuda or logits.shape[-1] % GROUP or logits.shape[-1] // GROUP <= count:
        return logits.topk(count)
    groups = logits.unflatten(-1, (-1, GROUP))
    among = groups.amax(-1).topk(count).indices  # the others' largest are smaller
    values, place = groups.gather(1, among[..., None].expand(-1, -1, GROUP)).flatten(1).topk(count)
    return values, among.gather(1, place // GROUP) * GROUP + place % GROUP


def _first_max(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Maximum and its first index along the last dimension, both [N, 1]."""
    if logits.is_cuda or logits.shape[-1] % GROUP:
        return logits.max(dim=-1, keepdim=True)
    groups = logits.unflatten(-1, (-1, GROUP))
    peak, group = groups.amax(-1).max(dim=-1, keepdim=True)
    inside = groups.gather(1, group[..., None].expand(-1, 1, GROUP)).argmax(-1)
    return peak, group * GROUP + inside
