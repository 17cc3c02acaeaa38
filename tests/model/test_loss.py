"""The loss in pieces is the loss of all logits at once, with a bound on what it holds."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks._memory_cases import DEVICE
from nltrain.model.loss import rows_per_piece, summed_loss


def _case(num_rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(num_rows, 16, generator=generator).to(DEVICE, dtype)
    weight = torch.randn(50, 16, generator=generator).to(DEVICE, dtype)
    targets = torch.randint(0, 50, (num_rows,), generator=generator)
    targets[::7] = -100
    return x.requires_grad_(), weight.requires_grad_(), targets.to(DEVICE)


def _whole(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, weight).float(), targets, ignore_index=-100, reduction="sum")


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-8)])
@pytest.mark.parametrize("num_rows", [128, 129, 300])
def test_pieces_give_the_loss_and_the_gradients_of_the_whole(num_rows: int, dtype: torch.dtype, bound: float) -> None:
    x, weight, targets = _case(num_rows, dtype)
    want = _whole(x, weight, targets)
    expected = torch.autograd.grad(3 * want, (x, weight))
    got = summed_loss(x, weight, targets, 1)
    found = torch.autograd.grad(3 * got, (x, weight))
    assert got.dtype == torch.float32 and abs(got - want) <= 1e-6 * want
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == dtype and (a - b).float().norm() <= bound * b.float().norm()


def test_a_short_batch_is_computed_by_torch_to_the_bit() -> None:
    x, weight, targets = _case(128, torch.float32)
    want, got = _whole(x, weight, targets), summed_loss(x, weight, targets, 128 * 50 * 4)
    assert torch.equal(got, want)
    for a, b in zip(*(torch.autograd.grad(loss, (x, weight)) for loss in (got, want)), strict=True):
        assert torch.equal(a, b)


def test_ignored_rows_give_exact_zeros_even_where_they_are_nan() -> None:
    x, weight, targets = _case(300, torch.float32)
    with torch.no_grad():
        x[::7] = torch.nan
    d_x, d_weight = torch.autograd.grad(summed_loss(x, weight, targets, 1), (x, weight))
    assert torch.equal(d_x[::7], torch.zeros_like(d_x[::7])) and d_x[1::7].isfinite().all()
    assert d_weight.isnan().any()  # 0 x NaN in the product; the guard leaves such a rank out


def test_without_gradients_nothing_is_kept() -> None:
    x, weight, targets = _case(300, torch.float32)
    with torch.no_grad():
        assert torch.allclose(summed_loss(x, weight, targets, 1), _whole(x, weight, targets))


def test_the_logits_of_a_piece_stay_within_the_bound() -> None:
    assert rows_per_piece(32_000, 256 << 20) == 2048
    assert rows_per_piece(32_000, 1) == 128  # never fewer
    for vocab_size in (4096, 32_000, 128_256):
        assert rows_per_piece(vocab_size, 256 << 20) * vocab_size * 4 <= 256 << 20
