"""The loss of a micro-batch: each slot's weight times its token loss, through the frozen LM head and in chunks.

The token loss and its gradient come first, in one pass over the logits; the weights of the slots come after, and may
depend on what the draft got right.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from dflash_dist.batch import Batch
from dflash_dist.kernels.cross_entropy import CROSS_ENTROPY, ChunkedCrossEntropy, Distance, Seen, suitable_chunk
from dflash_dist.objective.statistics import BASE, Sums, measure
from dflash_dist.objective.weights import dpace_weights


class Terms(NamedTuple):
    """What an objective makes of a micro-batch."""

    loss: torch.Tensor  # Σ w·nll: a float32 scalar with gradient
    sums: Sums  # without gradient


class Kind(Protocol):
    """What the loss asks of a draft, as `Draft` has it."""

    candidates: int

    def added(
        self, states: torch.Tensor, previous: torch.Tensor, embedding: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor] | None: ...

    def base_share(self, progress: float) -> float: ...

    def judge(
        self,
        batch: Batch,
        features: torch.Tensor | None,
        embedding: torch.Tensor | None,
        states: torch.Tensor,
        seen: Seen,
    ) -> tuple[torch.Tensor, torch.Tensor | None, dict[str, torch.Tensor]] | None: ...


class Slots:
    """The slots of a micro-batch that enter the head: those whose labels count, and padding."""

    def __init__(self, batch: Batch):
        self.index, self._shape = batch.weighted, batch.weights.shape
        self.labels, self.weights = (of.flatten()[self.index] for of in (batch.labels, batch.weights))
        self.weights[batch.count :] = 0  # padding repeats slot 0; it must neither train nor count
        self.real = (self.weights > 0).float()

    def states(self, hidden: torch.Tensor) -> torch.Tensor:
        """[N, H], of [B, A*K, H] with the anchors."""
        behind_anchor = self.index + self.index // self._shape[-1] + 1
        return hidden.flatten(0, 1).index_select(0, behind_anchor)

    def grid(self, values: torch.Tensor) -> torch.Tensor:
        """[N] -> [B*A, K-1], 0 where no label counts."""
        flat = torch.zeros(self._shape.numel(), device=values.device)
        return flat.index_add(0, self.index, values * self.real).view(self._shape).flatten(0, 1)


@dataclass(frozen=True)
class Objective:
    """The distance to the labels or to the target, weighted by slot, and with the same weights what a kind's own scores
    lose."""

    dpace_alpha: float | None = None  # weighs slots by `dpace_weights` instead of by those of the batch
    chunk: int | None = None  # slots whose logits exist at once; None: what suits the device
    distance: Distance = CROSS_ENTROPY
    kind: Kind | None = None  # the draft; None: one whose logits are its hidden states times the head
    kind_weight: float = 1.0  # of what its own scores lose

    def __call__(
        self,
        hidden: torch.Tensor,
        head: torch.Tensor,
        batch: Batch,
        final: torch.Tensor | None = None,
        features: torch.Tensor | None = None,
        embedding: torch.Tensor | None = None,
        progress: float = 0.0,
    ) -> Terms:
        """
        Args:
            hidden: [B, A*K, H], the draft's output.
            head: [V, H], frozen; its dtype is that of the matrix products.
            batch: with blocks, on the device.
            final: [B, S, H], what the LM head reads of the target itself, where the distance needs it.
            features: as the draft read them; and
            embedding: likewise, both for kinds that look at them again.
            progress: share of the run, by which a kind may shift what it learns.

        Returns:
            The loss, and sums from the same pass. Their losses are weighted as the batch says, whatever the objective,
            so that runs can be compared.
        """
        slots = Slots(batch)
        states, previous = slots.states(hidden), batch.previous.flatten(0, 1)
        chunk = self.chunk or suitable_chunk(len(head), head.is_cuda)
        candidates = self.kind.candidates if self.kind else 0
        theirs = None
        if self.distance.needs_target:
            assert final is not None, "who asks the target for its features asks for this, too"
            theirs = foreseen_by_target(final, batch)
        of_all = states, head, slots.labels, chunk, candidates, self.distance, theirs

        shown = dict[str, torch.Tensor]()
        blocks = hidden.unflatten(1, (batch.anchors.shape[1], batch.slots))[:, :, 1:].flatten(0, 1)
        if self.kind and (added := self.kind.added(blocks, previous, embedding)):
            rows, table = added[0].flatten(0, 1).index_select(0, slots.index), added[1]
            weights = slots.weights
            if self.dpace_alpha is not None:  # what the draft gets right must be known first
                once = states.detach(), head, slots.labels, chunk, 0, CROSS_ENTROPY, None, rows.detach(), table
                weights = self.weights(slots, ChunkedCrossEntropy.apply(*once, weights)[1])
            loss, *parts = ChunkedCrossEntropy.apply(*of_all, rows, table, weights)
            seen = Seen(*parts)
            if share := self.kind.base_share(progress):
                of_base, _, shown[BASE], *_ = ChunkedCrossEntropy.apply(*of_all)
                loss = (1 - share) * loss + share * (weights * of_base).sum()
        else:
            each, *parts = ChunkedCrossEntropy.apply(*of_all)
            seen = Seen(*parts)
            weights = self.weights(slots, seen.nll)
            loss = (weights * each).sum()

        correct = seen.correct
        if self.kind and (judged := self.kind.judge(batch, features, embedding, states, seen)):
            own, chosen, shares_of_kind = judged
            shown |= shares_of_kind
            if chosen is not None:
                shown[BASE], correct = correct, chosen
            loss = loss + self.kind_weight * (weights * own).sum()
        shares = {name: slots.grid(values) for name, values in shown.items()}
        of_slots = slots.grid(seen.nll.detach() * slots.weights), slots.grid(correct), batch.weights.flatten(0, 1)
        return Terms(loss, measure(*of_slots, shares))

    def weights(self, slots: Slots, nll: torch.Tensor) -> torch.Tensor:
        """[N]: what each slot's loss counts."""
        if self.dpace_alpha is None:
            return slots.weights
        by_learnt = dpace_weights(slots.grid(torch.exp(-nll.detach())), slots.grid(slots.real), self.dpace_alpha)
        return by_learnt.flatten()[slots.index] * slots.real


def foreseen_by_target(final: torch.Tensor, batch: Batch) -> torch.Tensor:
    """[N, H]: what the LM head reads where the target itself foresees the labels of the weighted slots, at the token
    before each; of final states [B, S, H]."""
    _, anchors, labels = batch.weights.shape
    block, before = batch.weighted // labels, batch.weighted % labels
    row, place = block // anchors, batch.anchors.flatten()[block] + before
    return final[row, place]
