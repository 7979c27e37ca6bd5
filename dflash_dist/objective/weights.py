"""What each slot of a block counts."""

from __future__ import annotations

import torch


def decay_weights(labels: int, gamma: float) -> torch.Tensor:
    """[K-1] float32: `exp(-(k-1) / gamma)` for k = 1..K-1 (arXiv 2602.06036, eq. 4)."""
    return torch.exp(-torch.arange(labels, dtype=torch.float32) / gamma)


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
