"""The LiLiCorr draft (arXiv 2608.20530): DFlash with a head that looks at the likeliest tokens of all slots of a block
at once, a lattice, and scores which of them follows which.

Names and forms are those that vLLM and SGLang load as `LiLiCorrDraftModel`; layers may have the convolutions of
DFlash 2. Its scores take the place of the logits, so that at its beginning it proposes any of the candidates.
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
from dflash_dist.draft.kinds.dflash2 import DFlash2Layer, GroupedConv
from dflash_dist.draft.layers import ContextCache, DraftLayer, RMSNorm
from dflash_dist.draft.shape import DraftShape
from dflash_dist.kernels.cross_entropy import Seen

# What the label's score loses: by cross-entropy, by how far it is not `LEAD` above the others', and by what the
# probabilities of those give away that the target likes less. The paper's variant with a margin.
CROSS_ENTROPY, MARGIN, PENALTY, LEAD = 0.125, 0.125, 0.25, 2.0
FEATURES = 5  # of a candidate: logarithm of its probability, that itself, the distance to the likeliest, rank, first


@dataclass(frozen=True, kw_only=True)
class LiLiCorrShape(DraftShape):
    """
    Raises:
        ValueError: sizes do not go together.
    """

    lilicorr_enabled: bool = True  # engines ask
    lilicorr_candidate_topk: int = 8
    lilicorr_hidden_size: int = 1024
    lilicorr_num_layers: int = 2
    lilicorr_num_heads: int = 8
    lilicorr_mlp_ratio: float = 2.0
    lilicorr_factor_dim: int = 1024  # width of what two candidates are compared by
    lilicorr_vector_eps: float = 1e-4
    lilicorr_logit_scale: float = 8.0  # scores lie between this and its negative
    conv_kernel_size: int | None = None  # of DFlash 2, both or none
    conv_group_size: int | None = None

    def __post_init__(self) -> None:
        if not self.lilicorr_enabled:
            raise ValueError("lilicorr_enabled is false, with which vLLM refuses the draft: set it to true")
        if self.lilicorr_candidate_topk not in (2, 4, 8, 16):
            raise ValueError(
                f"lilicorr_candidate_topk {self.lilicorr_candidate_topk} is none of 2, 4, 8 and 16, as engines need it"
            )
        if self.lilicorr_hidden_size % self.lilicorr_num_heads:
            raise ValueError(
                f"lilicorr_num_heads {self.lilicorr_num_heads} does not divide lilicorr_hidden_size"
                f" {self.lilicorr_hidden_size}"
            )
        for name in ("lilicorr_mlp_ratio", "lilicorr_vector_eps", "lilicorr_logit_scale"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, found {getattr(self, name)}")
        if (self.conv_kernel_size is None) != (self.conv_group_size is None):
            raise ValueError("conv_kernel_size and conv_group_size go together: state both or none")


class LatticeAttention(nn.Module):
    def __init__(self, hidden: int, heads: int):
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * hidden, hidden))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * hidden))
        self.out_proj = nn.Linear(hidden, hidden)

    def forward(self, hidden: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        projected = F.linear(hidden, self.in_proj_weight, self.in_proj_bias)
        query, key, value = projected.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        output = F.scaled_dot_product_attention(query, key, value, attn_mask=bias.to(query.dtype))
        return self.out_proj(output.transpose(1, 2).flatten(2))


class LatticeMLP(nn.Module):
    def __init__(self, inputs: int, inner: int, outputs: int):
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(inputs, inner), nn.Linear(inner, outputs)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.up_proj(hidden)))


class LatticeLayer(nn.Module):
    def __init__(self, shape: LiLiCorrShape):
        super().__init__()
        hidden = shape.lilicorr_hidden_size
        self.attn_norm = RMSNorm(hidden, shape.rms_norm_eps)
        self.attn = LatticeAttention(hidden, shape.lilicorr_num_heads)
        self.mlp_norm = RMSNorm(hidden, shape.rms_norm_eps)
        self.mlp = LatticeMLP(hidden, int(hidden * shape.lilicorr_mlp_ratio), hidden)

    def forward(self, hidden: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        hidden = hidden + self.attn(self.attn_norm(hidden), bias)
        return hidden + self.mlp(self.mlp_norm(hidden))


class Lattice(nn.Module):
    """Gives each candidate a unit vector for what follows it and one for what it follows. The more those of two
    candidates in neighbouring slots point in one direction, the better the second follows the first."""

    def __init__(self, shape: LiLiCorrShape):
        super().__init__()
        outside, hidden, factor = shape.hidden_size, shape.lilicorr_hidden_size, shape.lilicorr_factor_dim
        self.slots, self.candidates = shape.proposals, shape.lilicorr_candidate_topk
        self.eps, self.scale = shape.lilicorr_vector_eps, shape.lilicorr_logit_scale
        self.token_proj = nn.Identity() if hidden == outside else nn.Linear(outside, hidden)
        self.pass_hidden_proj, self.context_proj = nn.Linear(outside, hidden), nn.Linear(outside, hidden)
        self.feature_norm, self.feature_mlp = nn.LayerNorm(FEATURES), LatticeMLP(FEATURES, hidden, hidden)
        self.slot_embedding = nn.Parameter(torch.zeros(1, 1, self.slots, 1, hidden))
        self.rank_embedding = nn.Parameter(torch.zeros(1, 1, 1, self.candidates, hidden))
        self.relative_slot_bias = nn.Parameter(torch.empty(shape.lilicorr_num_heads, 2 * shape.block_size - 1))
        self.same_slot_bias = nn.Parameter(torch.empty(shape.lilicorr_num_heads))
        self.layers = nn.ModuleList(LatticeLayer(shape) for _ in range(shape.lilicorr_num_layers))
        self.output_norm, self.anchor_norm = (RMSNorm(hidden, shape.rms_norm_eps) for _ in range(2))
        self.factor_input_proj = nn.Linear(3 * hidden, hidden)
        self.out_head, self.in_head, self.anchor_out_head = (nn.Linear(hidden, factor) for _ in range(3))

    @torch.no_grad()
    def begin(self) -> None:
        """Small random products, and zeros beside them."""
        for name, parameter in self.named_parameters():
            if name.endswith("weight") and parameter.ndim == 2:
                parameter.normal_(std=0.02)
            elif name.endswith("bias"):
                parameter.zero_()

    def forward(
        self,
        tokens: torch.Tensor,
        log_probabilities: torch.Tensor,
        states: torch.Tensor,
        before: torch.Tensor,
        known: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Args:
            tokens: [M, T, k, H], embeddings of the candidates of the first T slots of M blocks, the likeliest first.
            log_probabilities: [M, T, k], theirs.
            states: [M, T, H], hidden states of the slots.
            before: [M, H], the context of the token before the anchor, where there is one:
            known: [M] bool.

        Returns:
            What follows the anchors [M, f], what follows the candidates, and what these follow [M, T, k, f], float32.
        """
        count = states.shape[1]
        rank = torch.arange(self.candidates, device=states.device).expand_as(log_probabilities)
        apart = log_probabilities - log_probabilities[..., :1]
        of_rank = rank / (self.candidates - 1), (rank == 0).float()
        features = torch.stack([log_probabilities, log_probabilities.exp(), apart, *of_rank], dim=-1)
        hidden = self.token_proj(tokens) + self.pass_hidden_proj(states)[..., None, :]
        hidden = hidden + self.feature_mlp(self.feature_norm(features.to(self.slot_embedding.dtype)))
        hidden = hidden + (self.slot_embedding[0, :, :count] + self.rank_embedding[0]).to(hidden.dtype)
        hidden, bias = hidden.flatten(1, 2), self._bias(count)
        for layer in self.layers:
            hidden = layer(hidden, bias)
        hidden = self.output_norm(hidden).unflatten(1, (count, self.candidates))
        anchor = self.anchor_norm(torch.where(known[:, None], self.context_proj(before), 0))
        # As one product with [hidden; anchor; hidden * anchor], which would be three times as wide.
        own, of_anchor, of_both = self.factor_input_proj.weight.chunk(3, dim=1)
        beside = anchor[:, None, None]
        mixed = F.linear(hidden, own, self.factor_input_proj.bias) + F.linear(hidden * beside, of_both)
        mixed = F.silu(mixed + F.linear(beside, of_anchor))
        vectors = self.anchor_out_head(anchor), self.out_head(mixed), self.in_head(mixed)
        after_anchor, after, follows = (F.normalize(of.float(), dim=-1, eps=self.eps) for of in vectors)
        return after_anchor, after, follows

    def _bias(self, count: int) -> torch.Tensor:
        """[heads, T*k, T*k] of attention, by how far the slots of two candidates are apart."""
        slot = torch.arange(count, device=self.same_slot_bias.device).repeat_interleave(self.candidates)
        apart = slot[:, None] - slot
        return self.relative_slot_bias[:, apart + self.slots] + self.same_slot_bias[:, None, None] * (apart == 0)

    def scores(self, after: torch.Tensor, follows: torch.Tensor) -> torch.Tensor:
        """[.., k]: of candidates [.., k, f] behind one [.., f]."""
        return self.scale * (follows @ after[..., None])[..., 0]


@dataclass
class LatticeCache(ContextCache):
    before: torch.Tensor | None = None  # [L*H], features of the last token


class LiLiCorrDraftModel(DFlashDraftModel):
    """Candidates of all slots are foretold at once, and chosen from left to right by what follows what."""

    architecture = "LiLiCorrDraftModel"
    engines = ("vLLM", "SGLang")
    published = MappingProxyType({"loss.objective": "decay"})
    Shape = LiLiCorrShape
    shape: LiLiCorrShape

    def __init__(self, shape: LiLiCorrShape, gradient_checkpointing: bool = False):
        super().__init__(shape, gradient_checkpointing)
        self.lilicorr = Lattice(shape)
        self.candidates = shape.lilicorr_candidate_topk
        for module in self.modules():
            if isinstance(module, (GroupedConv, Lattice)):
                module.begin()

    def new_layer(self) -> DraftLayer:
        taps, group = self.shape.conv_kernel_size, self.shape.conv_group_size
        return DFlash2Layer(self.shape, taps, group) if taps and group else super().new_layer()

    @classmethod
    def to_config(cls, shape: DraftShape, dtype: str) -> dict[str, Any]:
        assert isinstance(shape, LiLiCorrShape)
        config = super().to_config(shape, dtype)
        of_kind = {name: value for name in shape.of_kind() if (value := getattr(shape, name)) is not None}
        return config | {"dflash_config": config["dflash_config"] | of_kind}

    def judge(
        self,
        batch: Batch,
        features: torch.Tensor | None,
        embedding: torch.Tensor | None,
        states: torch.Tensor,
        seen: Seen,
    ) -> Judgement:
        """What the label's score loses behind the label before it, in blocks where all labels count, up to the first
        label that is no candidate. Elsewhere nothing, and right is what the logits say."""
        assert features is not None and embedding is not None
        blocks, real = batch.weights.flatten(0, 1), batch.weighted[: batch.count]

        def grid(values: torch.Tensor) -> torch.Tensor:
            """[N, ..] -> [M, K-1, ..] of all blocks, 0 where no label counts."""
            whole = values.new_zeros(blocks.numel(), *values.shape[1:])
            return whole.index_copy(0, real, values[: batch.count]).unflatten(0, blocks.shape)

        ids, labels = grid(seen.ids).split([self.candidates, 1], dim=-1)
        found = ids == labels
        recalled, place = found.any(dim=-1), found.long().argmax(dim=-1)
        whole = blocks[:, -1:] > 0  # labels count in an unbroken run
        log_probabilities = seen.logits[:, :-1] - (seen.nll + seen.logits[:, -1])[:, None]
        rows = torch.arange(len(features), device=features.device)[:, None]
        # In the precision of the draft's own forward.
        with torch.autocast(states.device.type, torch.bfloat16, enabled=embedding.dtype == torch.bfloat16):
            before = self.hidden_norm(self.fc(features[rows, batch.anchors - 1].to(embedding.dtype)))
            context = before.flatten(0, 1), batch.slot_positions[..., 0].flatten() > 0
            tokens = F.embedding(ids, embedding)
            anchor, after, follows = self.lilicorr(tokens, grid(log_probabilities), grid(states), *context)
        of_labels = after[:, :-1].take_along_dim(place[:, :-1, None, None], dim=2)[:, :, 0]
        scores = self.lilicorr.scores(torch.cat([anchor[:, None], of_labels], dim=1), follows)

        of_label = scores.take_along_dim(place[..., None], dim=-1)[..., 0]
        of_others = scores.masked_fill(found, -torch.inf).amax(dim=-1)
        liked = grid(seen.of_target)  # 0 where the loss does not look at the target, and so is what is given away
        given_away = scores.softmax(dim=-1) * F.relu(liked[..., -1:] - liked[..., :-1])
        loss = CROSS_ENTROPY * (scores.logsumexp(dim=-1) - of_label) + PENALTY * given_away.sum(dim=-1)
        loss = loss + MARGIN * F.relu(LEAD - of_label + of_others)
        loss = torch.where(whole & (recalled.cumprod(dim=-1) > 0), loss, 0)
        reached = whole & F.pad(recalled[:, :-1], (1, 0), value=True)
        right = ids.take_along_dim(scores.argmax(dim=-1, keepdim=True), dim=-1) == labels
        correct = torch.where(reached, right[..., 0].float(), grid(seen.correct))
        loss, correct, recall = (of.flatten()[batch.weighted] for of in (loss, correct, recalled.float()))
        return Judgement(loss, correct, {"recall": recall})

    def scores(
        self,
        hidden: torch.Tensor,
        previous: torch.Tensor | None,
        head: torch.Tensor,
        embedding: torch.Tensor | None = None,
        before: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As in training: behind a token that is no candidate, those of the draft itself."""
        assert previous is not None and embedding is not None
        logits = super().scores(hidden, None, head)
        ids, anchor, after, follows = self._lattice(hidden, logits, embedding, before)
        found = ids[:-1] == previous[1:, None]
        behind = after[:-1].take_along_dim(found.long().argmax(dim=-1)[:, None, None], dim=1)[:, 0]
        scores = self.lilicorr.scores(torch.cat([anchor, behind]), follows)
        reached = F.pad(found.any(dim=-1), (1, 0), value=True)
        return _among(logits, ids, torch.where(reached[:, None], scores, logits.gather(1, ids)))

    def _lattice(
        self, hidden: torch.Tensor, logits: torch.Tensor, embedding: torch.Tensor, before: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """The candidates [T, k] of one block's slots, and what `Lattice` gives of it: [1, f] and [T, k, f] twice."""
        chosen = logits.float().log_softmax(dim=-1).topk(self.candidates)
        known = torch.tensor([before is not None], device=hidden.device)
        context = hidden[:1] if before is None else self.hidden_norm(self.fc(before[None]))
        tokens = F.embedding(chosen.indices, embedding)
        anchor, after, follows = self.lilicorr(tokens[None], chosen.values[None], hidden[None], context, known)
        return chosen.indices, anchor, after[0], follows[0]

    def new_cache(self) -> LatticeCache:
        return LatticeCache()

    def extend(self, cache: ContextCache, features: torch.Tensor) -> None:
        assert isinstance(cache, LatticeCache)
        super().extend(cache, features)
        if features.shape[1]:
            cache.before = features[0, -1].clone()  # without the others

    def propose(
        self, cache: ContextCache, anchor: int, embedding: torch.Tensor, head: torch.Tensor, choose: Choose
    ) -> list[int]:
        assert isinstance(cache, LatticeCache)
        hidden, tokens = self.block_behind(cache, anchor, embedding), list[int]()
        logits = super().scores(hidden, None, head)
        ids, behind, *vectors = self._lattice(hidden, logits, embedding, cache.before)
        for slot, (of_slot, candidates, after, follows) in enumerate(zip(logits, ids, *vectors)):
            scores = self.lilicorr.scores(behind, follows[None])
            tokens += choose(_among(of_slot[None], candidates[None], scores), slot)
            behind = after[candidates == tokens[-1]]
        return tokens


def _among(logits: torch.Tensor, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """[T, V] float32: scores [T, k] of the candidates `ids`, and nothing for other tokens."""
    return torch.full_like(logits, -torch.inf, dtype=torch.float32).scatter(1, ids, scores.float())
