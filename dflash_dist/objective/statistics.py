"""What a pass over blocks showed: named sums, which add over micro-batches, ranks and steps, and what they mean."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import torch


@dataclass(frozen=True)
class Sums:
    """Named sums on the device, in one vector, so that adding them up is one operation, or one collective."""

    sizes: dict[str, int]  # of each name's part of the vector, in its order
    vector: torch.Tensor  # float64

    @staticmethod
    def of(**named: torch.Tensor) -> Sums:
        """Of scalars and vectors."""
        flat = {name: value.reshape(-1) for name, value in named.items()}
        return Sums({name: len(value) for name, value in flat.items()}, torch.cat(list(flat.values())).double())

    @staticmethod
    def add_up(parts: Sequence[Sums]) -> Sums:
        return Sums(parts[0].sizes, torch.stack([part.vector for part in parts]).sum(0))

    def reduced(self, reduce: Callable[[torch.Tensor], torch.Tensor]) -> Sums:
        """The sums over what `reduce` adds a tensor up over, such as the ranks."""
        return dataclasses.replace(self, vector=reduce(self.vector))

    def read(self) -> dict[str, list[float]]:
        """On the host, by name; waits for the device."""
        values = iter(self.vector.tolist())
        return {name: [next(values) for _ in range(size)] for name, size in self.sizes.items()}


SHARE, ACCEPTED = "share of ", "accepted by "  # before the names of a kind's own sums
BASE = "base"  # what would be right without a kind's own scores


def measure(
    loss: torch.Tensor,
    correct: torch.Tensor,
    weights: torch.Tensor,
    shares: Mapping[str, torch.Tensor] = MappingProxyType({}),
) -> Sums:
    """The sums that `Statistics` reads, from [N, K-1] each: the weighted losses, 1 where the draft's choice is the
    label, the weights, 0 where no label counts, and what else a kind shows by slot, 0 where none does."""
    counted = (weights > 0).float()
    full = counted[:, -1]  # labels count only in an unbroken run, so the last one tells

    def accepted(right: torch.Tensor) -> torch.Tensor:
        return ((1 + right.cumprod(dim=-1).sum(dim=-1)) * full).sum()

    more = {f"{SHARE}{name}": share.sum() for name, share in shares.items()}
    if BASE in shares:
        more[f"{ACCEPTED}{BASE}"] = accepted(shares[BASE])
    return Sums.of(
        loss=loss.sum(),
        weight=weights.sum(),
        accepted=accepted(correct),
        full_blocks=full.sum(),
        slot_correct=correct.sum(dim=0),
        slot_count=counted.sum(dim=0),
        **more,
    )


@dataclass(frozen=True)
class Statistics:
    """The sums of `measure` on the host.

    Acceptance is teacher-forced: over blocks with a full set of labels, 1 + the leading run of slots whose most likely
    token is the label.
    """

    loss_sum: float  # Σ w·nll
    weight_sum: float
    accepted: float  # tokens a pass would emit, summed over the full blocks
    full_blocks: float
    slot_correct: list[float]  # [K-1]
    slot_count: list[float]  # [K-1]
    more: dict[str, float] = field(default_factory=dict)  # sums of a kind's own, by name

    @staticmethod
    def read(sums: Sums) -> Statistics:
        """Waits for the device."""
        named = sums.read()
        loss, weight, accepted, full = (named[name][0] for name in ("loss", "weight", "accepted", "full_blocks"))
        more = {name: named[name][0] for name in named if name.startswith((SHARE, ACCEPTED))}
        return Statistics(loss, weight, accepted, full, named["slot_correct"], named["slot_count"], more)

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
    def of_kind(self) -> dict[str, float | None]:
        """What kinds with scores of their own show besides, by name: the acceptance length and the accuracy without
        these, and shares of the labels."""
        labels, blocks = sum(self.slot_count), self.full_blocks
        shown: dict[str, float | None] = {}
        for name, value in self.more.items():
            if name.startswith(ACCEPTED):
                shown[f"{name.removeprefix(ACCEPTED)}_tau"] = value / blocks if blocks else None
            elif name != f"{SHARE}{BASE}":
                shown[name.removeprefix(SHARE)] = value / labels if labels else None
        return shown

    @property
    def slot_accuracy(self) -> list[float | None]:
        """The same by slot, 1..K-1; None for a slot without a label."""
        return [right / count if count else None for right, count in zip(self.slot_correct, self.slot_count)]
