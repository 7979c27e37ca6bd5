"""The loss: decay-weighted cross-entropy through the frozen LM head, fused and in chunks.

Full logits [A*K, V] never exist. For each chunk of slots the probabilities, the loss and the gradient with respect to
the slots' hidden states are computed at once, in one buffer, so backward only scales what forward kept. The weights of
the slots come after, and may depend on what the draft got right.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from dflash_dist.draft.blocks import Blocks

# Slots enter the head in multiples of this: matrix products like it, and a device sees few different shapes.
PADDING = 64
# Slots whose logits exist at once: enough to keep a GPU busy; on a CPU products are at full speed with fewer, and their
# limit is so many bytes of float32.
GPU_CHUNK, CPU_CHUNK, CPU_CHUNK_BYTES = 2048, 256, 64 * 2**20
# A CPU multiplies with so many rows of the head at once, for with all of them it waits for memory; and its passes over
# the logits go by as many of these as stay in the cache [elements].
CPU_WORDS, CPU_TILE = 1024, 2**19
# A CPU finds a maximum at once among so many neighbours, but its index one by one.
GROUP = 256


@dataclass(frozen=True)
class WeightedSlots:
    """The slots that carry weight, found on the host: the others never enter the head."""

    index: torch.Tensor  # [N] int64 into the flattened [B, A, K-1], padded with 0 to a multiple of PADDING
    count: int  # how many of them are not padding

    @staticmethod
    def of(blocks: Blocks) -> WeightedSlots:
        index = blocks.weights.flatten().nonzero().flatten()
        padding = -len(index) % PADDING
        return WeightedSlots(torch.cat([index, index.new_zeros(padding)]), len(index))

    def to(self, device: torch.device) -> WeightedSlots:
        return WeightedSlots(self.index.to(device, non_blocking=True), self.count)


def block_loss(
    hidden: torch.Tensor,
    head: torch.Tensor,
    blocks: Blocks,
    slots: WeightedSlots,
    chunk: int | None = None,
    dpace_alpha: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted loss sum of a micro-batch, and its statistics from the same pass.

    Args:
        hidden: [B, A*K, H], the draft's output.
        head: [V, H], frozen; its dtype is that of the matrix products.
        blocks: labels and weights.
        chunk: slots whose logits exist at once; by default what suits the device.
        dpace_alpha: weights slots by `dpace_weights` instead of those of `blocks`.

    Returns:
        Σ w·nll (float32 scalar with gradient), and the vector that `Statistics` reads, without gradient. Its losses
        are weighted as `blocks` say, whatever the objective, so that runs can be compared.
    """
    labels = blocks.labels.flatten()[slots.index]
    weights = blocks.weights.flatten()[slots.index]
    weights[slots.count :] = 0  # padding repeats slot 0; it must neither train nor count
    predicted = slots.index + slots.index // blocks.weights.shape[-1] + 1  # in [B*A*K]: behind its block's anchor slot
    states = hidden.flatten(0, 1).index_select(0, predicted)
    nll, correct = _ChunkedCrossEntropy.apply(states, head, labels, chunk or suitable_chunk(len(head), head.is_cuda))
    real = (weights > 0).float()

    def grid(values: torch.Tensor) -> torch.Tensor:  # [N] -> [B*A, K-1], 0 where no label counts
        flat = torch.zeros(blocks.weights.numel(), device=values.device)
        return flat.index_add(0, slots.index, values * real).view_as(blocks.weights).flatten(0, 1)

    statistics = _statistics(grid(nll.detach() * weights), grid(correct), blocks.weights.flatten(0, 1))
    if dpace_alpha is not None:
        weights = dpace_weights(grid(torch.exp(-nll.detach())), grid(real), dpace_alpha).flatten()[slots.index] * real
    return (weights * nll).sum(), statistics


def dpace_weights(probabilities: torch.Tensor, counts: torch.Tensor, alpha: float) -> torch.Tensor:
    """[N, K-1] weights that follow what a draft has learnt (D-PACE, arXiv 2605.18810, section 3).

    A slot matters as far as those before it are right, and for all that are right behind it: with s = (1 - α) p + α,
    the weight of slot k is Σ_{j≥k} s_1 ··· s_j, the derivative of that surrogate of the accepted length by log s_k.

    Args:
        probabilities: [N, K-1] of the labels.
        counts: [N, K-1], 1 where a label counts, 0 from the first that does not.
        alpha: keeps slots alive behind one that is never right.
    """
    leading = ((alpha + (1 - alpha) * probabilities) * counts).cumprod(dim=-1)
    return leading.flip(-1).cumsum(dim=-1).flip(-1)


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


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, head, labels, chunk):
        """Returns nll [N] float32 and correct [N] float32 for hidden [N, H]."""
        count, vocab = len(hidden), len(head)
        nll, correct = (torch.empty(count, device=hidden.device) for _ in range(2))
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
                for few, label, few_nll, few_correct in zip(
                    *(of.split(tile) for of in (some, labels[part], nll[part], correct[part]))
                ):
                    _to_gradient(few, label[:, None], few_nll, few_correct, wide)
                if gradient is not None:
                    gradient[part] = some @ head
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(correct)
        return nll, correct

    @staticmethod
    def backward(ctx, d_nll, _correct):
        (gradient,) = ctx.saved_tensors
        return gradient * d_nll[:, None].to(gradient.dtype), None, None, None


def _to_gradient(
    logits: torch.Tensor, label: torch.Tensor, nll: torch.Tensor, correct: torch.Tensor, wide: torch.Tensor | None
) -> None:
    """Turns logits [N, V] into their gradient, softmax - one-hot, in place; fills in nll [N] and correct [N].

    In float32: `wide` is room for that where the logits are not. The difference too, since a bfloat16 knows nothing
    between 0.996 and 1, where the probability of a label that has been learned lies.
    """
    exact = logits if wide is None else wide[: len(logits)].copy_(logits)
    peak, best = _first_max(exact)
    label_logit = exact.gather(1, label)
    torch.softmax(exact, -1, out=exact)
    # The most likely token's probability is 1 / Σ exp(logit - peak): exact, where the label's own may be 0.
    torch.sub(peak - label_logit, exact.gather(1, best).log(), out=nll[:, None])
    correct[:] = (best == label)[:, 0]
    exact.scatter_add_(1, label, torch.full_like(peak, -1))
    if wide is not None:
        logits.copy_(exact)


def _first_max(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Maximum and its first index along the last dimension, both [N, 1]."""
    if logits.is_cuda or logits.shape[-1] % GROUP:
        return logits.max(dim=-1, keepdim=True)
    groups = logits.unflatten(-1, (-1, GROUP))
    peak, group = groups.amax(-1).max(dim=-1, keepdim=True)
    inside = groups.gather(1, group[..., None].expand(-1, 1, GROUP)).argmax(-1)
    return peak, group * GROUP + inside


@dataclass(frozen=True)
class Statistics:
    """What a pass over blocks showed, as sums: they add over micro-batches, ranks and steps.

    Acceptance is teacher-forced: over blocks with a full set of labels, 1 + the leading run of slots whose most likely
    token is the label.
    """

    loss_sum: float  # Σ w·nll
    weight_sum: float
    accepted: float  # tokens a pass would emit, summed over the full blocks
    full_blocks: float
    slot_correct: list[float]  # [K-1]
    slot_count: list[float]  # [K-1]

    @staticmethod
    def read(vector: torch.Tensor) -> Statistics:
        """Reads the vector of `block_loss`, or a sum of such; waits for the device."""
        loss_sum, weight_sum, accepted, full, *slots = vector.tolist()
        half = len(slots) // 2
        return Statistics(loss_sum, weight_sum, accepted, full, slots[:half], slots[half:])

    @property
    def loss(self) -> float:
        return self.loss_sum / max(self.weight_sum, 1e-30)

    @property
    def tau(self) -> float | None:
        """Teacher-forced acceptance length [tokens a pass], at least 1; None without a full block."""
        return self.accepted / self.full_blocks if self.full_blocks else None

    @property
    def accuracy(self) -> float | None:
        """Share of all labels that are the most likely token; None without a label."""
        return sum(self.slot_correct) / count if (count := sum(self.slot_count)) else None

    @property
    def slot_accuracy(self) -> list[float | None]:
        """The same by slot, 1..K-1; None for a slot without a label."""
        return [right / count if count else None for right, count in zip(self.slot_correct, self.slot_count)]


def _statistics(loss: torch.Tensor, correct: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """[4 + 2(K-1)] float64 on the device, see `Statistics`, from [N, K-1] each."""
    counted = (weights > 0).float()
    full = counted[:, -1]  # labels count only in an unbroken run, so the last one tells
    accepted = (1 + correct.cumprod(dim=-1).sum(dim=-1)) * full
    head = torch.stack([loss.sum(), weights.sum(), accepted.sum(), full.sum()])
    return torch.cat([head, correct.sum(dim=0), counted.sum(dim=0)]).double()
