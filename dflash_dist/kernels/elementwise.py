"""What stands between the draft's large products; what adds up or rotates does so in float32, whatever the dtype.

Written out as one would read them, they pass over memory a dozen times and keep every intermediate result for backward.
Here each backward has only the inputs, and computes the rest again.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

Rope = tuple[torch.Tensor, torch.Tensor]  # see `Rotate`


class Rotate(torch.autograd.Function):
    """Rotary position embedding of [B, heads, T, D], half-split as in Llama and Qwen.

    `cos` and `signed_sin` are [B, 1, T, D] float32: (cos, cos) and (-sin, sin) of the angles of the D/2 pairs.
    """

    @staticmethod
    def forward(ctx, heads, cos, signed_sin):
        ctx.save_for_backward(cos, signed_sin)
        wide = heads.float()
        return (wide * cos).addcmul_(wide.roll(wide.shape[-1] // 2, dims=-1), signed_sin).to(heads.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        cos, signed_sin = ctx.saved_tensors
        return Rotate.apply(gradient, cos, -signed_sin), None, None  # turns it back


class NormalizeRMS(torch.autograd.Function):
    """`x / sqrt(mean(x²) + eps) * weight` over the last dimension."""

    @staticmethod
    def forward(ctx, hidden, weight, eps):
        wide = hidden.to(torch.float32, copy=True)
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        scale = torch.rsqrt(norm.square_().div_(hidden.shape[-1]).add_(eps))
        ctx.save_for_backward(hidden, weight, scale)
        return wide.mul_(scale).mul_(weight).to(hidden.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        hidden, weight, scale = ctx.saved_tensors
        unit, gradient = hidden.to(torch.float32, copy=True).mul_(scale), gradient.to(torch.float32, copy=True)
        along = gradient * unit
        # What grows all of a vector alike is undone by its normalisation.
        radial = (along @ weight.float() / hidden.shape[-1])[..., None]
        d_hidden = gradient.mul_(weight).addcmul_(unit, radial, value=-1).mul_(scale)
        return d_hidden.to(hidden.dtype), along.flatten(0, -2).sum(0).to(weight.dtype), None


class GatedDown(torch.autograd.Function):
    """`(silu(gate) * up) @ weight.T`, whose product of the two is as large as each of them and not kept."""

    @staticmethod
    def forward(ctx, gate, up, weight):
        ctx.save_for_backward(gate, up, weight)
        return F.linear(F.silu(gate).mul_(up), weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        gate, up, weight = ctx.saved_tensors
        # All other activations are still there when the last layer comes to this: no more than three as large at once.
        d_product, activated = gradient @ weight, F.silu(gate)
        d_up = d_product * activated
        d_weight = gradient.flatten(0, -2).T @ activated.mul_(up).flatten(0, -2)
        del activated
        torch.ops.aten.silu_backward.grad_input(d_product.mul_(up), gate, grad_input=d_product)
        return d_product, d_up, d_weight
