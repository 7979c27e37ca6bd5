"""A training step as one would first write it: the oracle of the tests and the yardstick of `bench`. Frozen: what is
tuned elsewhere is measured against this.

Everything the package avoids is here on purpose: the whole target with its LM head, one dense mask, keys and values
repeated for every query head, the logits of all slots at once, an ordinary cross-entropy, float32 throughout.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from dflash_dist.batch import Batch
from dflash_dist.draft.base import Draft
from dflash_dist.draft.layers import DraftLayer
from dflash_dist.training.sampler import Sampler


def dense_mask(batch: Batch) -> torch.Tensor:
    """[B, 1, A * K, S + A * K] bool: a slot sees the context before its anchor, in its document, and its own block."""
    block = torch.arange(batch.anchors.shape[1]).repeat_interleave(batch.slot_ids.shape[-1])
    anchor = batch.anchors[:, block, None]
    document = batch.anchor_documents[:, block, None]
    index = torch.arange(batch.document_ids.shape[1])
    context = (index < anchor) & (batch.document_ids[:, None, :] == document)
    own = (block[:, None] == block).expand(len(anchor), -1, -1)
    return torch.cat([context, own], dim=-1)[:, None]


def draft_forward(draft: Draft, batch: Batch, features: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
    """[B, A * K, H], from the draft's parameters and nothing else of it."""
    shape = draft.shape
    mask = dense_mask(batch)
    positions = batch.slot_positions.flatten(1)
    all_positions = torch.cat([batch.position_ids, positions], dim=1)
    frequencies = shape.rope_theta ** (-torch.arange(0, shape.head_dim, 2).float() / shape.head_dim)
    angles = (all_positions[:, None, :, None] * frequencies).repeat(1, 1, 1, 2)
    cos, sin = angles.cos(), angles.sin()

    def norm(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + shape.rms_norm_eps) * weight

    def heads(projected: torch.Tensor) -> torch.Tensor:
        return projected.unflatten(-1, (-1, shape.head_dim)).transpose(1, 2)

    def rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        left, right = states.chunk(2, dim=-1)
        return states * cos + torch.cat([-right, left], dim=-1) * sin

    def attend(layer: DraftLayer, hidden: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        attention = layer.self_attn
        count = hidden.shape[1]
        both = torch.cat([context, hidden], dim=1)
        query = norm(heads(F.linear(hidden, attention.q_proj.weight)), attention.q_norm.weight)
        key = norm(heads(F.linear(both, attention.k_proj.weight)), attention.k_norm.weight)
        value = heads(F.linear(both, attention.v_proj.weight))
        query = rotate(query, cos[:, :, -count:], sin[:, :, -count:])
        key = rotate(key, cos, sin)
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return F.linear(output.transpose(1, 2).flatten(2), attention.o_proj.weight)

    context = norm(F.linear(features, draft.fc.weight), draft.hidden_norm.weight)
    hidden = F.embedding(batch.slot_ids.flatten(1), embedding)
    for layer in draft.layers:
        hidden = hidden + attend(layer, norm(hidden, layer.input_layernorm.weight), context)
        inner = norm(hidden, layer.post_attention_layernorm.weight)
        gate = F.silu(F.linear(inner, layer.mlp.gate_proj.weight))
        hidden = hidden + F.linear(gate * F.linear(inner, layer.mlp.up_proj.weight), layer.mlp.down_proj.weight)
    return norm(hidden, draft.norm.weight)


class ReferenceStep:
    """One optimiser step after the other on one process.

    Args:
        model: the whole causal language model, float32.
        draft: float32; only its parameters are used.
        sampler: gives the rows and blocks of a step.
    """

    def __init__(self, model: Any, draft: Draft, sampler: Sampler, lr: float):
        self.model, self.draft, self.sampler = model, draft, sampler
        self.embedding = model.get_input_embeddings().weight
        self.head = model.get_output_embeddings().weight
        self.optimizer = torch.optim.AdamW(draft.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)

    def run(self, step: int) -> float:
        """Returns the loss, Σ w·nll / Σ w over all micro-batches."""
        batches = self.sampler.training(step)
        weight = sum(batch.weights.sum().item() for batch in batches)
        losses = []
        for batch in batches:
            with torch.no_grad():
                output = self.model(
                    input_ids=batch.input_ids,
                    position_ids=batch.position_ids,
                    use_cache=False,
                    output_hidden_states=True,
                )
            captured = [output.hidden_states[i + 1] for i in self.draft.shape.target_layer_ids]
            hidden = draft_forward(self.draft, batch, torch.cat(captured, dim=-1), self.embedding)
            logits = F.linear(hidden, self.head).unflatten(1, batch.slot_ids.shape[1:])
            nll = F.cross_entropy(logits[:, :, 1:].flatten(0, 2), batch.labels.flatten(), reduction="none")
            loss = (nll * batch.weights.flatten()).sum() / weight
            loss.backward()
            losses.append(loss.item())
        torch.nn.utils.clip_grad_norm_(self.draft.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return sum(losses)
