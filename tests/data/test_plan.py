"""The order of samples: each exactly once per epoch, whatever the ranks, restarts and cuts."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nltrain.data import DataError, SamplePlan, TokenDataset
from nltrain.data.permutation import EpochOrder, permute
from nltrain.levels.quantum import cut_quantum
from tests.data.support import make_dataset

WORLD_SIZES = (1, 2, 3, 4, 8)


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


def test_memory_of_a_plan_grows_with_shards_not_with_samples() -> None:
    order = EpochOrder(0, np.full(1000, 10**9), 16)
    epochs, shards, offsets = order.locate(np.array([0, 10**11, 10**12 - 1, 10**12, 5 * 10**15]))
    assert epochs.tolist() == [0, 0, 0, 1, 5000]
    assert len({*zip(shards.tolist(), offsets.tolist(), strict=True)}) == 5
    held = sum(array.nbytes for epoch in order._epochs.values() for array in epoch)
    assert held < 200_000


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> SamplePlan:
    return SamplePlan(7, [make_dataset(str(tmp_path_factory.mktemp("plan") / "set"), 203)], window_shards=2)


def consumed(first_quantum: int, num_quanta: int, quantum: int, micro: int, world_size: int) -> list[list[int]]:
    """Per quantum, the sample indices that the ranks together consume, by micro-step and rank."""
    found = []
    for number in range(first_quantum, first_quantum + num_quanta):
        steps = cut_quantum(quantum, micro, world_size)
        found.append([number * quantum + i for step in steps for part in step for i in part])
    return found


@given(st.data())
@settings(max_examples=60)
def test_exactly_once_over_ranks_and_restarts(plan: SamplePlan, data: st.DataObject) -> None:
    """Kills at any quantum, another world size and micro-batch after each: every sequence exactly once per epoch."""
    quantum = data.draw(st.integers(1, 40), "quantum")
    total_quanta = -(-2 * 203 // quantum)
    position, samples = 0, []
    while position < total_quanta:
        world_size = data.draw(st.sampled_from(WORLD_SIZES), "world size")
        micro = data.draw(st.integers(1, 8), "micro-batch")
        finished = data.draw(st.integers(1, total_quanta - position), "quanta until the kill")
        samples += itertools.chain(*consumed(position, finished, quantum, micro, world_size))
        # Restored from the state of the last finished quantum.
        position += finished
        assert plan.restore(plan.state(position * quantum)) == position * quantum
    assert samples == list(range(total_quanta * quantum))
    addresses = plan.addresses(samples[: 2 * 203])
    places = list(zip(addresses.epoch.tolist(), addresses.shard.tolist(), addresses.offset.tolist(), strict=True))
    assert len(set(places)) == 2 * 203


@given(st.integers(1, 64), st.integers(1, 9))
def test_a_quantum_has_the_same_samples_in_the_same_order_at_every_world_size(quantum: int, micro: int) -> None:
    alone = consumed(0, 3, quantum, 1, 1)
    for world_size in WORLD_SIZES:
        assert consumed(0, 3, quantum, micro, world_size) == alone


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> list[TokenDataset]:
    folder = tmp_path_factory.mktemp("mixed")
    return [make_dataset(str(folder / str(size)), size, seed=size) for size in (30, 64, 111, 9)]


@given(st.lists(st.floats(0.05, 1), min_size=2, max_size=4), st.integers(0, 1000))
@settings(max_examples=20)
def test_mixed_datasets_keep_their_shares_cursors_and_epochs(
    mixed: list[TokenDataset], weights: list[float], seed: int
) -> None:
    plan = SamplePlan(seed, mixed[: len(weights)], weights)
    num_samples = 10_000
    addresses = plan.addresses(range(num_samples))
    total = sum(weights)
    for number, (dataset, weight) in enumerate(zip(plan.datasets, weights, strict=True)):
        mine = np.nonzero(addresses.dataset == number)[0]
        assert abs(len(mine) / num_samples - weight / total) < 0.02
        assert plan.cursors(num_samples)[number] == len(mine)
        cut = 4321
        assert plan.cursors(cut)[number] == int((mine < cut).sum())
        # Its own epochs, in order, each complete.
        assert (np.diff(addresses.epoch[mine]) >= 0).all()
        first_epoch = mine[addresses.epoch[mine] == 0]
        places = set(zip(addresses.shard[first_epoch].tolist(), addresses.offset[first_epoch].tolist(), strict=True))
        assert len(places) == len(first_epoch) <= dataset.num_sequences
        if len(mine) > dataset.num_sequences:
            assert len(places) == dataset.num_sequences


def test_a_state_of_other_data_is_refused_unless_told_otherwise(tmp_path: Path, plan: SamplePlan) -> None:
    state = plan.state(123)
    assert plan.restore(state) == 123
    moved = make_dataset(str(tmp_path / "moved"), 203)
    assert SamplePlan(7, [moved], window_shards=2).restore(state) == 123
    other = SamplePlan(7, [make_dataset(str(tmp_path / "other"), 203, seed=1)], window_shards=2)
    with pytest.raises(DataError, match=r"fingerprint .* but the state was saved with"):
        other.restore(state)
    assert other.restore(state, allow_other_data=True) == 123
    with pytest.raises(DataError, match=r"data.seed: 8, but the state was saved with 7"):
        SamplePlan(8, plan.datasets, window_shards=2).restore(state)
    with pytest.raises(DataError, match=r"data.window_shards"):
        SamplePlan(7, plan.datasets, window_shards=3).restore(state)
