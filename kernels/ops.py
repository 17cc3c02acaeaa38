"""The two differentiable pieces worth writing by hand: activation with its slope, and the triangular system.

Both support first-order autograd only, which is what training needs: the second-order terms of the inner gradient are
explicit in the outer graph, because the inner gradient is a closed form.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

L2_EPS = 1e-6
# Diagonal blocks are inverted by substitution, larger ones merged with products.
DIAGONAL = 16


class _SiluPair(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor) -> tuple[Tensor, Tensor]:
        gate = torch.sigmoid(a)
        value = a * gate
        ctx.save_for_backward(a, gate)
        # sigma' = gate (1 + a (1 - gate))
        return value, torch.addcmul(gate, value, 1 - gate)

    @staticmethod
    def backward(ctx: Any, d_value: Tensor, d_slope: Tensor) -> Tensor:  # type: ignore[override]
        a, gate = ctx.saved_tensors
        rest = 1 - gate
        bend = gate * rest  # sigmoid'
        slope = torch.addcmul(gate, a, bend)
        # sigma'' = sigmoid' (2 + a (1 - 2 gate))
        curve = bend * (2 + a * (rest - gate))
        return torch.addcmul(d_value * slope, d_slope, curve)


class _L2Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        scale = torch.rsqrt((x * x).sum(-1, keepdim=True) + L2_EPS)
        y = x * scale
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> Tensor:  # type: ignore[override]
        y, scale = ctx.saved_tensors
        return torch.addcmul(d_y, y, (y * d_y).sum(-1, keepdim=True), value=-1) * scale


def l2norm(x: Tensor) -> Tensor:
    """x / |x| over the last dimension, finite at 0; the same function as `naive.l2norm` with fewer passes."""
    return _L2Norm.apply(x)  # type: ignore[no-any-return]


class _GeluPair(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor) -> tuple[Tensor, Tensor]:
        cdf = 0.5 * (1 + torch.erf(a * 0.5**0.5))
        pdf = torch.exp(-0.5 * a * a) * (0.5 / torch.pi) ** 0.5
        ctx.save_for_backward(a, cdf)
        return a * cdf, torch.addcmul(cdf, a, pdf)

    @staticmethod
    def backward(ctx: Any, d_value: Tensor, d_slope: Tensor) -> Tensor:  # type: ignore[override]
        a, cdf = ctx.saved_tensors
        pdf = torch.exp(-0.5 * a * a) * (0.5 / torch.pi) ** 0.5
        return d_value * torch.addcmul(cdf, a, pdf) + d_slope * pdf * (2 - a * a)


def products(a: Tensor, b: Tensor) -> Tensor:
    """Batched a b over equal leading dims; fewer dispatched views than `a @ b`."""
    if a.dim() == 3:
        return torch.bmm(a, b)
    return torch.bmm(a.flatten(0, -3), b.flatten(0, -3)).unflatten(0, a.shape[:-2])


def activation_pair(name: str, a: Tensor) -> tuple[Tensor, Tensor]:
    """(act(a), act'(a)); the backward uses act''."""
    return (_SiluPair if name == "silu" else _GeluPair).apply(a)  # type: ignore[no-any-return]


def activate(name: str, a: Tensor) -> Tensor:
    """act(a)."""
    return F.silu(a) if name == "silu" else F.gelu(a)


def unit_lower_inverse(lower: Tensor) -> Tensor:
    """(I + lower)^-1 for strictly lower triangular [..., c, c]."""
    c = lower.shape[-1]
    if c <= DIAGONAL or c % 2:
        eye = torch.eye(c, dtype=lower.dtype, device=lower.device)
        return torch.linalg.solve_triangular(lower, eye.expand_as(lower), upper=False, unitriangular=True)
    half = c // 2
    both = torch.stack([lower[..., :half, :half], lower[..., half:, half:]])
    first, second = unit_lower_inverse(both)
    corner = -products(products(second, lower[..., half:, :half]), first)
    out = torch.zeros_like(lower)
    out[..., :half, :half], out[..., half:, half:], out[..., half:, :half] = first, second, corner
    return out


class _TriangularInverseTimes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, lower: Tensor, right: Tensor) -> Tensor:
        inverse = unit_lower_inverse(lower)
        x = products(inverse, right)
        ctx.save_for_backward(inverse, x)
        return x

    @staticmethod
    def backward(ctx: Any, d_x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        inverse, x = ctx.saved_tensors
        d_right = products(inverse.mT, d_x)
        return -products(d_right, x.mT), d_right


def triangular_inverse_times(lower: Tensor, right: Tensor) -> Tensor:
    """(I + lower)^-1 right; lower [..., c, c] strictly lower triangular, zero elsewhere, right [..., c, r].

    The gradient of `lower` is not masked: the caller forms `lower` by multiplying with a strictly lower mask.
    """
    return _TriangularInverseTimes.apply(lower, right)  # type: ignore[no-any-return]
