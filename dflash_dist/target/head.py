"""The target's LM head: whether what training multiplies with is what the target itself ends with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

STATES = 8  # hidden states that are tried
SPREAD = 10.0  # of their logits: as large as real ones, where a cap on logits shows
TOLERANCE = 0.05  # of the spread; bfloat16 rounds logits by less, another head is off by more than all of it


@dataclass(frozen=True)
class HeadGap:
    """How a model's own logits differ from `states @ head.T`."""

    error: float  # the largest difference, as a share of the logits' spread
    same_order: bool  # the likeliest tokens are the same all the same

    @property
    def none(self) -> bool:
        return self.error < TOLERANCE


@torch.no_grad()
def head_gap(model: Any, head: torch.Tensor) -> HeadGap:
    """Sends a few random states through what a causal language model does behind its decoder: its head, and whatever
    it does to the logits.

    Args:
        model: a causal language model of any depth; its own decoder's states are replaced.
        head: [V, H], on the model's device and in its dtype.

    Raises:
        ValueError: the model has no LM head.
    """
    module = model.get_output_embeddings()
    if module is None:
        raise ValueError(f"{type(model).__name__} has no LM head: its output is no distribution over tokens")
    random = torch.randn(STATES, head.shape[1], generator=torch.Generator().manual_seed(0)).to(head.device)
    states = (random * (SPREAD / (random @ head.float().T).std())).to(head.dtype)
    handle = module.register_forward_pre_hook(lambda _module, inputs: (states[None], *inputs[1:]))
    try:
        ids = torch.zeros(1, STATES, dtype=torch.long, device=head.device)
        own = model(input_ids=ids, use_cache=False).logits[0].float()
    finally:
        handle.remove()
    ours = F.linear(states, head).float()
    rises = own.gather(1, ours.argsort(dim=1)).diff(dim=1).min()
    return HeadGap(
        error=float((own - ours).abs().max()) / SPREAD, same_order=bool(rises > -TOLERANCE * own.std(dim=1).min())
    )


def check_head(path: str, model: Any, head: torch.Tensor) -> str:
    """What to know of a target whose logits are not just `states @ head.T`; empty where they are. A ValueError where it
    orders tokens otherwise."""
    gap = head_gap(model, head)
    if gap.none:
        return ""
    if gap.same_order:
        return (
            f"{path} scales or caps the logits of its LM head; the draft's stay as the head gives them, in training as"
            " in decoding: what is likeliest is the same"
        )
    raise ValueError(
        f"the logits of {path} are not what its LM head's matrix gives: on the same states they are off by"
        f" {gap.error:.0%} of their spread, and other tokens are likeliest; a draft has that matrix alone, so choose"
        " another target"
    )
