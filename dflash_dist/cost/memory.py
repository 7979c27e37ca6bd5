"""What one rank holds in a training step, in bytes and from shapes alone; nothing is allocated to know it.

A step holds most in one of three phases: while the target runs, while the draft does, or in its update. `held` has all.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from dflash_dist.config import Config
from dflash_dist.cost.shapes import TargetShape, attention_parameters
from dflash_dist.draft.shape import DraftShape
from dflash_dist.kernels.cross_entropy import even_chunk, suitable_chunk, suitable_tile
from dflash_dist.training.setup import draft_shape

FLOAT32 = 4
BYTES = {"float32": FLOAT32, "bfloat16": 2}


@dataclass(frozen=True)
class RankStep:
    """One rank's part of a step: all that its memory, its traffic and its time depend on."""

    target: TargetShape
    draft: DraftShape
    depth: int  # target layers that are loaded and run; 0 where stored features are read
    ranks: int
    shards: int  # ranks that share one copy of the target
    rows: int  # run at once
    micro_batches: int
    length: int  # tokens a row
    anchors: int  # blocks a row
    target_bytes: int  # of an element of the target's weights and of the features
    compute_bytes: int  # of an element where the draft computes
    chunk: int | None  # slots whose logits exist at once, if stated
    checkpointing: bool  # whether the draft's layers are computed again in backward
    optimizer_shards: int  # ranks that share the optimiser's state
    on_gpu: bool

    @staticmethod
    def of(config: Config, text: Any, ranks: int, on_gpu: bool = True) -> RankStep:
        """As `config` says it, on `ranks` ranks, for the target whose text decoder has the Hugging Face config `text`.

        Raises:
            ValueError: target, draft and ranks do not fit together.
        """
        target, train = config.target, config.train
        if ranks % target.replicas:
            raise ValueError(f"target.replicas {target.replicas} does not divide {ranks} ranks")
        shape = TargetShape.of(text)
        depth = shape.layers if target.full_depth else max(target.layer_ids) + 1
        return RankStep(
            target=shape,
            draft=draft_shape(config, text, target.path),
            depth=0 if target.features else depth,
            ranks=ranks,
            shards=ranks // target.replicas,
            rows=train.micro_batch_size,
            # Where the batch is too small for the ranks, each has one micro-batch, and the batch grows.
            micro_batches=max(train.global_batch_size // (ranks * train.micro_batch_size), 1),
            length=config.data.seq_len,
            anchors=config.loss.anchors,
            target_bytes=BYTES[target.dtype],
            compute_bytes=BYTES[train.precision],
            chunk=config.loss.chunk,
            checkpointing=train.gradient_checkpointing,
            optimizer_shards=ranks if train.shard_optimizer else 1,
            on_gpu=on_gpu,
        )

    @property
    def tokens(self) -> int:
        """Of a micro-batch."""
        return self.rows * self.length

    @property
    def slots(self) -> int:
        """Of a micro-batch."""
        return self.rows * self.anchors * self.draft.block_size

    @property
    def labels(self) -> int:
        """Slots of a micro-batch that enter the LM head, if every block has all its labels."""
        return self.rows * self.anchors * (self.draft.block_size - 1)


def held(step: RankStep) -> dict[str, dict[str, int]]:
    """What a rank holds by phase, "capture", "draft" and "update", and by name: bytes at the moment when it is most."""
    parameters = draft_parameters(step.draft)
    features = step.tokens * len(step.draft.target_layer_ids) * step.draft.hidden_size
    always = {
        "target shard": target_shard(step),
        "embedding and head": ends(step),
        "draft": FLOAT32 * parameters,
        "optimiser": 2 * FLOAT32 * parameters // step.optimizer_shards,  # both moments of AdamW
    }
    gradients = {"gradients": FLOAT32 * parameters}
    if step.ranks > 1 or step.micro_batches > 1:  # they are DDP's buckets, or wait for those of the next micro-batch
        always |= gradients
    capture = {
        "gathered layer": gathered(step),
        "target activations": target_activations(step),
    }
    converted = 0 if step.target_bytes == step.compute_bytes else step.compute_bytes
    draft = {
        "features": features * (step.target_bytes + converted),
        "activations": activations(step),
        "loss chunk or backward": max(loss_chunk(step), backward_buffers(step)),
    }
    return {"capture": always | capture, "draft": always | draft, "update": always | gradients}


def peak(step: RankStep) -> int:
    """The most that a rank holds [bytes]."""
    return max(sum(phase.values()) for phase in held(step).values())


# --------------------------------------------------------------------------------------------------- the target


def target_shard(step: RankStep) -> int:
    shape = step.target
    if not step.depth:
        return 0
    embedding = 0 if _shares_embedding(step) else shape.vocab * shape.hidden
    return step.target_bytes * math.ceil((step.depth * shape.layer_parameters + embedding) / step.shards)


def ends(step: RankStep) -> int:
    """The plain copies of embedding and LM head, one where the target ties them."""
    return (1 if step.target.tied else 2) * step.target.vocab * step.target.hidden * step.compute_bytes


def _shares_embedding(step: RankStep) -> bool:
    """Unsharded, the target looks tokens up in the same tensor as the draft."""
    return step.ranks == 1 and step.target_bytes == step.compute_bytes


def gathered(step: RankStep) -> int:
    """The largest of the modules that FSDP gathers: as it arrives, in one buffer, and copied out of it. On its way
    through gloo there is a copy more."""
    if not step.depth or step.shards == 1:
        return 0
    copies = 2 if step.on_gpu else 3
    return copies * step.target_bytes * max(step.target.layer_parameters, step.target.vocab * step.target.hidden)


def target_activations(step: RankStep) -> int:
    """Without gradient: what one layer needs beside the captured ones; in the end the captured ones, twice, while they
    are concatenated."""
    if not step.depth:
        return 0
    shape, captured = step.target, len(step.draft.target_layer_ids)
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    if shape.experts:  # tokens go to several experts, sorted by expert and back again
        mlp = shape.experts_per_token * (3 * shape.hidden + 3 * shape.intermediate)
    else:
        mlp = 3 * shape.intermediate
    attention = 3 * queries + 4 * keys  # before and after the rotation, and the output
    layer = (2 + captured) * shape.hidden + max(mlp, attention)
    mask = (
        step.rows * step.length**2 * (1 + step.target_bytes)
    )  # of packed documents: bool, and as it is added to scores
    return step.target_bytes * step.tokens * max(layer, 2 * captured * shape.hidden) + mask


# ---------------------------------------------------------------------------------------------------- the draft


def draft_parameters(shape: DraftShape) -> int:
    hidden = shape.hidden_size
    attention = attention_parameters(hidden, shape.num_attention_heads, shape.num_key_value_heads, shape.head_dim)
    layer = attention + 3 * hidden * shape.intermediate_size + 2 * hidden + 2 * shape.head_dim
    return len(shape.target_layer_ids) * hidden * hidden + 2 * hidden + shape.num_layers * layer


def activations(step: RankStep) -> int:
    """What autograd keeps of the draft's forward, by what it belongs to; the features, its input, are counted apart.

    Every term is what a product, a norm, the attention or the gated SiLU needs again in backward: their inputs.
    """
    shape = step.draft
    hidden, layers = shape.hidden_size, shape.num_layers
    queries, keys = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
    # Elements a slot and layer: two norms before and after; q projected, rotated, and the attention's output; k
    # projected and rotated, v; gate and up.
    slot = 4 * hidden + 3 * queries + 3 * keys + 2 * shape.intermediate_size
    context = 3 * keys
    if step.checkpointing:  # the inputs of all layers, and one layer at a time
        slot_layers = layers * hidden + slot
        context_layers = context
    else:
        slot_layers, context_layers = layers * slot, layers * context
    # The final norm before and after; the context likewise.
    elements = step.slots * (slot_layers + 2 * hidden) + step.tokens * (context_layers + 2 * hidden)
    # Autocast casts every matrix once and keeps it as long as the graph.
    casts = 0 if step.compute_bytes == FLOAT32 else draft_parameters(shape)
    rotations = 2 * FLOAT32 * (step.slots + step.tokens) * shape.head_dim  # cosine and sine
    return step.compute_bytes * (elements + casts) + rotations


def loss_chunk(step: RankStep) -> int:
    """The logits of a chunk, which become their gradient; their float32 copy, on a CPU in tiles; and the hidden states
    that enter, twice, with their gradient."""
    vocab, labels, c = step.draft.vocab_size, step.labels, step.compute_bytes
    size = even_chunk(labels, step.chunk or suitable_chunk(vocab, step.on_gpu))
    wide = 0 if c == FLOAT32 else FLOAT32 * suitable_tile(size, vocab, step.on_gpu) * vocab
    return c * size * vocab + wide + 3 * c * labels * step.draft.hidden_size


def backward_buffers(step: RankStep) -> int:
    """What the last layer's MLP needs on the way back, while all activations are still kept: the product of its gate
    and up again, and the gradients of both."""
    return step.slots * (3 * step.compute_bytes * step.draft.intermediate_size + FLOAT32 * step.draft.hidden_size)
