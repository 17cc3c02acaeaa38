"""The differentiable pieces worth writing by hand: activation with its slope, unit norm, and the triangular systems.

They support first-order autograd only, which is enough for training: the inner gradient is a closed form, so its
second-order terms are explicit in the outer graph.
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


class _UnitAndLength(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        length = torch.sqrt((x * x).sum(-1, keepdim=True) + L2_EPS)
        unit = x / length
        ctx.save_for_backward(unit, length)
        return unit, length

    @staticmethod
    def backward(ctx: Any, d_unit: Tensor, d_length: Tensor) -> Tensor:  # type: ignore[override]
        unit, length = ctx.saved_tensors
        # d length / d x = unit
        along = d_length - (unit * d_unit).sum(-1, keepdim=True) / length
        return torch.addcmul(d_unit / length, unit, along)


def unit_and_length(x: Tensor) -> tuple[Tensor, Tensor]:
    """`l2norm(x)` and what it divided by, sqrt(|x|^2 + eps) [..., 1]: their product is x exactly."""
    return _UnitAndLength.apply(x)  # type: ignore[no-any-return]


class _SoftBound(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bound: float) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = torch.rsqrt(torch.addcmul(torch.ones_like(length), length, length, value=bound**-2))
        y = x * scale
        ctx.save_for_backward(y, scale)
        ctx.bound = bound
        return y

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        y, scale = ctx.saved_tensors
        along = (y * d_y).sum(-1, keepdim=True)
        return torch.addcmul(d_y, y, along, value=-(ctx.bound**-2)) * scale, None


def soft_bound(x: Tensor, bound: float | None) -> Tensor:
    """x / sqrt(1 + |x|^2 / bound^2) over the last dimension: the direction of x, a length below `bound`; None: x."""
    if bound is None:
        return x
    return _SoftBound.apply(x, bound)  # type: ignore[no-any-return]


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
    upper, below = lower.split(half, -2)
    corner, last = below.split(half, -1)
    first, second = unit_lower_inverse(torch.stack([upper.narrow(-1, 0, half), last])).unbind()
    corner = products(products(second, corner), first)
    return torch.cat([F.pad(first, (0, half)), torch.cat([-corner, second], -1)], -2)


class _SolveSystems(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, lower: Tensor, *rights: Tensor) -> tuple[Tensor, ...]:
        inverse = unit_lower_inverse(lower)
        sizes = [right.shape[1] for right in rights]
        solved = tuple(products(i, r) for i, r in zip(inverse.split(sizes, 1), rights, strict=True))
        ctx.save_for_backward(inverse, *solved)
        return solved

    @staticmethod
    def backward(ctx: Any, *d_solved: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        inverse, *solved = ctx.saved_tensors
        inverses = inverse.split([x.shape[1] for x in solved], 1)
        d_rights = [products(i.mT, d) for i, d in zip(inverses, d_solved, strict=True)]
        d_lower = [products(d, x.mT) for d, x in zip(d_rights, solved, strict=True)]
        return -(torch.cat(d_lower, 1) if len(d_lower) > 1 else d_lower[0]), *d_rights


def solve_systems(lower: Tensor, rights: list[Tensor]) -> tuple[Tensor, ...]:
    """(I + lower)^-1 right for M systems that share one inversion.

    lower: [N, M, c, c], strictly lower triangular, zero elsewhere. rights: [N, m, c, r] each, the m add up to M; the
    result has their shapes. The gradient of `lower` is not masked: the caller forms `lower` by multiplying with a
    strictly lower mask.
    """
    return _SolveSystems.apply(lower, *rights)  # type: ignore[no-any-return]


def unit_lower_inverse_of_difference(lower: Tensor) -> Tensor:
    """(I - lower)^-1 for strictly lower triangular [M, c, c]; without autograd, and in few launches.

    As `unit_lower_inverse`: substitution on diagonal blocks of at most 16, then products for the corners
    T21 = T22 lower21 T11.
    """
    num, c = lower.shape[0], lower.shape[-1]
    size = c
    while size > DIAGONAL and size % 2 == 0:
        size //= 2

    def on_diagonal(x: Tensor, size: int) -> Tensor:
        """The blocks on the diagonal: [M, c / size, size, size], a view."""
        return x.view(num, c // size, size, c // size, size).diagonal(0, 1, 3).permute(0, 3, 1, 2)

    eye = torch.eye(size, dtype=lower.dtype, device=lower.device)
    diagonal = on_diagonal(lower, size).neg()
    first = torch.linalg.solve_triangular(diagonal, eye.expand_as(diagonal), upper=False, unitriangular=True)
    if size == c:
        return first.squeeze(1)
    inverse = torch.zeros_like(lower)
    on_diagonal(inverse, size).copy_(first)
    while size < c:
        blocks, done = on_diagonal(lower, 2 * size), on_diagonal(inverse, 2 * size)
        corner = products(done[..., size:, size:], blocks[..., size:, :size])
        done[..., size:, :size].copy_(products(corner, done[..., :size, :size]))
        size *= 2
    return inverse
