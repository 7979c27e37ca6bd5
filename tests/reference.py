"""The draft's training mathematics again: slow, plain, and written from the contract alone.

An oracle for the package's blocks, attention and objective, of which it uses nothing but the `Batch` container. Every
rule is a loop over Python integers, so that it can be checked by reading it next to the sentence it comes from.

Shape letters as in `dflash_dist.draft`: B rows, S packed length, H hidden, A anchors a row, K block size, V vocabulary,
D head size.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from dflash_dist.batch import PADDING, Batch
from dflash_dist.draft.kinds.dflash import DFlashDraftModel
from dflash_dist.draft.shape import DraftShape

MASK = 3  # the mask token of `tests.tiny`


# -------------------------------------------------------------------------------------------------------- material


class Rows(NamedTuple):
    """Packed rows [B, S] in the order in which `Batch.of_rows` takes them: `Batch.of_rows(*rows)`."""

    input_ids: torch.Tensor  # int64
    loss_mask: torch.Tensor  # bool
    document_ids: torch.Tensor  # int64, counted within the row; padding at the row's end is a document of its own
    position_ids: torch.Tensor  # int64, restarting with each document

    def row(self, index: int) -> Rows:
        """One row, as a batch of one."""
        return Rows(*(field[index : index + 1] for field in self))


def packed_row(*masks: Sequence[int], length: int, first_token: int = 10) -> Rows:
    """One row [1, S] of documents given by their loss masks, filled with unsupervised padding up to `length`.

    The token at index i is `first_token + i`, so that a token tells where it comes from.
    """
    masks = (*masks, [0] * (length - sum(map(len, masks))))
    loss_mask = [bool(supervised) for mask in masks for supervised in mask]
    documents = [number for number, mask in enumerate(masks) for _ in mask]
    positions = [position for mask in masks for position in range(len(mask))]
    tokens = [first_token + i for i in range(length)]
    return Rows(*(torch.tensor([values]) for values in (tokens, loss_mask, documents, positions)))


def random_rows(seed: int, rows: int = 4, length: int = 48, vocabulary: int = 260) -> Rows:
    """Rows [B, S] of several documents of 1..24 tokens, multi-turn masks with gaps, padding in about half of them.

    Supervision starts and ends anywhere, so documents that touch are often both supervised at their border.
    """
    rng = np.random.default_rng(seed)
    built = []
    for _ in range(rows):
        free = length - int(rng.integers(0, 2)) * int(rng.integers(1, length // 4))
        masks = []
        while free > 0:
            size = min(int(rng.integers(1, 25)), free)
            free -= size
            mask: list[int] = []
            supervised = int(rng.integers(0, 2))
            while len(mask) < size:
                mask += [supervised] * int(rng.integers(1, 20 if supervised else 5))
                supervised = 1 - supervised
            masks.append(mask[:size])
        built.append(packed_row(*masks, length=length))
    tokens = torch.from_numpy(rng.integers(10, vocabulary, size=(rows, length)))
    return Rows(tokens, *(torch.cat(field) for field in list(zip(*built))[1:]))


def lively_draft(shape: DraftShape, seed: int = 0, **options: bool) -> DFlashDraftModel:
    """A draft whose every parameter matters: weights of unit gain, and norms that are not all ones.

    At initialisation a draft hardly looks at its context, and a wrong mask could hide below a tolerance.
    """
    generator = torch.Generator().manual_seed(seed)
    draft = DFlashDraftModel(shape, **options)
    with torch.no_grad():
        for parameter in draft.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * parameter.shape[1] ** -0.5 if parameter.dim() == 2 else 1 + 0.3 * noise)
    return draft


# ---------------------------------------------------------------------------------------------- anchors and labels


def eligible_anchors(loss_mask: torch.Tensor, document_ids: torch.Tensor) -> list[int]:
    """Indices in one row [S] that may be anchors: supervised tokens whose next token is supervised too, in the same
    document."""
    supervised, document = loss_mask.tolist(), document_ids.tolist()
    return [
        i for i in range(len(supervised) - 1) if supervised[i] and supervised[i + 1] and document[i] == document[i + 1]
    ]


def counted_labels(loss_mask: torch.Tensor, document_ids: torch.Tensor, anchor: int, block_size: int) -> int:
    """How many of a block's labels count in one row [S]: they stop at the row's end, the document's end, or the first
    unsupervised token."""
    supervised, document = loss_mask.tolist(), document_ids.tolist()
    for k in range(1, block_size):
        label = anchor + k
        if label >= len(supervised) or document[label] != document[anchor] or not supervised[label]:
            return k - 1
    return block_size - 1


def reference_blocks(rows: Rows, anchors: Sequence[Sequence[int]], slots: int, block_size: int, gamma: float) -> Batch:
    """The blocks of chosen anchors.

    Args:
        rows: [B, S].
        anchors: for each row its anchors, at most `slots`.
        slots: A, blocks a row; those without an anchor are unused: document -1, weight 0.
        block_size: K.
        gamma: decay of the weights exp(-(k-1)/gamma).

    Returns:
        The rows with their blocks. Where the weight is 0, labels are 0, which says nothing: nobody may read them.
    """
    length = rows.input_ids.shape[1]
    shape = (len(anchors), slots)
    blocks = dataclasses.replace(
        Batch.of_rows(*rows),
        anchors=torch.zeros(shape, dtype=torch.int64),
        anchor_documents=torch.full(shape, -1),
        slot_ids=torch.full((*shape, block_size), MASK),
        slot_positions=torch.zeros((*shape, block_size), dtype=torch.int64),
        labels=torch.zeros((*shape, block_size - 1), dtype=torch.int64),
        weights=torch.zeros((*shape, block_size - 1)),
    )
    for b, chosen in enumerate(anchors):
        assert len(chosen) <= slots and all(0 <= anchor < length for anchor in chosen)
        for a in range(slots):
            anchor = chosen[a] if a < len(chosen) else 0
            blocks.anchors[b, a] = anchor
            blocks.slot_ids[b, a, 0] = rows.input_ids[b, anchor]
            for k in range(block_size):
                blocks.slot_positions[b, a, k] = rows.position_ids[b, anchor] + k
            if a >= len(chosen):
                continue
            blocks.anchor_documents[b, a] = rows.document_ids[b, anchor]
            for k in range(1, 1 + counted_labels(rows.loss_mask[b], rows.document_ids[b], anchor, block_size)):
                blocks.labels[b, a, k - 1] = rows.input_ids[b, anchor + k]
                blocks.weights[b, a, k - 1] = math.exp(-(k - 1) / gamma)
    return reweighted(blocks)


def reweighted(blocks: Batch) -> Batch:
    """The blocks, with those slots listed for the head that have weight now."""
    index = [i for i, weight in enumerate(blocks.weights.flatten().tolist()) if weight]
    padded = torch.tensor(index + [0] * (-len(index) % PADDING), dtype=torch.int64)
    return dataclasses.replace(blocks, weighted=padded, count=len(index))


# --------------------------------------------------------------------------------------------------------- attention


def dense_mask(blocks: Batch, row: int, window: int | None = None, causal: bool = False) -> torch.Tensor:
    """[A*K, S + A*K] bool: which slot of a row sees which context token (first S columns) and which slot.

    A slot sees the context strictly before its anchor, in its anchor's document, and all slots of its own block. The
    slots of unused blocks (document -1) see only each other.

    Args:
        window: a slot sees the context tokens among the `window` tokens that end with itself.
        causal: a slot sees no later slot.
    """
    anchors, documents = blocks.anchors[row].tolist(), blocks.anchor_documents[row].tolist()
    context_documents = blocks.document_ids[row].tolist()
    length, size = len(context_documents), blocks.slots
    mask = torch.zeros(len(anchors) * size, length + len(anchors) * size, dtype=torch.bool)
    for slot in range(len(anchors) * size):
        block = slot // size
        for context in range(length):
            mask[slot, context] = context < anchors[block] and context_documents[context] == documents[block]
            if window is not None and context not in range(anchors[block] + slot % size - window + 1, length):
                mask[slot, context] = False
        for other in range(len(anchors) * size):
            mask[slot, length + other] = other // size == block and not (causal and other > slot)
    return mask


class DenseAttention:
    """Attention with the whole mask, softmax spelled out in float32; called like every `Attend`.

    Args of a call:
        query: [B, heads, A*K, D].
        context_key, context_value: [B, kv_heads, S, D]; query head h uses key head h // (heads / kv_heads).
        block_key, block_value: [B, kv_heads, A*K, D].

    Returns:
        [B, heads, A*K, D].
    """

    def __init__(self, blocks: Batch, window: int | None = None, causal: bool = False):
        rows = range(len(blocks.document_ids))
        self.mask = torch.stack([dense_mask(blocks, row, window, causal) for row in rows])

    def __call__(self, query, context_key, context_value, block_key, block_value) -> torch.Tensor:
        group = query.shape[1] // block_key.shape[1]
        key = torch.cat([context_key, block_key], dim=2).repeat_interleave(group, dim=1).float()
        value = torch.cat([context_value, block_value], dim=2).repeat_interleave(group, dim=1).float()
        scores = query.float() @ key.transpose(2, 3) / math.sqrt(query.shape[-1])
        scores = scores.masked_fill(~self.mask[:, None], -math.inf)
        return (scores.softmax(dim=-1) @ value).to(query.dtype)


def used_slots(blocks: Batch) -> torch.Tensor:
    """[B, A*K] bool: the slots of blocks with an anchor. What attention returns for the others is never looked at."""
    return (blocks.anchor_documents >= 0).repeat_interleave(blocks.slots, dim=1)


# --------------------------------------------------------------------------------------------------------- objective


def naive_loss(hidden: torch.Tensor, head: torch.Tensor, blocks: Batch) -> torch.Tensor:
    """Σ w·nll through full float32 logits, with autograd doing the gradient; a float32 scalar.

    Args:
        hidden: [B, A*K, H], the draft's output.
        head: [V, H].
    """
    logits = hidden.float() @ head.float().T  # [B, A*K, V]
    total = logits.new_zeros(())
    for b, a, k in blocks.weights.nonzero().tolist():  # k counts from 0 here: the label of slot k + 1
        slot = a * blocks.slots + k + 1
        total = total + blocks.weights[b, a, k] * F.cross_entropy(logits[b, slot], blocks.labels[b, a, k])
    return total


def naive_statistics(hidden: torch.Tensor, head: torch.Tensor, blocks: Batch) -> dict[str, float | list[float]]:
    """The fields of `Statistics` by name, counted block by block. Arguments as in `naive_loss`."""
    best = (hidden.float() @ head.float().T).argmax(dim=-1).tolist()
    labels, weights = blocks.labels.tolist(), blocks.weights.tolist()
    size = blocks.slots
    accepted = full_blocks = 0
    slot_correct, slot_count = [0.0] * (size - 1), [0.0] * (size - 1)
    for b, row in enumerate(weights):
        for a, block in enumerate(row):
            right = [best[b][a * size + k] == labels[b][a][k - 1] for k in range(1, size)]
            for k, weight in enumerate(block):
                slot_count[k] += weight > 0
                slot_correct[k] += weight > 0 and right[k]
            if all(weight > 0 for weight in block):
                full_blocks += 1
                accepted += 1 + (right.index(False) if False in right else size - 1)
    return {
        "loss_sum": float(naive_loss(hidden, head, blocks)),
        "weight_sum": float(blocks.weights.sum()),
        "accepted": float(accepted),
        "full_blocks": float(full_blocks),
        "slot_correct": slot_correct,
        "slot_count": slot_count,
        "more": {},
    }
