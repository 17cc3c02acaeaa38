"""The order of one dataset: a bijection that mixes well, each sequence once per epoch, in little memory."""

import tracemalloc

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from nltrain.data.permutation import EpochOrder, permute


@given(st.integers(1, 5000), st.integers(0, 2**64 - 1))
def test_permute_is_a_bijection(n: int, key: int) -> None:
    assert sorted(permute(np.arange(n), n, key)) == list(range(n))


def test_permute_moves_samples_far() -> None:
    images = permute(np.arange(10_000), 10_000, 1)
    assert np.abs(images - np.arange(10_000)).mean() > 3000
    assert np.abs(np.diff(images)).mean() > 3000
    assert (images == permute(np.arange(10_000), 10_000, 2)).mean() < 0.01


@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.integers(1, 5), st.integers(0, 2**64 - 1))
def test_every_epoch_holds_every_sequence_once(sizes: list[int], window_shards: int, key: int) -> None:
    order = EpochOrder(key, np.array(sizes), window_shards)
    everything = {(shard, offset) for shard, size in enumerate(sizes) for offset in range(size)}
    total = sum(sizes)
    epochs, shards, offsets = order.locate(np.arange(3 * total))
    for epoch in range(3):
        chosen = slice(epoch * total, (epoch + 1) * total)
        assert (epochs[chosen] == epoch).all()
        assert sorted(zip(shards[chosen].tolist(), offsets[chosen].tolist(), strict=True)) == sorted(everything)
    # Any position on its own gives the same answer as all of them together.
    for cursor in (0, total - 1, total, 2 * total + total // 2):
        alone = [int(column[0]) for column in order.locate(np.array([cursor]))]
        assert alone == [int(epochs[cursor]), int(shards[cursor]), int(offsets[cursor])]
        assert int(shards[cursor]) in order.shards_from(cursor, 1)[0]


def test_epochs_and_seeds_differ_in_order() -> None:
    order = EpochOrder(1, np.full(20, 50), 4)
    places = [order.locate(np.arange(1000) + 1000 * epoch)[1].tolist() for epoch in range(2)]
    assert places[0] != places[1]
    assert EpochOrder(2, np.full(20, 50), 4).locate(np.arange(1000))[1].tolist() != places[0]


def test_memory_of_an_order_grows_with_shards_not_with_samples() -> None:
    order = EpochOrder(0, np.full(1000, 10**9), 16)
    tracemalloc.start()
    epochs, shards, offsets = order.locate(np.array([0, 10**11, 10**12 - 1, 10**12, 5 * 10**15]))
    assert epochs.tolist() == [0, 0, 0, 1, 5000]
    assert len({*zip(shards.tolist(), offsets.tolist(), strict=True)}) == 5
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 200_000 and peak < 500_000
