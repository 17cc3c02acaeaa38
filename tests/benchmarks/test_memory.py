"""The count of live bytes is that of the tensors that are alive, and recomputing a block keeps its input alone."""

from dataclasses import replace

import pytest
import torch

from benchmarks.memory import LiveBytes, Row, largest_that_fits, micro_step
from tests.model.configs import small


def test_live_bytes_follow_tensors_from_their_making_to_their_end() -> None:
    outside = torch.zeros(10, device="meta")
    with LiveBytes() as live:
        a = outside + 1  # 40 bytes
        b = a.view(2, 5)  # none of its own
        c = torch.mm(b.mT, b)  # 100 bytes
        assert live.now == live.peak == 140
        del a
        assert live.now == 140  # b holds it
        del b, c
        assert live.now == 0 and live.peak == 140
        outside.add_(1)
        assert live.now == 0


def test_saved_tensors_are_alive_until_the_backward_pass_has_used_them() -> None:
    x = torch.zeros(100, device="meta", requires_grad=True)
    with LiveBytes() as live:
        y = x.exp().sum()
        assert live.now == 404  # exp keeps its result
        y.backward()
        del y
        assert live.now == 400 and x.grad is not None  # the gradient of x


@pytest.mark.parametrize("recompute", ["none", "block"])
def test_what_a_step_keeps_grows_with_the_batch(recompute: str) -> None:
    config = small("hope", recompute=recompute, num_layers=1)
    one, two = micro_step(config, 1, 16), micro_step(config, 2, 16)
    assert one.peak > one.kept and two.kept >= 1.5 * one.kept
    deeper = micro_step(replace(config, num_layers=2), 1, 16)
    one_input = 16 * config.width * 2  # [1, 16, D] in bf16
    if recompute == "block":
        assert deeper.kept - one.kept == one_input
    else:
        assert deeper.kept - one.kept > 20 * one_input


def test_the_largest_micro_batch_follows_from_two() -> None:
    def row(micro_batch: int) -> Row:
        activations = 10.0 * micro_batch + 1
        return Row("block", micro_batch, 0.0, 0.0, activations, 8.0, activations + 12, True)

    assert largest_that_fits([row(2), row(4)]) == 6  # 60 + 1 + 12 <= 80 < 70 + 13
