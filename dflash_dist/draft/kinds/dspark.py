"""The DSpark draft (DeepSeek's DeepSpec): DFlash with a head that adds to a slot's logits what the token before it
makes likely, a product of two learned tables, and with one that foretells whether the slot will be accepted.

Names and forms are those that vLLM and SGLang load as `Qwen3DSparkModel`. Slots are filled in: the anchor's own
proposes nothing (`sample_from_anchor: false`). At its beginning it proposes what plain DFlash does.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from dflash_dist.batch import Batch
from dflash_dist.draft.base import Choose, Judgement
from dflash_dist.draft.kinds.dflash import DFlashDraftModel
from dflash_dist.draft.layers import ContextCache
from dflash_dist.draft.shape import DraftShape
from dflash_dist.kernels.cross_entropy import Seen


@dataclass(frozen=True, kw_only=True)
class DSparkShape(DraftShape):
    markov_rank: int = 256  # width of the two tables
    markov_head_type: str = "vanilla"  # or gated or rnn
    enable_confidence_head: bool = True
    confidence_head_with_markov: bool = True  # it also sees the token before


class MarkovHead(nn.Module):
    """What the tokens before a slot make likely there: all of them (rnn), or the last one alone, as much as the hidden
    state lets through (gated)."""

    def __init__(self, shape: DSparkShape):
        super().__init__()
        rank, hidden, self.kind = shape.markov_rank, shape.hidden_size, shape.markov_head_type
        if self.kind not in ("vanilla", "gated", "rnn"):
            raise ValueError(f"markov_head_type {self.kind} is none of vanilla, gated and rnn")
        self.markov_w1 = nn.Embedding(shape.vocab_size, rank)
        self.markov_w2 = nn.Linear(rank, shape.vocab_size, bias=False)
        if self.kind == "gated":
            self.gate_proj = nn.Linear(hidden + rank, rank)
        if self.kind == "rnn":
            self.joint_proj = nn.Linear(2 * rank + hidden, 3 * rank)

    @torch.no_grad()
    def begin(self) -> None:
        """Adding nothing, but with a gradient that shows the way."""
        self.markov_w1.weight.normal_(std=0.02)
        self.markov_w2.weight.zero_()

    def rows(
        self, states: torch.Tensor, previous: torch.Tensor, memory: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[.., T, r], of which `markov_w2` makes logits, for states [.., T, H] and the tokens before [.., T]; and what
        is remembered [.., r] behind them, as `memory` takes it."""
        before = self.markov_w1(previous)
        states = states.to(before.dtype)
        memory = torch.zeros_like(before[..., 0, :]) if memory is None else memory
        if self.kind == "vanilla":
            return before, memory
        if self.kind == "gated":
            return self.gate_proj(torch.cat([states, before], dim=-1)).sigmoid() * before, memory
        rows = []
        for token, state in zip(before.unbind(-2), states.unbind(-2)):
            gate, new, out = self.joint_proj(torch.cat([memory, token, state], dim=-1)).chunk(3, dim=-1)
            memory = torch.lerp(new.tanh(), memory, gate.sigmoid())
            rows.append(out.tanh())
        return torch.stack(rows, dim=-2), memory


class ConfidenceHead(nn.Module):
    def __init__(self, shape: DSparkShape):
        super().__init__()
        self.with_markov = shape.confidence_head_with_markov
        self.proj = nn.Linear(shape.hidden_size + shape.markov_rank * self.with_markov, 1)

    def forward(self, states: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        """[N]: the logit of how much of a slot's proposals is accepted, for states [N, H] and the rows [N, r] of the
        tokens before."""
        inputs = torch.cat([states.to(before.dtype), before], dim=-1) if self.with_markov else states
        return self.proj(inputs.to(self.proj.weight.dtype))[:, 0]


class DSparkDraftModel(DFlashDraftModel):
    """Hidden states of all slots are foretold at once, and tokens chosen from left to right."""

    architecture = "Qwen3DSparkModel"
    method = "dspark"
    engines = ("vLLM", "SGLang")
    published = MappingProxyType({"loss.objective": "decay", "loss.distance": {"ce": 0.1, "tv": 1.8}})
    Shape = DSparkShape
    shape: DSparkShape

    def __init__(self, shape: DSparkShape, gradient_checkpointing: bool = False):
        super().__init__(shape, gradient_checkpointing)
        self.markov_head = MarkovHead(shape)
        self.markov_head.begin()
        self.confidence_head = ConfidenceHead(shape) if shape.enable_confidence_head else None

    @classmethod
    def to_config(cls, shape: DraftShape, dtype: str) -> dict[str, Any]:
        """Engines read all of it at the top level."""
        config = super().to_config(shape, dtype)
        of_kind = {name: getattr(shape, name) for name in shape.of_kind()} | {"sample_from_anchor": False}
        inner = config["dflash_config"] | of_kind
        stated = {name: inner[name] for name in ("mask_token_id", "target_layer_ids")}
        return config | stated | of_kind | {"dflash_config": inner}

    def added(
        self, states: torch.Tensor, previous: torch.Tensor, embedding: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.markov_head.rows(states, previous)[0], self.markov_head.markov_w2.weight

    def judge(
        self,
        batch: Batch,
        features: torch.Tensor | None,
        embedding: torch.Tensor | None,
        states: torch.Tensor,
        seen: Seen,
    ) -> Judgement | None:
        """How far the confidence is from what is accepted, as binary cross-entropy."""
        if self.confidence_head is None:
            return None
        previous = self.markov_head.markov_w1(batch.previous.flatten()[batch.weighted])
        told = self.confidence_head(states, previous).float()
        loss = F.binary_cross_entropy_with_logits(told, seen.accepted, reduction="none")
        off = (told.detach().sigmoid() - seen.accepted).abs()
        return Judgement(loss, None, {"overlap": seen.accepted, "confidence_error": off})

    def scores(
        self,
        hidden: torch.Tensor,
        previous: torch.Tensor | None,
        head: torch.Tensor,
        embedding: torch.Tensor | None = None,
        before: torch.Tensor | None = None,
    ) -> torch.Tensor:
        assert previous is not None
        rows, table = self.added(hidden, previous)
        return super().scores(hidden, None, head) + rows @ table.T

    def propose(
        self, cache: ContextCache, anchor: int, embedding: torch.Tensor, head: torch.Tensor, choose: Choose
    ) -> list[int]:
        hidden, tokens, memory = self.block_behind(cache, anchor, embedding), [anchor], None
        logits = super().scores(hidden, None, head)  # of all slots at once
        for slot, (of_slot, state) in enumerate(zip(logits.split(1), hidden.split(1))):
            previous = torch.tensor(tokens[-1:], device=hidden.device)
            rows, memory = self.markov_head.rows(state, previous, memory)
            tokens += choose(of_slot + self.markov_head.markov_w2(rows), slot)
        return tokens[1:]
