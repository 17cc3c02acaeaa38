"""The hand-written backward passes against finite differences, and the functions against their definitions."""

import pytest
import torch
from torch import Tensor

from benchmarks._memory_cases import DEVICE
from kernels import naive
from kernels.ops import (
    activate,
    activation_pair,
    l2norm,
    products,
    soft_bound,
    solve_systems,
    unit_and_length,
    unit_lower_inverse,
    unit_lower_inverse_of_difference,
)
from kernels.rule import MemoryRule


def _normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE)


@pytest.mark.parametrize("name", ["silu", "gelu"])
def test_an_activation_and_its_slope(name: str) -> None:
    a = _normal(3, 5).requires_grad_()
    value, slope = activation_pair(name, a)
    rule = MemoryRule(activation=name)
    torch.testing.assert_close(value, activate(name, a))
    torch.testing.assert_close(value, naive.activation(rule, a))
    torch.testing.assert_close(slope, naive.activation_slope(rule, a))
    torch.testing.assert_close(slope, torch.autograd.grad(activate(name, a).sum(), a)[0])
    assert torch.autograd.gradcheck(lambda x: activation_pair(name, x), (a,))


def test_norms_and_the_bound_and_their_gradients() -> None:
    x = _normal(4, 6)
    x[0] = 0  # finite at 0
    torch.testing.assert_close(l2norm(x), naive.l2norm(x))
    unit, length = unit_and_length(x)
    torch.testing.assert_close(unit * length, x)
    assert soft_bound(x, None) is x
    assert soft_bound(100 * x, 2.0).norm(dim=-1).max() < 2.0
    torch.testing.assert_close(soft_bound(x, 2.0), naive.soft_bound(MemoryRule(gradient_bound=2.0), x))
    x = x[1:].requires_grad_()
    for function in (l2norm, unit_and_length, lambda t: soft_bound(t, 0.5)):
        assert torch.autograd.gradcheck(function, (x,))


@pytest.mark.parametrize("size", [1, 16, 17, 48, 64])
def test_the_inverse_of_a_unit_triangular_matrix(size: int) -> None:
    lower = (_normal(2, 3, size, size) / size).tril(-1)
    eye = torch.eye(size, dtype=torch.float64, device=DEVICE)
    torch.testing.assert_close(unit_lower_inverse(lower) @ (eye + lower), eye.expand_as(lower))


def test_systems_that_share_one_inversion() -> None:
    mask = torch.ones(5, 5, dtype=torch.float64, device=DEVICE).tril(-1)
    lower = _normal(2, 3, 5, 5).requires_grad_()
    rights = [_normal(2, 1, 5, 4, seed=1).requires_grad_(), _normal(2, 2, 5, 2, seed=2).requires_grad_()]
    solved = solve_systems(lower * mask, rights)
    eye = torch.eye(5, dtype=torch.float64, device=DEVICE)
    for x, right, own in zip(solved, rights, (lower * mask).split([1, 2], 1), strict=True):
        torch.testing.assert_close((eye + own) @ x, right)
    assert torch.autograd.gradcheck(lambda a, b, c: solve_systems(a * mask, [b, c]), (lower, *rights))


def test_products_over_equal_leading_dimensions() -> None:
    a, b = _normal(2, 3, 4, 5), _normal(2, 3, 5, 6, seed=1)
    torch.testing.assert_close(products(a, b), a @ b)
    torch.testing.assert_close(products(a[0], b[0]), a[0] @ b[0])


@pytest.mark.parametrize("size", [1, 16, 17, 48, 64])
def test_the_inverse_without_autograd(size: int) -> None:
    lower = (_normal(3, size, size) / size).tril(-1)
    torch.testing.assert_close(unit_lower_inverse_of_difference(lower), unit_lower_inverse(-lower))
