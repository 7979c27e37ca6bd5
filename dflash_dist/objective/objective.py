"""The loss of a micro-batch: each slot's weight times its token loss, through the frozen LM head and in chunks.

The token loss and its gradient come first, in one pass over the logits; the weights of the slots come after, and may
depend on what the draft got right.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from dflash_dist.batch import Batch
from dflash_dist.kernels.cross_entropy import CROSS_ENTROPY, ChunkedCrossEntropy, Distance, suitable_chunk
from dflash_dist.objective.statistics import BASE, Sums, measure
from dflash_dist.objective.weights import dpace_weights


class Terms(NamedTuple):
    """What an objective makes of a micro-batch."""

    loss: torch.Tensor  # Σ w·nll: a float32 scalar with gradient
    sums: Sums  # without gradient


@dataclass(frozen=True)
class Objective:
    """Cross-entropy of the labels, weighted by slot, and with the same weights what a kind's own scores lose."""

    dpace_alpha: float | None = None  # weighs slots by `dpace_weights` instead of by those of the batch
    chunk: int | None = None  # slots whose logits exist at once; None: what suits the device
    candidates: int = 0  # the likeliest tokens that `judge` is given, as `Draft.judge` takes them
    judge: Callable[..., tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]] | None = None
    judge_weight: float = 1.0  # of its loss
    distance: Distance = CROSS_ENTROPY

    def __call__(
        self, hidden: torch.Tensor, head: torch.Tensor, batch: Batch, final: torch.Tensor | None = None
    ) -> Terms:
        """
        Args:
            hidden: [B, A*K, H], the draft's output.
            head: [V, H], frozen; its dtype is that of the matrix products.
            batch: with blocks, on the device.
            final: [B, S, H], what the LM head reads of the target itself, where the distance needs it.

        Returns:
            The loss, and sums from the same pass. Their losses are weighted as the batch says, whatever the objective,
            so that runs can be compared.
        """
        labels = batch.labels.flatten()[batch.weighted]
        weights = batch.weights.flatten()[batch.weighted]
        weights[batch.count :] = 0  # padding repeats slot 0; it must neither train nor count
        # In [B*A*K], behind each block's anchor slot.
        predicted = batch.weighted + batch.weighted // batch.weights.shape[-1] + 1
        states = hidden.flatten(0, 1).index_select(0, predicted)
        chunk = self.chunk or suitable_chunk(len(head), head.is_cuda)
        theirs = None
        if self.distance.needs_target:
            assert final is not None, "who asks the target for its features asks for this, too"
            theirs = foreseen_by_target(final, batch)
        loss, nll, correct, ids, logits = ChunkedCrossEntropy.apply(
            states, head, labels, chunk, self.candidates, self.distance, theirs
        )
        real = (weights > 0).float()

        def grid(values: torch.Tensor) -> torch.Tensor:  # [N] -> [B*A, K-1], 0 where no label counts
            flat = torch.zeros(batch.weights.numel(), device=values.device)
            return flat.index_add(0, batch.weighted, values * real).view_as(batch.weights).flatten(0, 1)

        shown = dict[str, torch.Tensor]()
        if self.judge:
            previous = batch.previous.flatten()[batch.weighted]
            own, chosen, shown = self.judge(states, labels, previous, ids, logits)
            loss = loss + self.judge_weight * own
            shown, correct = {BASE: correct, **shown}, chosen
        shares = {name: grid(values) for name, values in shown.items()}
        sums = measure(grid(nll.detach() * weights), grid(correct), batch.weights.flatten(0, 1), shares)
        if self.dpace_alpha is not None:
            by_learnt = dpace_weights(grid(torch.exp(-nll.detach())), grid(real), self.dpace_alpha)
            weights = by_learnt.flatten()[batch.weighted] * real
        return Terms((weights * loss).sum(), sums)


def foreseen_by_target(final: torch.Tensor, batch: Batch) -> torch.Tensor:
    """[N, H]: what the LM head reads where the target itself foresees the labels of the weighted slots, at the token
    before each; of final states [B, S, H]."""
    _, anchors, labels = batch.weights.shape
    block, before = batch.weighted // labels, batch.weighted % labels
    row, place = block // anchors, batch.anchors.flatten()[block] + before
    return final[row, place]
