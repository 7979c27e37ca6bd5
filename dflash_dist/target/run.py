"""What the frozen target gives for a micro-batch: run on the spot, or read from features that `capture` stored."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F

from dflash_dist.batch import Batch, Place
from dflash_dist.target.capture import HFDFlashTargetModel
from dflash_dist.target.features import FeatureFolder


class Output(NamedTuple):
    """In the target's dtype."""

    features: torch.Tensor  # [B, S, L * H], the captured layers in their order
    final: torch.Tensor | None = None  # [B, S, H], what the LM head reads, where it is needed


class Target(Protocol):
    waited: float  # seconds that the host has waited for data

    def expect(self, batches: Iterable[Batch]) -> None:
        """What will be run from now on, in this order."""

    def run(self, batch: Batch, final: bool = False) -> Output:
        """For a batch on the device; `final` asks for that too, which may be there all the same."""


class LiveTarget:
    """Runs the target.

    Args:
        model: as deep as the deepest captured layer, or whole, where the final state is needed.
        packs: several documents a row, which the target keeps apart. Otherwise each row holds one, which the target
            runs by itself, without the row's padding: nothing can disturb it then.
    """

    def __init__(self, model: HFDFlashTargetModel, packs: bool = True):
        self.model, self.packs = model, packs
        self.waited = 0.0

    def expect(self, batches: Iterable[Batch]) -> None:
        pass

    def run(self, batch: Batch, final: bool = False) -> Output:
        if self.packs:
            rows = self.model.generate_batch(batch.input_ids, None, None, batch.position_ids, final_states=final)
            return Output(rows.hidden_states, rows.final_states)
        # A sharded forward is one of all ranks: a row of padding runs one token.
        alone = [
            self.model.generate_batch(ids[None, : max(length, 1)], None, None, final_states=final)
            for ids, length in zip(batch.input_ids, batch.filled)
        ]

        def laid_out(states: list[torch.Tensor]) -> torch.Tensor:
            size = batch.input_ids.shape[1]
            cut = [of[0, :length] for of, length in zip(states, batch.filled)]
            return torch.stack([F.pad(of, (0, 0, 0, size - len(of))) for of in cut])

        finals = [of.final_states for of in alone if of.final_states is not None]
        return Output(laid_out([of.hidden_states for of in alone]), laid_out(finals) if final else None)


class StoredTarget:
    """Reads stored features, and prefetches those of the next micro-batch in a thread.

    Args:
        final: so many of a token's features are the final state, behind those of the layers.
    """

    def __init__(self, features: FeatureFolder, seq_len: int, device: torch.device, final: int = 0):
        self.waited = 0.0
        cuda = device.type == "cuda"
        # A new thread would pin its memory through GPU 0, whichever GPU this rank has.
        self._reader = ThreadPoolExecutor(1, "features", (lambda: torch.cuda.set_device(device)) if cuda else None)
        self._read = lambda place: features.read(place.part, place.rows, seq_len, pin=cuda)
        self._final = final
        self._coming: deque[Place] = deque()
        self._next: Future[torch.Tensor] | None = None

    def expect(self, batches: Iterable[Batch]) -> None:
        self._coming = deque(batch.place for batch in batches)  # of a step that was not run, nothing is left
        self._prefetch()

    def run(self, batch: Batch, final: bool = False) -> Output:
        assert self._next and self._coming[0] == batch.place, "batches are run in the order they were sampled in"
        begun = time.perf_counter()
        features = self._next.result()
        self.waited += time.perf_counter() - begun
        self._coming.popleft()
        self._prefetch()
        features = features.to(batch.input_ids.device, non_blocking=True)
        if not self._final:
            assert not final, "make_target refuses features without the final state where that is needed"
            return Output(features)
        # Laid out as the target gives them, so that the same kernels give the same bits.
        return Output(features[..., : -self._final].contiguous(), features[..., -self._final :])

    def _prefetch(self) -> None:
        self._next = self._reader.submit(self._read, self._coming[0]) if self._coming else None
