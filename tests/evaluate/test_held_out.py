"""The held-out sequences: the same for all seeds, equally many batches on all ranks, sums over all of them."""

from dataclasses import replace

import pytest
import torch

from nltrain.data import DataError
from nltrain.evaluate.held_out import HeldOut


def samples(setting):
    return [list(batch.sample_indices) for batch in HeldOut(setting).batches()]


def test_they_do_not_depend_on_the_order_of_training(setting):
    (one, other) = (HeldOut(replace(setting, data=replace(setting.data, seed=seed))).batches() for seed in (0, 5))
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("world_size", [1, 3, 4, 63])
def test_ranks_share_them_and_have_equally_many_batches(setting, world_size):
    ranks = [samples(replace(setting, rank=rank, world_size=world_size)) for rank in range(min(world_size, 12))]
    assert len({len(rank) for rank in ranks}) == 1
    found = sorted(sample for rank in ranks for batch in rank for sample in batch)
    assert found == list(range(10))


def test_sums_leave_out_padding_and_restore_the_mode(setting, model):
    held_out = HeldOut(setting)
    model.train()
    modes = []

    def measure(batch):
        modes.append(model.training)
        return torch.tensor([1.0, float(batch.num_targets)])

    (calls, targets_again), targets = held_out.sums(model, measure)
    assert (calls, targets_again) == (len(held_out.batches()), targets) and targets > 0
    assert modes == [False] * len(modes) and model.training
    padded = HeldOut(replace(setting, rank=11, world_size=12))  # 10 sequences for 12 ranks
    assert [batch.num_targets for batch in padded.batches()] == [0]
    with pytest.raises(DataError, match="holds no target"):
        padded.sums(model, lambda batch: torch.tensor([torch.nan]))
