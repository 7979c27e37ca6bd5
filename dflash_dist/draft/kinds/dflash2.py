"""The DFlash 2 draft (inco.ai/blog/dflash2): DFlash with convolutions over the slots of a block, whose kernels depend
on the slot, around attention and MLP, and a head that chooses among a slot's likeliest tokens by the token before it.

Names and forms are those that vLLM, SGLang and z-lab/dflash load. At its beginning it proposes what plain DFlash does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from dflash_dist.batch import Batch
from dflash_dist.draft.base import Choose, Judgement
from dflash_dist.draft.kinds.dflash import DFlashDraftModel
from dflash_dist.draft.layers import ContextCache, DraftLayer, KeyValue
from dflash_dist.draft.shape import DraftShape
from dflash_dist.kernels.attention import Attend
from dflash_dist.kernels.cross_entropy import Seen
from dflash_dist.kernels.elementwise import Rope


@dataclass(frozen=True, kw_only=True)
class DFlash2Shape(DraftShape):
    conv_kernel_size: int = 2  # taps: a slot and those before it
    conv_group_size: int = 16  # channels that share what a kernel adds
    selector_rank: int = 256
    selector_top_k: int = 16  # candidates of a slot


class GroupedConv(nn.Module):
    """Convolutions over the slots of a block, before (side 0) and behind (side 1) what they surround."""

    def __init__(self, shape: DraftShape, taps: int, group: int):
        super().__init__()
        if shape.hidden_size % group:
            raise ValueError(f"conv_group_size {group} does not divide {shape.hidden_size} channels")
        self.slots, self.taps, self.group = shape.block_size, taps, group
        self.base_kernel = nn.Parameter(torch.zeros(2, taps, shape.hidden_size))
        self.kernel_projection = nn.Linear(shape.hidden_size, 2 * taps * shape.hidden_size // group, bias=False)

    @torch.no_grad()
    def begin(self) -> None:
        """As if it was not there."""
        self.base_kernel.zero_()[:, 0] = 1
        self.kernel_projection.weight.zero_()

    def kernels(self, slots: torch.Tensor) -> torch.Tensor:
        """[2, taps, B, T, H] for slots [B, T, H] of whole blocks, their anchors first."""
        added = self.kernel_projection(slots).unflatten(-1, (2, self.taps, -1)).permute(2, 3, 0, 1, 4)
        return self.base_kernel[:, :, None, None].to(added.dtype) + added.repeat_interleave(self.group, dim=-1)

    def forward(self, slots: torch.Tensor, kernels: torch.Tensor) -> torch.Tensor:
        """[B, T, H], by the `kernels` [taps, B, T, H] of one side; nothing comes from another block."""
        result = kernels[0] * slots
        place = torch.arange(slots.shape[1], device=slots.device)[:, None] % self.slots
        for back in range(1, self.taps):
            earlier = F.pad(slots, (0, 0, back, 0))[:, : slots.shape[1]]
            result = result + kernels[back] * torch.where(place >= back, earlier, 0)
        return result


class DFlash2Layer(DraftLayer):
    added = ("attention_conv", "mlp_conv")

    def __init__(self, shape: DraftShape, taps: int, group: int):
        super().__init__(shape)
        self.attention_conv, self.mlp_conv = (GroupedConv(shape, taps, group) for _ in range(2))

    def forward(self, hidden: torch.Tensor, rope: Rope, context: KeyValue, attend: Attend) -> torch.Tensor:
        slots = self.input_layernorm(hidden)
        before, behind = self.attention_conv.kernels(slots)
        slots = self.self_attn(self.attention_conv(slots, before), rope, context, attend)
        hidden = hidden + self.attention_conv(slots, behind)
        slots = self.post_attention_layernorm(hidden)
        before, behind = self.mlp_conv.kernels(slots)
        return hidden + self.mlp_conv(self.mlp(self.mlp_conv(slots, before)), behind)


class CandidateSelector(nn.Module):
    """Scores a slot's candidates by the token before it."""

    def __init__(self, shape: DFlash2Shape):
        super().__init__()
        self.predecessor_codebook = nn.Parameter(torch.empty(shape.vocab_size, shape.selector_rank))
        self.successor_codebook = nn.Parameter(torch.empty(shape.vocab_size, shape.selector_rank))
        self.hidden_projection = nn.Linear(shape.hidden_size, shape.selector_rank, bias=False)

    @torch.no_grad()
    def begin(self) -> None:
        """Adding nothing, but with a gradient that shows the way."""
        self.predecessor_codebook.normal_(std=0.02)
        self.successor_codebook.zero_()

    def forward(
        self, states: torch.Tensor, previous: torch.Tensor, ids: torch.Tensor, logits: torch.Tensor
    ) -> torch.Tensor:
        """[N, k], for states [N, H], the tokens before [N], and candidates [N, k] with their logits."""
        states = self.hidden_projection(states.to(self.hidden_projection.weight.dtype))
        asked = F.embedding(previous, self.predecessor_codebook) * states
        return logits + (F.embedding(ids, self.successor_codebook) @ asked[..., None])[..., 0]


class DFlash2DraftModel(DFlashDraftModel):
    """Candidates of all slots are foretold at once, and chosen from left to right."""

    architecture = "DFlash2DraftModel"
    Shape = DFlash2Shape
    shape: DFlash2Shape

    def __init__(self, shape: DFlash2Shape, gradient_checkpointing: bool = False):
        super().__init__(shape, gradient_checkpointing)
        self.candidate_selector = CandidateSelector(shape)
        self.candidates = shape.selector_top_k
        for module in self.modules():
            if isinstance(module, (GroupedConv, CandidateSelector)):
                module.begin()

    def new_layer(self) -> DFlash2Layer:
        return DFlash2Layer(self.shape, self.shape.conv_kernel_size, self.shape.conv_group_size)

    @classmethod
    def to_config(cls, shape: DraftShape, dtype: str) -> dict[str, Any]:
        assert isinstance(shape, DFlash2Shape)
        config = super().to_config(shape, dtype)
        return config | {
            "dflash_config": config["dflash_config"] | {name: getattr(shape, name) for name in shape.of_kind()}
        }

    def judge(
        self,
        batch: Batch,
        features: torch.Tensor | None,
        embedding: torch.Tensor | None,
        states: torch.Tensor,
        seen: Seen,
    ) -> Judgement:
        """The cross-entropy of the label among the candidates, where it takes the last one's place if it is none."""
        previous = batch.previous.flatten()[batch.weighted]
        scores = self.candidate_selector(states, previous, seen.ids, seen.logits)
        candidates, labels = seen.ids[:, :-1], seen.ids[:, -1:]
        found, last = candidates == labels, self.candidates - 1
        recalled = found.any(dim=1)
        chosen = candidates.gather(1, scores[:, :-1].argmax(dim=1, keepdim=True))
        out = torch.where(recalled, self.candidates, last)[:, None]  # the label twice; or the last of the candidates
        place = torch.where(recalled, found.long().argmax(dim=1), self.candidates)
        among = scores.scatter(1, out, -torch.inf)
        loss = F.cross_entropy(among, place, reduction="none")
        return Judgement(loss, (chosen == labels)[:, 0].float(), {"recall": recalled.float()})

    def scores(
        self,
        hidden: torch.Tensor,
        previous: torch.Tensor | None,
        head: torch.Tensor,
        embedding: torch.Tensor | None = None,
        before: torch.Tensor | None = None,
    ) -> torch.Tensor:
        assert previous is not None
        return self._among_candidates(super().scores(hidden, None, head), hidden, previous)

    def _among_candidates(self, logits: torch.Tensor, hidden: torch.Tensor, previous: torch.Tensor) -> torch.Tensor:
        likeliest = logits.topk(self.candidates)
        chosen = self.candidate_selector(hidden, previous, likeliest.indices, likeliest.values)
        return torch.full_like(logits, -torch.inf).scatter(1, likeliest.indices, chosen.to(logits.dtype))

    def propose(
        self, cache: ContextCache, anchor: int, embedding: torch.Tensor, head: torch.Tensor, choose: Choose
    ) -> list[int]:
        hidden, tokens = self.block_behind(cache, anchor, embedding), [anchor]
        logits = super().scores(hidden, None, head)  # of all slots at once
        for slot, (of_slot, state) in enumerate(zip(logits.split(1), hidden.split(1))):
            previous = torch.tensor(tokens[-1:], device=hidden.device)
            tokens += choose(self._among_candidates(of_slot, state, previous), slot)
        return tokens[1:]
