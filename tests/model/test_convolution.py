"""The convolution with a backward pass by hand is the module's, with a quarter of the operations."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from nltrain.model.convolution import convolve_in_documents
from nltrain.model.packing import Packing
from nltrain.model.parts import CausalConv

VIEWS = ("slice", "select", "unsqueeze", "expand", "view", "detach", "alias", "unbind", "squeeze", "as_strided")


class Count(TorchDispatchMode):
    """Operations but views."""

    number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.number += func.__name__.split(".")[0] not in VIEWS
        return func(*args, **(kwargs or {}))


def _case(taps: int, paths: int, device: str = "cpu") -> tuple[CausalConv, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    starts = torch.zeros(2, 11, dtype=torch.bool)
    starts[0, [2, 3, 8]] = True
    seen = Packing.of((2, 11), starts).taps_seen(taps - 1, torch.float64)
    assert seen is not None
    conv = CausalConv(6, taps, paths).double()
    u, history = torch.randn(2, 11, 6).double(), torch.zeros(2, taps - 1, 6).double()
    return conv.to(device), u.to(device).requires_grad_(), history.to(device), seen.to(device)


@pytest.mark.parametrize(("taps", "paths"), [(1, 1), (2, 1), (4, 3)])
def test_outputs_and_gradients_are_those_of_the_module(taps: int, paths: int) -> None:
    conv, u, history, seen = _case(taps, paths)
    want = conv(u, history, seen)
    got = F.silu(convolve_in_documents(torch.cat([history, u], 1), conv.weight, seen))
    torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-13)
    d_out = torch.randn_like(want)
    expected, found = (torch.autograd.grad(y, (u, conv.weight), d_out) for y in (want, got))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_off_a_cpu_a_layer_launches_few_operations() -> None:
    conv, u, history, seen = _case(4, 3, "meta")
    with Count() as forward:
        y = conv(u, history, seen)
    with Count() as backward:
        y.backward(torch.zeros_like(y))
    assert forward.number <= 9 and backward.number <= 32
