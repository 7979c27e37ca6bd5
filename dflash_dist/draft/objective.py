"""The loss: decay-weighted cross-entropy through the frozen LM head, fused and in chunks.

Full logits [A*K, V] never exist. For each chunk of slots the log-sum-exp, the loss and the gradient with respect to the
slots' hidden states are computed at once, so backward only scales what forward kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dflash_dist.draft.blocks import Blocks


@dataclass(frozen=True)
class WeightedSlots:
    """The slots that carry weight, found on the host: the others never enter the head.

    Padded to whole chunks with slots of zero weight, so that a device sees few different shapes.
    """

    index: torch.Tensor  # [N] int64 into the flattened [B, A, K-1]
    count: int  # how many of them are not padding
    chunk: int

    @staticmethod
    def of(blocks: Blocks, chunk: int) -> WeightedSlots:
        index = blocks.weights.flatten().nonzero().flatten()
        padding = -len(index) % chunk
        return WeightedSlots(torch.cat([index, index.new_zeros(padding)]), len(index), chunk)

    def to(self, device: torch.device) -> WeightedSlots:
        return WeightedSlots(self.index.to(device, non_blocking=True), self.count, self.chunk)


def block_loss(
    hidden: torch.Tensor, head: torch.Tensor, blocks: Blocks, slots: WeightedSlots
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted loss sum of a micro-batch, and its statistics from the same pass.

    Args:
        hidden: [B, A*K, H], the draft's output.
        head: [V, H], frozen; its dtype is that of the matrix products.
        blocks: labels and weights.

    Returns:
        Σ w·nll (float32 scalar with gradient), and the vector that `Statistics` reads, without gradient.
    """
    targets = hidden.unflatten(1, blocks.input_ids.shape[1:])[:, :, 1:].flatten(0, 2)  # [B*A*(K-1), H]: no anchor slot
    labels = blocks.labels.flatten()[slots.index]
    weights = blocks.weights.flatten()[slots.index]
    weights[slots.count :] = 0  # padding repeats slot 0; it must neither train nor count
    loss, nll, correct = _ChunkedCrossEntropy.apply(targets[slots.index], head, labels, weights, slots.chunk)
    return loss, _statistics(blocks, slots.index, nll, correct, weights)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, head, labels, weights, chunk):
        """Returns Σ w·nll, nll [N] float32 and correct [N] float32 for hidden [N, H]."""
        nll = torch.empty_like(weights)
        correct = torch.empty_like(weights)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, len(hidden), chunk):
                part = slice(start, start + chunk)
                label = labels[part, None]
                logits = (hidden[part].to(head.dtype) @ head.T).float()
                peak, best = logits.max(dim=-1, keepdim=True)
                label_logit = logits.gather(1, label)
                powers = logits.sub_(peak).exp_()
                total = powers.sum(dim=-1, keepdim=True)
                nll[part] = (total.log() + peak - label_logit).squeeze(1)
                correct[part] = (best == label).squeeze(1).float()
                if gradient is not None:  # w · (softmax - one-hot) @ head
                    weight = weights[part, None]
                    powers.mul_(weight / total).scatter_add_(1, label, -weight)
                    gradient[part] = (powers.to(head.dtype) @ head).to(hidden.dtype)
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(nll, correct)
        return (weights * nll).sum(), nll, correct

    @staticmethod
    def backward(ctx, loss_gradient, _nll, _correct):
        (gradient,) = ctx.saved_tensors
        return gradient * loss_gradient.to(gradient.dtype), None, None, None, None


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
    def tau(self) -> float:
        """Teacher-forced acceptance length [tokens a pass]."""
        return self.accepted / max(self.full_blocks, 1.0)

    @property
    def slot_accuracy(self) -> list[float]:
        """Share of the labels of slots 1..K-1 that are the most likely token."""
        return [right / max(count, 1.0) for right, count in zip(self.slot_correct, self.slot_count)]


def _statistics(
    blocks: Blocks, index: torch.Tensor, nll: torch.Tensor, correct: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """[4 + 2(K-1)] float64 on the device; see `Statistics`."""
    grid = torch.zeros(blocks.weights.numel(), device=nll.device)
    grid = grid.index_add(0, index, correct * (weights > 0)).view_as(blocks.weights).flatten(0, 1)  # [B*A, K-1]
    counted = (blocks.weights > 0).flatten(0, 1).float()
    full = counted[:, -1]  # labels count only in an unbroken run, so the last one tells
    accepted = (1 + grid.cumprod(dim=-1).sum(dim=-1)) * full
    head = torch.stack([(weights * nll).sum(), weights.sum(), accepted.sum(), full.sum()])
    return torch.cat([head, grid.sum(dim=0), counted.sum(dim=0)]).double()
