"""What the guard left out, by sample and reason."""

import torch

from nltrain.track.left_out import LeftOut


def test_what_was_left_out_has_its_samples_and_its_reason():
    left_out = LeftOut()
    for samples, verdict in (((1, 2), 0), ((3, 4), 1), ((5,), 2)):
        left_out.add(samples, 10 * len(samples), torch.tensor(verdict))
    assert left_out.take() == [
        {"samples": [3, 4], "tokens": 20, "reason": "loss not finite"},
        {"samples": [5], "tokens": 10, "reason": "loss spike"},
    ]
    assert left_out.take() == []
