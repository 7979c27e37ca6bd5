"""What is written out for speed, against its formula and what autograd makes of that in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from dflash_dist.kernels.elementwise import GatedDown, NormalizeRMS, Rotate

ANGLES = torch.linspace(0, 60, 5 * 4, dtype=torch.float64).view(1, 1, 5, 4)  # of 5 tokens and the 4 pairs of a head
EPS = 0.3  # as large as the mean square, so that its place in the formula shows


def rotated(heads: torch.Tensor) -> torch.Tensor:
    """As complex numbers: coordinates i and i + D/2 are one of them."""
    turned = torch.complex(*heads.chunk(2, dim=-1)) * torch.polar(torch.ones_like(ANGLES), ANGLES)
    return torch.cat([turned.real, turned.imag], dim=-1)


def rotate(heads: torch.Tensor) -> torch.Tensor:
    cos, sin = ANGLES.cos().float(), ANGLES.sin().float()
    return Rotate.apply(heads, torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1))


def normalized(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return hidden / (hidden.square().mean(dim=-1, keepdim=True) + EPS).sqrt() * weight


def gated_down(gate: torch.Tensor, up: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return (gate * gate.sigmoid() * up) @ weight.T


CASES: dict[str, tuple[Callable, Callable, list[tuple[int, ...]]]] = {
    "Rotate": (rotate, rotated, [(2, 3, 5, 8)]),
    "NormalizeRMS": (lambda *given: NormalizeRMS.apply(*given, EPS), normalized, [(2, 5, 16), (16,)]),
    "GatedDown": (GatedDown.apply, gated_down, [(2, 5, 12), (2, 5, 12), (8, 12)]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_output_and_gradients_are_those_of_the_formula(name: str, dtype: torch.dtype) -> None:
    ours, formula, sizes = CASES[name]
    torch.manual_seed(0)
    given = [(torch.randn(size) / 2).to(dtype).requires_grad_() for size in sizes]
    exact = [tensor.detach().double().requires_grad_() for tensor in given]
    output, expected = ours(*given), formula(*exact)
    along = torch.randn(expected.shape).to(dtype)
    output.backward(along)
    expected.backward(along.double())
    # Half a unit in the last place, where all is computed in float32 and rounded once. Of the product only sums are.
    close = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2**-8, "atol": 2**-20}
    if (name, dtype) == ("GatedDown", torch.bfloat16):
        close = {"rtol": 0.03, "atol": 0.03}
    for one, other in zip([output, *(t.grad for t in given)], [expected, *(t.grad for t in exact)]):
        assert one.dtype == dtype
        torch.testing.assert_close(one.double(), other, **close)


def test_the_normalisation_adds_up_in_float32() -> None:
    """The sum of 4,096 equal squares: bfloat16 stops growing at the 256th."""
    hidden = torch.full((1, 4096), 0.5, dtype=torch.bfloat16)
    assert torch.equal(NormalizeRMS.apply(hidden, torch.ones(4096), 0.0), torch.ones_like(hidden))
