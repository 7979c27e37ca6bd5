"""The Domino draft (SpecForge's pull request 571): DFlash with a recurrent network over the tokens before a slot, which
adds to the slot's logits from the second on. Training shifts from the logits without to those with it.

Names and forms are those that SGLang loads, as a `DFlashDraftModel` with a projector. Slots are filled in
(`shift_label: false`). At its beginning it proposes what plain DFlash does.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from dflash_dist.draft.base import Choose
from dflash_dist.draft.kinds.dflash import DFlashDraftModel
from dflash_dist.draft.layers import ContextCache
from dflash_dist.draft.shape import DraftShape


@dataclass(frozen=True, kw_only=True)
class DominoShape(DraftShape):
    gru_hidden_dim: int = 1024
    emb_dim: int = 256  # width of the table


class DominoDraftModel(DFlashDraftModel):
    """Hidden states of all slots are foretold at once, and tokens chosen from left to right."""

    architecture = "DFlashDraftModel"
    projector = "domino"
    engines = ("SGLang",)
    published = MappingProxyType({"loss.objective": "decay"})
    Shape = DominoShape
    shape: DominoShape

    def __init__(self, shape: DominoShape, gradient_checkpointing: bool = False):
        super().__init__(shape, gradient_checkpointing)
        hidden, memory, width = shape.hidden_size, shape.gru_hidden_dim, shape.emb_dim
        self.prefix_gru = nn.ParameterDict(
            {"weight_ih_l0": torch.empty(3 * memory, hidden), "weight_hh_l0": torch.empty(3 * memory, memory)}
        )
        self.embed_proj = nn.Sequential(
            nn.Linear(hidden + memory, width, bias=False), nn.SiLU(), nn.Linear(width, shape.vocab_size, bias=False)
        )
        for parameter in self.prefix_gru.values():
            nn.init.uniform_(parameter, -(memory**-0.5), memory**-0.5)  # as torch's own
        nn.init.zeros_(self.table)

    @property
    def table(self) -> nn.Parameter:
        """[V, emb_dim]"""
        return self.embed_proj[2].weight  # type: ignore[return-value]

    @classmethod
    def to_config(cls, shape: DraftShape, dtype: str) -> dict[str, Any]:
        config = super().to_config(shape, dtype)
        of_kind = {name: getattr(shape, name) for name in shape.of_kind()}
        fixed = {"projector_type": cls.projector, "shift_label": False, "pure_draft_prefix_len": 1}
        return config | of_kind | {"dflash_config": config["dflash_config"] | fixed | of_kind}

    def base_share(self, progress: float) -> float:
        return 1 - progress

    def added(
        self, states: torch.Tensor, previous: torch.Tensor, embedding: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert embedding is not None
        with torch.autocast(states.device.type, torch.bfloat16, enabled=embedding.dtype == torch.bfloat16):
            memories = self._remember(F.embedding(previous, embedding), None)
            rows = self._rows(states, memories)
        rows = torch.cat([torch.zeros_like(rows[..., :1, :]), rows[..., 1:, :]], dim=-2)  # the first slot has the base
        return rows, self.table

    def _remember(self, tokens: torch.Tensor, memory: torch.Tensor | None) -> torch.Tensor:
        """[.., T, g]: the state of a gated recurrent unit, as `nn.GRU` has it, behind each of the tokens [.., T, H]."""
        given = F.linear(tokens.to(self.table.dtype), self.prefix_gru["weight_ih_l0"])
        states = []
        memory = given.new_zeros(*given.shape[:-2], self.shape.gru_hidden_dim) if memory is None else memory
        for of_token in given.unbind(-2):
            reset, update, new = of_token.chunk(3, dim=-1)
            old_reset, old_update, old_new = F.linear(memory, self.prefix_gru["weight_hh_l0"]).chunk(3, dim=-1)
            new = torch.tanh(new + torch.sigmoid(reset + old_reset) * old_new)
            share = torch.sigmoid(update + old_update)
            memory = (1 - share) * new + share * memory
            states.append(memory)
        return torch.stack(states, dim=-2)

    def _rows(self, states: torch.Tensor, memories: torch.Tensor) -> torch.Tensor:
        return F.silu(self.embed_proj[0](torch.cat([states.to(memories.dtype), memories], dim=-1)))

    def scores(
        self,
        hidden: torch.Tensor,
        previous: torch.Tensor | None,
        head: torch.Tensor,
        embedding: torch.Tensor | None = None,
        before: torch.Tensor | None = None,
    ) -> torch.Tensor:
        assert previous is not None
        rows, table = self.added(hidden, previous, embedding)
        return super().scores(hidden, None, head) + rows.to(table.dtype) @ table.T

    def propose(
        self, cache: ContextCache, anchor: int, embedding: torch.Tensor, head: torch.Tensor, choose: Choose
    ) -> list[int]:
        hidden, tokens, memory = self.block_behind(cache, anchor, embedding), [anchor], None
        logits = super().scores(hidden, None, head)
        for slot, (of_slot, state) in enumerate(zip(logits.split(1), hidden.split(1))):
            previous = F.embedding(torch.tensor(tokens[-1:], device=hidden.device), embedding)
            memories = self._remember(previous, memory)
            memory = memories[-1]
            tokens += choose(of_slot + self.embed_proj[2](self._rows(state, memories)) if slot else of_slot, slot)
        return tokens[1:]
