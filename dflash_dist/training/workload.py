"""How much a run works through, and the operations that a step of it takes however it is computed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from dflash_dist.config import Config
from dflash_dist.data.packing import PackedRows
from dflash_dist.draft.base import Draft
from dflash_dist.kernels.mask import Mask
from dflash_dist.training.setup import planned_steps

TRIED = 400  # tokens
TRAINED = 3  # times the operations of a forward: backward takes twice as many, for the inputs and for the weights


@dataclass(frozen=True)
class Workload:
    """Operations are those of matrix products and attention. Nothing counts that is computed a second time, nor what a
    mask hides."""

    steps: int  # of the run
    rows: int  # of an epoch
    tokens: int  # of an epoch, padding aside
    rows_a_step: int
    flops_a_row: float
    flops_a_label: float  # over the vocabulary; only slots that count have one

    @staticmethod
    def of(config: Config, rows: PackedRows, draft: Draft, target: nn.Module | None) -> Workload:
        """Of a run over `rows`. The decoder `target`, as deep as it is loaded and however it is sharded, is None where
        stored features take its place."""
        flops = draft_flops(draft, rows, config.loss.anchors)
        flops += target_flops(target, rows) if target is not None else 0.0
        steps, batch = planned_steps(config, len(rows)), config.train.global_batch_size
        return Workload(steps, len(rows), rows.tokens, batch, flops, label_flops(draft, config.needs_final))

    def epochs(self, step: int) -> float:
        """Passes over the rows after `step` steps."""
        return step * self.rows_a_step / self.rows

    def tokens_seen(self, step: int) -> int:
        """The same in tokens; within an epoch, as if all rows were filled alike."""
        return round(self.epochs(step) * self.tokens)

    def flops(self, labels: float) -> float:
        """Of a step over all ranks in which so many slots had a label."""
        return self.rows_a_step * self.flops_a_row + labels * self.flops_a_label


def draft_flops(draft: Draft, rows: PackedRows, anchors: int) -> float:
    """Of the draft's forward and backward, for a row of average content. All slots of `anchors` blocks are computed,
    but those of a block without an anchor see nothing."""
    shape, context, slots = draft.shape, rows.seq_len, anchors * draft.shape.block_size
    seen_by = {"k_proj": context + slots, "v_proj": context + slots}  # other weights meet the slots alone
    weights = {name: weight for name, weight in draft.layers.named_parameters() if weight.dim() == 2}  # type: ignore[attr-defined]
    linear = sum(2 * weight.numel() * seen_by.get(name.split(".")[-2], slots) for name, weight in weights.items())
    blocks = float(np.minimum(rows.anchors, anchors).mean())
    pairs = blocks * sum(
        mean_pairs(mask, shape.block_size, rows) * layers for mask, layers in Counter(shape.masks).items()
    )
    attention = 4 * shape.num_attention_heads * shape.head_dim * pairs
    of_context = 2 * 2 * draft.fc.weight.numel() * context  # features need no gradient
    return TRAINED * (linear + attention) + of_context


@torch.no_grad()
def label_flops(draft: Draft, has_teacher: bool) -> float:
    """Of the products over the vocabulary, for a slot with a label."""
    shape = draft.shape
    with torch.device(draft.fc.weight.device):
        embedding = torch.zeros(1, shape.hidden_size)
        added = draft.added(embedding, torch.zeros(1, dtype=torch.int64), embedding)
    head = 2 * shape.hidden_size * shape.vocab_size
    table = 2 * added[1].numel() if added else 0
    passes = 2 if draft.base_share(0.0) else 1  # of the logits without what is added, too
    return passes * head * (2 + has_teacher) + TRAINED * table  # the head is frozen: backward is for its inputs alone


def target_flops(target: nn.Module, rows: PackedRows) -> float:
    """Of a decoder's forward, for a row of average content. Of its experts, those count that a token is sent to; what a
    sliding window hides counts all the same."""
    text: Any = target.config.get_text_config()  # type: ignore[operator, union-attr]
    filled = rows.tokens / len(rows)
    computed = rows.seq_len if rows.packs else filled
    linear = 2 * sum(_weights_met(target, text)) * computed
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    pairs = filled * (mean_context(rows) + 1)
    return linear + 4 * text.num_attention_heads * head_dim * pairs * text.num_hidden_layers


def _weights_met(target: nn.Module, text: Any) -> Iterator[float]:
    """How many weights of each of the decoder's matrices a token is multiplied with."""
    experts = getattr(text, "num_experts", None) or getattr(text, "num_local_experts", None)
    chosen = text.num_experts_per_tok / experts if experts else 1.0
    for name, module in target.named_modules():
        if not isinstance(module, nn.Embedding):
            share = chosen if "experts" in name.split(".") else 1.0
            yield from (share * of.numel() for of in module.parameters(recurse=False) if of.dim() > 1)


def mean_context(rows: PackedRows) -> float:
    """Tokens before a token in its document, on average over all of the rows' tokens."""
    lengths = rows.lengths.astype(np.float64)
    return float((lengths * (lengths - 1) / 2).sum() / lengths.sum())


def mean_pairs(mask: Mask, slots: int, rows: PackedRows) -> float:
    """Pairs of a slot and what it sees, over the slots of a block whose anchor is any token: the mean of some."""
    draw, lengths = np.random.default_rng(0), rows.lengths
    of_token = draw.choice(lengths, TRIED, p=lengths / lengths.sum())
    contexts = Counter((draw.random(TRIED) * of_token).astype(int).tolist())
    return sum(int(mask.after_context(n, slots).sum()) * times for n, times in contexts.items()) / TRIED
